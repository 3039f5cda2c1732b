//! What stands in a VM's directory, `sandboxes/<id>/`: enough for a later daemon to find, judge and remove it.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, RwLock},
};

use heyvm_jail::{
    cgroup::{self, Cgroups},
    process::{ProcessId, host_boot_id},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{Error, Exit, VmId};

/// Paths of one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmDir {
    path: PathBuf,
}

/// Written before QEMU is started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Slot of the network addresses.
    pub slot: u32,
    /// The host's boot in which QEMU was started.
    pub host_boot_id: String,
    /// Name of its cgroups, from which its user id is made, too; it keeps both when a VM from the reserve becomes a
    /// sandbox's.
    pub cgroup: String,
    /// Their directories, for a later daemon may run elsewhere in the hierarchy and would look for them there.
    #[serde(default)]
    pub cgroups: Vec<PathBuf>,
}

impl Record {
    /// Of a VM of this name that starts now.
    pub fn new(slot: u32, name: &str, cgroups: &Cgroups) -> Self {
        Self { slot, host_boot_id: host_boot_id(), cgroup: name.to_owned(), cgroups: cgroups.dirs(name) }
    }
}

/// A VM's directory, which is another one once a VM from the reserve has become a sandbox's.
#[derive(Debug, Clone)]
pub struct Place(Arc<RwLock<VmDir>>);

impl Place {
    /// Begins at `dir`.
    pub fn new(dir: VmDir) -> Self {
        Self(Arc::new(RwLock::new(dir)))
    }

    /// Where it is now.
    pub fn dir(&self) -> VmDir {
        self.0.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    /// Moves everything to `to`, which must not exist. Open sockets and disks move along.
    pub fn move_to(&self, to: VmDir) -> Result<(), Error> {
        let mut dir = self.0.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        // RENAME_NOREPLACE is not needed: a directory replaces an empty one alone, and `make` of an id comes first.
        fs::rename(dir.path(), to.path()).map_err(Error::io("moving the VM's directory", to.path()))?;
        *dir = to;
        Ok(())
    }
}

impl VmDir {
    /// The directory of `id` below `parent`; nothing is made.
    pub fn new(parent: &Path, id: &VmId) -> Self {
        Self { path: parent.join(id) }
    }

    /// Makes the directory; an existing one is an error unless `existing`.
    pub fn make(&self, existing: bool) -> Result<(), Error> {
        match fs::DirBuilder::new().mode(0o700).create(&self.path) {
            Err(error) if existing && error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made.map_err(Error::io("making the VM's directory", &self.path)),
        }
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its disk.
    pub fn disk(&self) -> PathBuf {
        self.path.join("disk.ext4")
    }

    /// Socket of the control protocol.
    pub fn qmp_socket(&self) -> PathBuf {
        self.path.join("qmp.sock")
    }

    /// The copy of the disk that was kept.
    pub fn checkpoint(&self) -> PathBuf {
        self.path.join("checkpoint.ext4")
    }

    /// A copy that is not whole yet.
    pub fn half_checkpoint(&self) -> PathBuf {
        self.path.join("checkpoint.half")
    }

    /// Socket for calls to the agent.
    pub fn agent_socket(&self) -> PathBuf {
        self.path.join("agent.sock")
    }

    /// Socket for connections to programs.
    pub fn ports_socket(&self) -> PathBuf {
        self.path.join("ports.sock")
    }

    /// File with QEMU's process id and start time.
    pub fn id_file(&self) -> PathBuf {
        self.path.join("qemu.pid")
    }

    /// The process, if it was ever started.
    pub fn process(&self) -> Option<ProcessId> {
        fs::read_to_string(self.id_file()).ok()?.parse().ok()
    }

    /// What was written at its last start.
    pub fn record(&self) -> Option<Record> {
        read(&self.path.join("vm.json"))
    }

    /// Writes what the next daemon must know.
    pub fn write_record(&self, record: &Record) -> Result<(), Error> {
        let _ = fs::remove_file(self.id_file());
        let _ = fs::remove_file(self.path.join("exit.json"));
        write(&self.path.join("vm.json"), record)
    }

    /// Ends its QEMU, if one runs, and removes its cgroups. Blocks until they are gone.
    pub fn put_down(&self) -> Result<(), Error> {
        if let Some(process) = self.process() {
            process.kill().map_err(Error::io("ending QEMU in", &self.path))?;
        }
        if let Some(record) = self.record() {
            cgroup::remove(&record.cgroups)?;
        }
        Ok(())
    }

    /// How it ended, if that was seen.
    pub fn exit(&self) -> Option<Exit> {
        read(&self.path.join("exit.json"))
    }

    /// Remembers how it ended.
    pub fn write_exit(&self, exit: &Exit) -> Result<(), Error> {
        write(&self.path.join("exit.json"), exit)
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Whole or not at all.
pub(super) fn write<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let half = path.with_extension("half");
    let written = || -> io::Result<()> {
        let mut file = fs::File::options().create(true).write(true).truncate(true).mode(0o600).open(&half)?;
        file.write_all(&serde_json::to_vec(value)?)?;
        fs::rename(&half, path)
    };
    written().map_err(Error::io("writing", path))
}

/// Hands out network slots; two living VMs of one daemon never share one. Who has a slot is known by its cgroups' name:
/// a VM that has ended names its slot still, which may be another's by then.
#[derive(Debug, Default)]
pub struct Slots {
    taken: Mutex<BTreeMap<u32, String>>,
}

impl Slots {
    /// Takes the lowest free slot.
    pub fn take(&self, owner: &str) -> u32 {
        let mut taken = self.lock();
        let slot = (0..).find(|slot| !taken.contains_key(slot)).unwrap_or_default();
        taken.insert(slot, owner.to_owned());
        slot
    }

    /// Marks a slot that a running VM has.
    pub fn mark(&self, slot: u32, owner: &str) {
        self.lock().insert(slot, owner.to_owned());
    }

    /// Gives a slot back, if it is still the owner's.
    pub fn give_back(&self, slot: u32, owner: &str) {
        let mut taken = self.lock();
        if taken.get(&slot).is_some_and(|now| now == owner) {
            taken.remove(&slot);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u32, String>> {
        self.taken.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ExitCause;

    #[test]
    fn slots_are_used_again() {
        let slots = Slots::default();
        slots.mark(1, "b");
        assert_eq!((slots.take("a"), slots.take("c")), (0, 2));
        slots.give_back(1, "b");
        assert_eq!(slots.take("d"), 1);
    }

    #[test]
    fn a_slot_that_has_become_anothers_is_not_given_back() {
        let slots = Slots::default();
        let slot = slots.take("stopped");
        slots.give_back(slot, "stopped");
        assert_eq!(slots.take("living"), slot);
        // The stopped one is removed: its record still names the slot.
        slots.give_back(slot, "stopped");
        assert_ne!(slots.take("next"), slot);
    }

    #[test]
    fn a_new_start_forgets_the_last_end() {
        let parent = tempfile::tempdir().unwrap();
        let dir = VmDir::new(parent.path(), &"a".to_owned());
        dir.make(false).unwrap();
        assert!(dir.make(false).is_err());
        let exit = Exit { cause: ExitCause::GuestPanic, console_tail: vec!["Kernel panic".into()] };
        dir.write_exit(&exit).unwrap();
        assert_eq!(dir.exit(), Some(exit));
        let record = Record { slot: 7, host_boot_id: "b".into(), cgroup: "c".into(), cgroups: vec!["/cg/c".into()] };
        dir.write_record(&record).unwrap();
        assert_eq!((dir.record(), dir.exit()), (Some(record), None));
    }
}
