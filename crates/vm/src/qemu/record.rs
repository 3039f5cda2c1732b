//! What stands in a VM's directory, `sandboxes/<id>/`: enough for a later daemon to find, judge and remove it.
//! Synchronous: it waits for the disk.
#![expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, RwLock},
    time::Duration,
};

use heyvm_jail::{
    cgroup::{self, Cgroups},
    process::{ProcessId, host_boot_id},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::disk;
use crate::{Error, Exit, ExitCause, Remains, VmId};

/// What the control plane keeps beside the disk.
const NOTE: &str = "sandbox.json";
/// A VM's directory is written to for a moment after its process has ended.
const REMOVE_TRIES: u32 = 50;
const REMOVE_PAUSE: Duration = Duration::from_millis(10);

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
    /// Name of its cgroups, which it keeps when it leaves the warm pool.
    pub cgroup: String,
    /// Their directories, for a later daemon may run elsewhere in the hierarchy and would look for them there.
    #[serde(default)]
    pub cgroups: Vec<PathBuf>,
    /// Thousandths of a processor that it may use once it is live; 0 where an earlier version has set that already.
    #[serde(default)]
    pub cpu_millis: u32,
}

impl Record {
    /// Of a VM of this name that starts now.
    pub fn new(slot: u32, name: &str, cgroups: &Cgroups, cpu_millis: u32) -> Result<Self, Error> {
        let (host_boot_id, cgroups) = (this_boot()?, cgroups.dirs(name));
        Ok(Self { slot, host_boot_id, cgroup: name.to_owned(), cgroups, cpu_millis })
    }

    /// Whether the host has not been restarted since QEMU was started. A process is known by its number and when it began,
    /// counted from the host's start: of another start it is none.
    pub fn is_of_this_boot(&self) -> Result<bool, Error> {
        Ok(self.host_boot_id == this_boot()?)
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

    /// Ids of the directories below `parent`.
    pub fn list(parent: &Path) -> Result<Vec<VmId>, Error> {
        let entries = fs::read_dir(parent).map_err(Error::io("listing", parent))?;
        let ids = entries.filter_map(|entry| {
            let entry = entry.ok().filter(|entry| entry.path().is_dir())?;
            entry.file_name().into_string().ok().filter(|name| !name.starts_with('.'))
        });
        Ok(ids.collect())
    }

    /// Removes the directory, also while the word of its end is being written there.
    pub fn remove(&self) -> Result<(), Error> {
        let mut tries = 0;
        loop {
            let Err(error) = heyvm_trees::remove(&self.path) else { return Ok(()) };
            match error.io_kind() {
                Some(io::ErrorKind::NotFound) => return Ok(()),
                Some(io::ErrorKind::DirectoryNotEmpty) if tries < REMOVE_TRIES => {
                    tries += 1;
                    std::thread::sleep(REMOVE_PAUSE);
                }
                _ => return Err(Error::io("removing", &self.path)(error.into())),
            }
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

    /// The process, if it was ever started; an error when that cannot be read now.
    pub fn process(&self) -> Result<Option<ProcessId>, Error> {
        // The launcher writes the file before it lets the process go: one without an id has started nothing.
        Ok(read_if_there(&self.id_file())?.and_then(|text| std::str::from_utf8(&text).ok()?.parse().ok()))
    }

    /// The process, if it still runs.
    pub fn living_process(&self) -> Result<Option<ProcessId>, Error> {
        let Some(process) = self.process()? else { return Ok(None) };
        let alive = process.look().map_err(Error::io("looking at the process in", &self.path))?;
        Ok(Some(process).filter(|_| alive))
    }

    /// What was written at its last start; an error when that cannot be read now.
    pub fn record(&self) -> Result<Option<Record>, Error> {
        let path = self.path.join("vm.json");
        let record = read_if_there(&path)?.map(|bytes| serde_json::from_slice(&bytes).map_err(io::Error::from));
        record.transpose().map_err(Error::io("reading", path))
    }

    /// Writes what the next daemon must know.
    pub fn write_record(&self, record: &Record) -> Result<(), Error> {
        for file in [self.id_file(), self.path.join("exit.json")] {
            match fs::remove_file(&file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io("removing", file)(error));
                }
                _ => {}
            }
        }
        write(&self.path.join("vm.json"), record)
    }

    /// Ends its QEMU, if one runs, and removes its cgroups. Blocks until they are gone.
    pub fn put_down(&self) -> Result<(), Error> {
        if let Some(process) = self.process()? {
            process.kill().map_err(Error::io("ending QEMU in", &self.path))?;
        }
        // A damaged record keeps nothing from being ended: at most an empty cgroup stays.
        if let Ok(Some(record)) = self.record() {
            cgroup::remove(&record.cgroups)?;
        }
        Ok(())
    }

    /// Keeps the control plane's note, whole or not at all; nothing where the directory is gone.
    pub fn write_note(&self, note: &[u8]) -> Result<(), Error> {
        if !self.path.is_dir() {
            return Ok(());
        }
        write_bytes(&self.path.join(NOTE), note)
    }

    /// What is there; `None` where the directory is gone.
    pub fn remains(&self) -> Result<Option<Remains>, Error> {
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            entries => entries.map_err(Error::io("reading", &self.path))?,
        };
        let sizes = entries.filter_map(|entry| match entry.and_then(|entry| entry.metadata()) {
            // What is renamed meanwhile counts under its new name, or not.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            meta => Some(meta.map(|meta| meta.blocks() * 512)),
        });
        let size_bytes = sizes.sum::<io::Result<u64>>().map_err(Error::io("reading", &self.path))?;
        let about = |path: &Path| fs::metadata(path).map_err(Error::io("looking at", path));
        let disk = self.disk();
        let (disk_bytes, meta) = match disk.exists() {
            true => about(&disk).map(|meta| (meta.len(), meta))?,
            false => (0, about(&self.path)?),
        };
        Ok(Some(Remains {
            running: self.living_process()?.is_some(),
            size_bytes,
            disk_gib: u32::try_from(disk_bytes.div_ceil(disk::GIB)).unwrap_or(u32::MAX),
            changed_at: meta.modified().map_err(Error::io("looking at", &disk))?,
            note: read_if_there(&self.path.join(NOTE))?,
        }))
    }

    /// How it ended: as was seen, else as can be told from what is there, once.
    pub fn post_mortem(&self) -> Exit {
        if let Some(exit) = self.exit() {
            return exit;
        }
        let Ok(Some(record)) = self.record() else { return Exit::lost() };
        let cause = if record.is_of_this_boot().is_ok_and(|is_of_this_boot| !is_of_this_boot) {
            ExitCause::HostRestarted
        } else if cgroup::ran_out_of_memory(&record.cgroups) {
            ExitCause::OutOfMemory
        } else {
            ExitCause::Lost
        };
        let exit = Exit { cause, ..Exit::lost() };
        // Judged once: the next end is not to be told from what is counted there.
        if self.write_exit(&exit).is_ok()
            && let Err(error) = cgroup::remove(&record.cgroups)
        {
            tracing::warn!(%error, "the cgroups of a VM that has ended are left");
        }
        exit
    }

    /// Gives its cgroups back at its end and remembers how it ended, as far as its directory is still there.
    pub fn note_end(&self, record: &Record, mut exit: Exit) -> Exit {
        if exit.cause == ExitCause::Lost && cgroup::ran_out_of_memory(&record.cgroups) {
            exit.cause = ExitCause::OutOfMemory;
        }
        if let Err(error) = cgroup::remove(&record.cgroups) {
            tracing::warn!(%error, "the cgroups of a VM that has ended are left");
        }
        if let Err(error) = self.write_exit(&exit)
            && self.path.is_dir()
        {
            tracing::warn!(%error, "how a VM ended could not be written down");
        }
        exit
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

fn this_boot() -> Result<String, Error> {
    host_boot_id().map_err(Error::io("reading", "/proc/sys/kernel/random/boot_id"))
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some).map_err(Error::io("reading", path)),
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Whole or not at all.
pub(super) fn write<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let bytes = serde_json::to_vec(value).map_err(io::Error::from).map_err(Error::io("writing", path))?;
    write_bytes(path, &bytes)
}

fn write_bytes(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let half = path.with_extension("half");
    let written = || -> io::Result<()> {
        let mut file = fs::File::options().create(true).write(true).truncate(true).mode(0o600).open(&half)?;
        file.write_all(bytes)?;
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
        let record = Record {
            slot: 7,
            host_boot_id: "b".into(),
            cgroup: "c".into(),
            cgroups: vec!["/cg/c".into()],
            cpu_millis: 250,
        };
        dir.write_record(&record).unwrap();
        assert_eq!((dir.record().unwrap(), dir.exit()), (Some(record), None));
    }

    #[test]
    fn what_cannot_be_read_now_is_not_taken_for_gone() {
        let parent = tempfile::tempdir().unwrap();
        let dir = VmDir::new(parent.path(), &"a".to_owned());
        assert_eq!((dir.record().unwrap(), dir.process().unwrap()), (None, None));
        dir.make(false).unwrap();
        assert_eq!((dir.record().unwrap(), dir.living_process().unwrap()), (None, None));
        // A directory where a file should be fails as a failing disk does, for root, too.
        fs::create_dir(dir.id_file()).unwrap();
        fs::create_dir(dir.path().join("vm.json")).unwrap();
        assert!(dir.process().is_err() && dir.living_process().is_err() && dir.record().is_err());
    }
}
