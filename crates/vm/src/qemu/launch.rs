//! Starting one confined QEMU: opens everything it will touch and hands it to the jail.
#![expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::{ffi::OsStrExt, net::UnixListener},
    },
    path::{Path, PathBuf},
};

use heyvm_jail::{
    cgroup::{self, Cgroups, Limits},
    egress::{Egress, EgressSettings},
    launcher::{self, JailSpec},
    process::ProcessId,
    root::{self, QemuRoot},
};

use super::{
    accel::Acceleration,
    console,
    machine::{Machine, fd},
    memory,
    record::{Record, VmDir},
};
use crate::Error;

/// User ids of confined processes where the daemon is root; far from where systems put people and services. Versions
/// before 0.2 used those from 0x7000_0000 to 0x700f_ffff: VMs that they have started may still run.
const FIRST_UID: u32 = 0x7020_0000;
/// User id of the guest by which KVM is tried.
pub const TEST_GUEST_UID: u32 = FIRST_UID - 1;
/// User ids of one home: one per slot.
const UIDS: u32 = 1 << 16;
/// Homes that share no user id, as far as their paths' hashes differ.
const HOMES: u32 = 1 << 10;
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
    /// The user ids of its VMs.
    pub uids: Uids,
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
        cpu_millis: launch.record.cpu_millis,
        tasks: THREADS + machine.processors,
    };
    let cgroups = &launch.record.cgroups;
    host.cgroups.create(cgroups, limits)?;
    let spec = JailSpec {
        root: host.root.dir.clone(),
        argv: machine.argv(&host.root),
        uid: host.uids.of(launch.record.slot)?,
        descriptors: launch.descriptors.all.iter().map(|(number, _)| *number).collect(),
        cgroups: cgroups.clone(),
        devices: if machine.acceleration == Acceleration::Kvm { vec!["/dev/kvm".into()] } else { Vec::new() },
        id_file: launch.dir.id_file(),
    };
    let descriptors: Vec<_> = launch.descriptors.all.iter().map(|(_, descriptor)| descriptor.as_fd()).collect();
    let process = launcher::spawn(&host.launcher, &spec, &descriptors).inspect_err(|_| {
        if let Err(error) = cgroup::remove(cgroups) {
            tracing::warn!(%error, "the cgroups of a VM that was not started are left");
        }
    })?;
    Ok(Launched { process, log })
}

/// Finds out what all VMs of the home will share.
pub fn host(home: &Path, launcher: PathBuf) -> Result<Host, Error> {
    let root = root::prepare(&home.join("jail"))?;
    Ok(Host { launcher, root, uids: Uids::new(home), cgroups: Cgroups::detect() })
}

/// The way out of all VMs of the home: the one that is there, else a new one.
pub fn way_out(home: &Path, launcher: &Path, settings: &EgressSettings) -> Result<Egress, Error> {
    let run = home.join("run");
    std::fs::create_dir_all(&run).map_err(Error::io("making", &run))?;
    Ok(Egress::ensure(&run, launcher, settings)?)
}

/// Ends a QEMU at once; it is gone when this returns.
pub fn end(process: ProcessId, dir: &VmDir) -> Result<(), Error> {
    process.kill().map_err(Error::io("ending QEMU in", dir.path()))
}

/// Network device of a slot, where there is a network.
pub fn tap(egress: Option<&Egress>, slot: u32) -> Result<Option<OwnedFd>, Error> {
    Ok(egress.map(|egress| egress.tap(slot)).transpose()?)
}

/// The user ids of one home's VMs: no two that run have the same, as no two have the same slot.
#[derive(Debug, Clone, Copy)]
pub struct Uids {
    first: u32,
}

impl Uids {
    /// Those of the home at `path`.
    pub fn new(path: &Path) -> Self {
        let bytes = path.as_os_str().as_bytes();
        let hash = bytes.iter().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
        Self { first: FIRST_UID + hash % HOMES * UIDS }
    }

    /// The one of the VM in a slot.
    pub fn of(self, slot: u32) -> Result<u32, Error> {
        match slot < UIDS {
            true => Ok(self.first + slot),
            false => Err(Error::OutOfResources { what: "user ids for VMs".into() }),
        }
    }
}

/// A listening socket whose path may be longer than an address holds.
pub fn listen(path: &Path) -> Result<UnixListener, Error> {
    let bound = || -> io::Result<UnixListener> {
        // What is left there makes binding fail.
        std::fs::remove_file(path).ok();
        let dir = File::open(path.parent().unwrap_or(Path::new("/")))?;
        let name = path.file_name().unwrap_or_default();
        UnixListener::bind(Path::new(&format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name))
    };
    bound().map_err(Error::io("making the socket", path))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_two_slots_share_a_uid_nor_one_that_earlier_versions_gave() {
        for home in ["/root/.heyo", "/home/ada/.heyo", "/"] {
            let uids = Uids::new(Path::new(home));
            let all: HashSet<u32> = (0..UIDS).map(|slot| uids.of(slot).unwrap()).collect();
            assert_eq!(all.len(), UIDS as usize);
            assert!(all.iter().all(|uid| *uid > 0x700f_ffff && *uid != TEST_GUEST_UID && *uid < 0x7fff_ffff));
            assert!(uids.of(UIDS).is_err());
        }
    }
}
