//! A cgroup of its own for every command: it ends all that the command began, whatever session or group that went to.
//!
//! ```text
//! spare ──take──▶ Cgroup ──drop──▶ removed, or remembered until what still runs in it has ended
//!                   └──kill──▶ everything in it ends at once
//! ```
//! The guest's root may rename nothing here but may make and fill directories: names are tried until one is free.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, openat},
    sys::stat::{Mode, mkdirat},
    unistd::{UnlinkatFlags, unlinkat},
};

/// Names that are tried for one cgroup.
const TRIES: u64 = 16;
/// Cgroups with processes in them that are looked at again whenever another one is dropped.
const LOOKS: usize = 8;

/// The cgroups below one that holds the whole sandbox.
pub struct Cgroups {
    parent: OwnedFd,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    made: u64,
    /// Made ahead, so that a command need not wait for it.
    spare: Option<(String, OwnedFd)>,
    /// Left behind by commands that have ended, with processes that go on.
    occupied: VecDeque<String>,
}

/// The cgroup of one command.
pub struct Cgroup {
    name: String,
    dir: OwnedFd,
    all: Arc<Cgroups>,
}

impl Cgroups {
    /// Cgroups below the one whose directory is `parent`.
    pub fn below(parent: OwnedFd) -> Arc<Self> {
        Arc::new(Self { parent, state: Mutex::default() })
    }

    /// The cgroup that all are below.
    pub fn parent(&self) -> BorrowedFd<'_> {
        self.parent.as_fd()
    }

    /// An empty cgroup.
    pub fn take(self: &Arc<Self>) -> io::Result<Cgroup> {
        let mut state = self.lock();
        let (name, dir) = match state.spare.take() {
            Some(spare) => spare,
            None => self.make(&mut state)?,
        };
        Ok(Cgroup { name, dir, all: Arc::clone(self) })
    }

    fn make(&self, state: &mut State) -> io::Result<(String, OwnedFd)> {
        for _ in 0..TRIES {
            state.made += 1;
            let name = format!("exec-{}", state.made);
            match mkdirat(&self.parent, name.as_str(), Mode::from_bits_truncate(0o755)) {
                Err(Errno::EEXIST) => {}
                made => {
                    made?;
                    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                    let dir = openat(&self.parent, name.as_str(), flags, Mode::empty())?;
                    return Ok((name, dir));
                }
            }
        }
        Err(Errno::EEXIST.into())
    }

    /// Removes a cgroup, or remembers it while something runs in it; looks at earlier ones, and makes a spare one.
    fn give_back(&self, name: String) {
        let mut state = self.lock();
        state.occupied.push_back(name);
        for _ in 0..state.occupied.len().min(LOOKS) {
            let Some(name) = state.occupied.pop_front() else { break };
            if let Err(Errno::EBUSY | Errno::ENOTEMPTY) =
                unlinkat(&self.parent, name.as_str(), UnlinkatFlags::RemoveDir)
            {
                state.occupied.push_back(name);
            }
        }
        if state.spare.is_none() {
            // The next command makes its own, or says why it cannot.
            state.spare = self.make(&mut state).ok();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cgroup {
    /// Its directory, to start a process in it.
    pub fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Kills everything in it and below it at once. Kernels before 5.14 cannot.
    pub fn kill(&self) -> io::Result<()> {
        let file = openat(&self.dir, "cgroup.kill", OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        File::from(file).write_all(b"1")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.all.give_back(std::mem::take(&mut self.name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_a_directory() -> (tempfile::TempDir, Arc<Cgroups>) {
        let dir = tempfile::tempdir().unwrap();
        let parent = File::open(dir.path()).unwrap();
        (dir, Cgroups::below(parent.into()))
    }

    fn names(dir: &tempfile::TempDir) -> Vec<String> {
        let entries = std::fs::read_dir(dir.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn cgroup_is_removed_and_the_next_one_is_made_ahead() {
        let (dir, all) = in_a_directory();
        let first = all.take().unwrap();
        assert_eq!(names(&dir), ["exec-1"]);
        drop(first);
        assert_eq!(names(&dir), ["exec-2"]);
        assert_eq!(all.take().unwrap().name, "exec-2");
    }

    #[test]
    fn occupied_cgroup_is_removed_once_it_is_empty() {
        let (dir, all) = in_a_directory();
        let first = all.take().unwrap();
        // A plain directory with something in it is refused as a cgroup with processes is.
        std::fs::write(dir.path().join("exec-1/process"), "").unwrap();
        drop(first);
        assert!(names(&dir).contains(&"exec-1".to_owned()));
        std::fs::remove_file(dir.path().join("exec-1/process")).unwrap();
        drop(all.take().unwrap());
        assert_eq!(names(&dir), ["exec-3"]);
    }

    #[test]
    fn names_that_the_guest_took_are_passed_over() {
        let (dir, all) = in_a_directory();
        std::fs::create_dir(dir.path().join("exec-1")).unwrap();
        assert_eq!(all.take().unwrap().name, "exec-2");
    }
}
