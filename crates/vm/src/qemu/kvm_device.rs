//! `/dev/kvm`: why it cannot be opened, and what to do about that.
#![expect(clippy::disallowed_methods, reason = "small files of the kernel's own")]

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
};

use nix::{
    errno::Errno,
    unistd::{Gid, Group},
};
use serde::{Deserialize, Serialize};

const DEVICE: &str = "/dev/kvm";
/// Bits of a mode: the group may read and write.
const GROUP_MAY_USE: u32 = 0o060;

/// Opens the device, or finds out why it cannot be opened.
pub fn open() -> Result<File, Closed> {
    File::options().read(true).write(true).open(DEVICE).map_err(|error| {
        let cpu = Cpu::from_text(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default());
        Closed::because(&error, cpu, &is_loaded, owner)
    })
}

/// Why the device cannot be opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Closed {
    /// The processor can do it, and the kernel's module for it is not loaded.
    NoModule(Maker),
    /// The kernel has the device, and this container was not given it.
    NotInContainer,
    /// This is a virtual machine, and the one around it does not pass virtualisation on.
    NotNested,
    /// The firmware has it switched off, or the processor is too old for it.
    SwitchedOff(Option<Maker>),
    /// It belongs to others: to this group, where a group may use it.
    Forbidden(Option<String>),
    /// None of these; the system's words.
    Otherwise(String),
}

/// Whose virtualisation a processor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Maker {
    /// VT-x.
    Intel,
    /// AMD-V.
    Amd,
}

impl Maker {
    fn module(self) -> &'static str {
        match self {
            Self::Intel => "kvm_intel",
            Self::Amd => "kvm_amd",
        }
    }

    fn feature(self) -> &'static str {
        match self {
            Self::Intel => "Intel VT-x",
            Self::Amd => "AMD-V (SVM)",
        }
    }
}

/// What the kernel says of the first processor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Cpu {
    /// Whose virtualisation can be used.
    usable: Option<Maker>,
    /// Who made it.
    maker: Option<Maker>,
    /// Whether it is a virtual machine's.
    is_virtual: bool,
}

impl Cpu {
    fn from_text(cpuinfo: &str) -> Self {
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name));
            line.and_then(|line| line.split_once(':')).map_or("", |(_, value)| value.trim())
        };
        let has = |flag: &str| field("flags").split(' ').any(|each| each == flag);
        let usable = match (has("vmx"), has("svm")) {
            (true, _) => Some(Maker::Intel),
            (_, true) => Some(Maker::Amd),
            _ => None,
        };
        let maker = match field("vendor_id") {
            "GenuineIntel" => Some(Maker::Intel),
            "AuthenticAMD" | "HygonGenuine" => Some(Maker::Amd),
            _ => None,
        };
        Self { usable, maker, is_virtual: has("hypervisor") }
    }
}

impl Closed {
    fn because(error: &io::Error, cpu: Cpu, is_loaded: &dyn Fn(Maker) -> bool, owner: fn() -> Option<String>) -> Self {
        match error.raw_os_error().map(Errno::from_raw) {
            // A device that is there without a driver gives the latter two.
            Some(Errno::ENOENT | Errno::ENXIO | Errno::ENODEV) => match (cpu.usable, cpu.is_virtual) {
                (Some(maker), _) if is_loaded(maker) => Self::NotInContainer,
                (Some(maker), _) => Self::NoModule(maker),
                (None, true) => Self::NotNested,
                (None, false) => Self::SwitchedOff(cpu.maker),
            },
            Some(Errno::EACCES) => Self::Forbidden(owner()),
            // Only a container's rules for devices refuse it like this.
            Some(Errno::EPERM) => Self::NotInContainer,
            _ => Self::Otherwise(error.to_string()),
        }
    }

    /// A sentence.
    pub fn why(&self) -> String {
        match self {
            Self::NoModule(maker) => format!("the kernel module {} is not loaded", maker.module()),
            Self::NotInContainer => format!("this container may not use {DEVICE}"),
            Self::NotNested => "this virtual machine has no nested virtualisation".into(),
            Self::SwitchedOff(maker) => {
                let feature = maker.map_or("virtualisation", Maker::feature);
                format!("the processor offers no {feature}")
            }
            Self::Forbidden(_) => format!("this user may not open {DEVICE}"),
            Self::Otherwise(why) => format!("{DEVICE} cannot be opened: {why}"),
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::NoModule(maker) => {
                let module = maker.module();
                format!("run `sudo modprobe {module}`; where that fails, `sudo dmesg | grep -i kvm` says why")
            }
            Self::NotInContainer => {
                format!("give the container the device: `docker run --device {DEVICE}`, `podman run --device {DEVICE}`")
            }
            Self::NotNested => "switch it on in the machine around this one: CPU type `host` (Proxmox, libvirt) with \
                                nested=1 for its kvm module; --enable-nested-virtualization (Google Cloud); a size that \
                                has it (Azure: Dv3 and later); a metal instance (AWS)"
                .into(),
            Self::SwitchedOff(maker) => {
                let feature = maker.map_or("VT-x or AMD-V", Maker::feature);
                format!("switch {feature} on in the firmware's (BIOS, UEFI) settings of the processor")
            }
            Self::Forbidden(Some(group)) => {
                format!("run `sudo usermod -aG {group} $USER`, log in again and run `heyvm daemon restart`")
            }
            Self::Forbidden(None) => format!(
                "no group may use it: run `sudo chgrp kvm {DEVICE} && sudo chmod 660 {DEVICE}` and `sudo usermod -aG kvm \
                 $USER`, log in again and run `heyvm daemon restart`"
            ),
            Self::Otherwise(_) => "`sudo dmesg | grep -i kvm` may say why".into(),
        }
    }
}

fn is_loaded(maker: Maker) -> bool {
    Path::new("/sys/module").join(maker.module()).exists()
}

/// The group that may use the device, where one besides root's may.
fn owner() -> Option<String> {
    let meta = fs::metadata(DEVICE).ok()?;
    let may_use = meta.permissions().mode() & GROUP_MAY_USE == GROUP_MAY_USE && meta.gid() != 0;
    let group = Group::from_gid(Gid::from_raw(meta.gid())).ok().flatten();
    group.filter(|_| may_use).map(|group| group.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTEL: &str = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu vmx sse\nvmx flags\t: vnmi\n";
    const AMD: &str = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu svm sse hypervisor\n";
    const GUEST: &str = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu sse hypervisor\n";
    const SWITCHED_OFF: &str = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu sse svm_lock\n";

    #[test]
    fn hint_fits_the_cause() {
        for (error, cpuinfo, loaded, cause, hint) in [
            (Errno::ENOENT, INTEL, false, Closed::NoModule(Maker::Intel), "modprobe kvm_intel"),
            (Errno::ENODEV, AMD, false, Closed::NoModule(Maker::Amd), "modprobe kvm_amd"),
            (Errno::ENOENT, INTEL, true, Closed::NotInContainer, "--device /dev/kvm"),
            (Errno::EPERM, INTEL, true, Closed::NotInContainer, "--device /dev/kvm"),
            (Errno::ENOENT, GUEST, false, Closed::NotNested, "Google Cloud"),
            (Errno::ENOENT, SWITCHED_OFF, false, Closed::SwitchedOff(Some(Maker::Amd)), "AMD-V"),
            (Errno::ENOENT, "", false, Closed::SwitchedOff(None), "firmware"),
            (Errno::EACCES, INTEL, true, Closed::Forbidden(Some("virt".into())), "usermod -aG virt"),
            (Errno::EBUSY, INTEL, true, Closed::Otherwise("Device or resource busy (os error 16)".into()), "dmesg"),
        ] {
            let closed =
                Closed::because(&error.into(), Cpu::from_text(cpuinfo), &|_| loaded, || Some("virt".to_owned()));
            assert_eq!(closed, cause);
            assert!(closed.hint().contains(hint) && !closed.why().is_empty(), "{closed:?}: {}", closed.hint());
        }
    }

    #[test]
    fn group_that_may_not_use_the_device_is_not_joined() {
        let closed = Closed::because(&Errno::EACCES.into(), Cpu::default(), &|_| true, || None);
        assert!(closed == Closed::Forbidden(None) && closed.hint().contains("chmod 660"), "{closed:?}");
    }
}
