//! Starting one confined QEMU: opens everything it will touch and hands it to the jail.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
};

use heyvm_jail::{
    cgroup::{self, Cgroups, Limits},
    egress::Egress,
    launcher::{self, JailSpec},
    process::ProcessId,
    root::QemuRoot,
};

use super::{
    accel::Acceleration,
    console,
    machine::{Machine, fd},
    memory,
    record::{Record, VmDir},
};
use crate::Error;

/// First user id of confined processes where the daemon is root; far from where systems put people and services.
const FIRST_UID: u32 = 0x7000_0000;
/// How many user ids are used.
const UIDS: u32 = 1 << 20;
/// A page of a template that nobody has written to yet takes memory twice when a clone does: once in the template's
/// memory, which is charged to the first who touches it, and once as the clone's own.
const CHARGED_PER_GUEST_PAGE: u64 = 2;
/// QEMU's own memory beside the guest's, in MiB: its heap and translated code.
const OVERHEAD_MIB: u64 = 256;
/// Threads of one QEMU beside its virtual processors: its pool for disks alone may have 64, and a QEMU that cannot have
/// a thread gives up.
const THREADS: u32 = 128;

/// What all VMs of a daemon share.
pub struct Host {
    /// The program that becomes QEMU: our own.
    pub launcher: PathBuf,
    /// QEMU's root directory.
    pub root: QemuRoot,
    /// Limits.
    pub cgroups: Cgroups,
}

/// Descriptors with the numbers they get.
#[derive(Default)]
pub struct Descriptors {
    all: Vec<(RawFd, OwnedFd)>,
}

impl Descriptors {
    /// Adds one under its number.
    pub fn add(&mut self, number: RawFd, descriptor: impl Into<OwnedFd>) {
        self.all.push((number, descriptor.into()));
    }
}

/// One QEMU to start.
pub struct Launch<'a> {
    /// Its directory, which must be there.
    pub dir: &'a VmDir,
    /// What stands in the directory from now on.
    pub record: Record,
    /// The machine.
    pub machine: Machine,
    /// Thousandths of a processor.
    pub cpu_millis: u32,
    /// Everything but the sockets, which are made here.
    pub descriptors: Descriptors,
}

/// A QEMU that was started.
pub struct Launched {
    /// Its process.
    pub process: ProcessId,
    log: File,
}

impl Launched {
    /// What QEMU itself said, which is little unless it failed.
    pub fn last_words(&self) -> Vec<String> {
        console::lines(&memory::read_log(&self.log))
    }
}

/// Starts QEMU. Blocks for some milliseconds. When it fails, nothing runs and no cgroup is left; files may be.
pub fn launch(host: &Host, mut launch: Launch<'_>) -> Result<Launched, Error> {
    let log = memory::create(0).map_err(Error::io("making a log in", launch.dir.path()))?;
    launch.descriptors.add(fd::LOG, log.try_clone().map_err(Error::io("passing a log to", launch.dir.path()))?);
    launch.dir.write_record(&launch.record)?;
    launch.descriptors.add(fd::QMP, listen(&launch.dir.qmp_socket())?);
    launch.descriptors.add(fd::AGENT, listen(&launch.dir.agent_socket())?);
    launch.descriptors.add(fd::PORTS, listen(&launch.dir.ports_socket())?);
    let machine = &launch.machine;
    let limits = Limits {
        memory_bytes: (u64::from(machine.memory_mib) * CHARGED_PER_GUEST_PAGE + OVERHEAD_MIB) << 20,
        cpu_millis: launch.cpu_millis,
        tasks: THREADS + machine.processors,
    };
    let cgroups = &launch.record.cgroups;
    host.cgroups.create(cgroups, limits)?;
    let spec = JailSpec {
        root: host.root.dir.clone(),
        argv: machine.argv(&host.root),
        uid: uid_for(&launch.record.cgroup),
        descriptors: launch.descriptors.all.iter().map(|(number, _)| *number).collect(),
        cgroups: cgroups.clone(),
        devices: if machine.acceleration == Acceleration::Kvm { vec!["/dev/kvm".into()] } else { Vec::new() },
        id_file: launch.dir.id_file(),
    };
    let descriptors: Vec<_> = launch.descriptors.all.iter().map(|(_, descriptor)| descriptor.as_fd()).collect();
    let process = launcher::spawn(&host.launcher, &spec, &descriptors).inspect_err(|_| {
        let _ = cgroup::remove(cgroups);
    })?;
    Ok(Launched { process, log })
}

/// Network device of a slot, where there is a network.
pub fn tap(egress: Option<&Egress>, slot: u32) -> Result<Option<OwnedFd>, Error> {
    Ok(egress.map(|egress| egress.tap(slot)).transpose()?)
}

/// A user id of the VM's own; two VMs share one about never, and then still nothing else.
fn uid_for(name: &str) -> u32 {
    let hash = name.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    FIRST_UID + hash % UIDS
}

/// A listening socket whose path may be longer than an address holds.
pub fn listen(path: &Path) -> Result<UnixListener, Error> {
    let bound = || -> io::Result<UnixListener> {
        let _ = std::fs::remove_file(path);
        let dir = File::open(path.parent().unwrap_or(Path::new("/")))?;
        let name = path.file_name().unwrap_or_default();
        UnixListener::bind(Path::new(&format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name))
    };
    bound().map_err(Error::io("making the socket", path))
}
