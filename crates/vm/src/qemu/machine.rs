//! QEMU's command line. Everything it touches is a descriptor with a number from [`fd`]; it opens no file by name but
//! its own firmware.

use heyvm_jail::{launcher::DESCRIPTORS_DIR, root::QemuRoot};

use super::{accel::Acceleration, guest_kernel};

/// Numbers of the descriptors that QEMU inherits.
pub mod fd {
    /// QEMU's own words.
    pub const LOG: i32 = 2;
    /// Guest memory.
    pub const MEMORY: i32 = 3;
    /// Device state to resume from (clones), or the socket to send it to (templates).
    pub const STATE: i32 = 4;
    /// The image's EROFS file.
    pub const ROOT: i32 = 5;
    /// The sandbox's disk.
    pub const DISK: i32 = 6;
    /// The network device.
    pub const TAP: i32 = 7;
    /// Listening socket of the control protocol.
    pub const QMP: i32 = 8;
    /// Listening socket for calls to the agent.
    pub const AGENT: i32 = 9;
    /// Kernel and initramfs (templates).
    pub const KERNEL: i32 = 10;
    /// See [`KERNEL`].
    pub const INITRAMFS: i32 = 11;
    /// Listening socket for connections to programs.
    pub const PORTS: i32 = 12;
}

/// Changes whenever the machine below does, so that old templates are not resumed on it.
pub const MACHINE_VERSION: u32 = 7;
/// Bytes of console output that QEMU remembers.
pub const CONSOLE_BYTES: u32 = 32 << 10;
/// Code translated from guest code is kept in this many MiB; it is private memory of each VM.
const TRANSLATION_CACHE_MIB: u32 = 64;

/// What differs between machines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// How guest code is run.
    pub acceleration: Acceleration,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Virtual processors.
    pub processors: u32,
    /// Whether there is a network device.
    pub network: bool,
    /// How it comes to life.
    pub start: Start,
}

/// How a machine comes to life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// From the kernel, with memory that a snapshot can share.
    Boot,
    /// From a template's memory and state.
    Resume,
}

impl Machine {
    /// Program and arguments, as the jail starts them.
    pub fn argv(&self, root: &QemuRoot) -> Vec<String> {
        let mut argv = Arguments(vec![root.program.display().to_string()]);
        argv.option("-bios", root.firmware.display());
        argv.option("-M", "microvm,memory-backend=memory,x-option-roms=off");
        self.processor(&mut argv);
        argv.option("-m", format!("{}M", self.memory_mib));
        let share = if self.start == Start::Boot { "on" } else { "off" };
        // Merged pages would tell one guest by time what another one holds.
        argv.option(
            "-object",
            format!(
                "memory-backend-file,id=memory,size={}M,mem-path={DESCRIPTORS_DIR}/{},share={share},merge=off,dump=off",
                self.memory_mib,
                fd::MEMORY
            ),
        );
        argv.flags(&["-nodefaults", "-no-user-config", "-nographic"]);
        argv.option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
        // A guest that ends stays long enough for its last words to be read.
        argv.option("-action", "reboot=shutdown,shutdown=pause,panic=pause");
        self.devices(&mut argv);
        match self.start {
            Start::Boot => self.boot(&mut argv),
            Start::Resume => argv.option("-incoming", "defer"),
        }
        argv.0
    }

    fn processor(&self, argv: &mut Arguments) {
        match self.acceleration {
            Acceleration::Kvm => {
                argv.option("-accel", "kvm");
                // Nested virtualisation would be KVM's largest surface, and counters tell of neighbours.
                argv.option("-cpu", "host,vmx=off,svm=off,pmu=off");
            }
            Acceleration::Tcg => {
                argv.option("-accel", format!("tcg,thread=multi,tb-size={TRANSLATION_CACHE_MIB}"));
                // Page walks of four levels instead of five: each is done in software here. Without SMAP, kernel and
                // user memory share one software TLB. Without ERMS, memory is copied by words instead of bytes.
                argv.option("-cpu", "max,la57=off,smap=off,erms=off");
            }
        }
        argv.option("-smp", self.processors);
    }

    fn devices(&self, argv: &mut Arguments) {
        argv.option("-chardev", format!("ringbuf,id=console,size={CONSOLE_BYTES}"));
        argv.option("-serial", "chardev:console");
        argv.option("-chardev", format!("socket,id=qmp,fd={},server=on,wait=off", fd::QMP));
        argv.option("-mon", "chardev=qmp,mode=control");
        argv.block("root", fd::ROOT, 1, "read-only=on,auto-read-only=off");
        argv.block("disk", fd::DISK, 2, "read-only=off,discard=unmap,detect-zeroes=unmap,file.discard=unmap");
        argv.flags(&["-device", "virtio-rng-device"]);
        argv.option("-chardev", format!("socket,id=agent,fd={},server=on,wait=off", fd::AGENT));
        argv.option("-device", "virtio-serial-device");
        argv.option("-device", format!("virtserialport,chardev=agent,name={}", heyvm_agent_protocol::PORT_NAME));
        argv.option("-chardev", format!("socket,id=ports,fd={},server=on,wait=off", fd::PORTS));
        argv.option("-device", format!("virtserialport,chardev=ports,name={}", heyvm_agent_protocol::ports::PORT_NAME));
        if self.network {
            argv.option("-netdev", format!("tap,id=net,fd={}", fd::TAP));
            argv.option("-device", format!("virtio-net-device,netdev=net,host_mtu={}", heyvm_jail::egress::MTU));
        }
    }

    fn boot(&self, argv: &mut Arguments) {
        argv.option("-kernel", format!("{DESCRIPTORS_DIR}/{}", fd::KERNEL));
        argv.option("-initrd", format!("{DESCRIPTORS_DIR}/{}", fd::INITRAMFS));
        argv.option("-append", guest_kernel::command_line(self.acceleration));
    }
}

/// A command line in the making.
struct Arguments(Vec<String>);

impl Arguments {
    fn option(&mut self, name: &str, value: impl ToString) {
        self.0.extend([name.to_owned(), value.to_string()]);
    }

    fn flags(&mut self, flags: &[&str]) {
        self.0.extend(flags.iter().map(ToString::to_string));
    }

    /// A raw file as a virtio block device.
    fn block(&mut self, name: &str, fd: i32, set: u32, properties: &str) {
        self.option("-add-fd", format!("fd={fd},set={set}"));
        self.option(
            "-blockdev",
            format!("driver=raw,node-name={name},file.driver=file,file.filename=/dev/fdset/{set},file.locking=off,{properties}"),
        );
        // A full host is the guest's to see as an error; by default QEMU would halt the guest for good.
        self.option("-device", format!("virtio-blk-device,drive={name},werror=report,rerror=report"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(start: Start) -> String {
        let root = QemuRoot {
            dir: "/jail".into(),
            program: "/usr/bin/qemu".into(),
            firmware: "/fw".into(),
            version: "7".into(),
            digest: "d".into(),
        };
        let machine = Machine { acceleration: Acceleration::Tcg, memory_mib: 512, processors: 1, network: true, start };
        machine.argv(&root).join(" ")
    }

    #[test]
    fn a_clone_differs_from_its_template_in_memory_and_start_alone() {
        let (template, clone) = (machine(Start::Boot), machine(Start::Resume));
        assert!(template.contains("share=on") && clone.contains("share=off"));
        let head = |text: &str| text.split("x-option-roms=off").next().unwrap().replace("share=on", "share=off");
        assert_eq!(head(&template), head(&clone));
    }

    #[test]
    fn guests_memory_is_neither_merged_nor_dumped() {
        assert!(
            machine(Start::Boot).contains("merge=off,dump=off")
                && machine(Start::Resume).contains("merge=off,dump=off")
        );
    }

    #[test]
    fn the_sandbox_forbids_starting_programs() {
        assert!(machine(Start::Resume).contains("spawn=deny"));
    }
}
