//! Directories for what is half-made. A process holds a lock on each of its own: what a killed one left is removed by the
//! next that makes one.
#![expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};

use crate::Error;

const PREFIX: &str = "half-";

/// Is removed, with all that is in it, when it goes out of scope: whoever writes into it must own it.
pub struct Work {
    /// Empty once it is removed.
    dir: PathBuf,
    held: Option<Flock<File>>,
}

impl Work {
    /// A new one in `parent`, which nobody but this user can enter.
    pub fn new_in(parent: &Path) -> Result<Self, Error> {
        let turn = parent.join("work.lock");
        let file = File::create(&turn).map_err(Error::io("making", &turn))?;
        // Nobody removes what is made already but not yet held.
        let _turn = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| Error::io("locking", turn)(errno.into()))?;
        sweep(parent);
        let dir = tempfile::Builder::new().prefix(PREFIX).tempdir_in(parent);
        let dir = dir.map_err(Error::io("making a directory in", parent))?;
        let file = File::open(dir.path()).map_err(Error::io("opening", dir.path()))?;
        let held = Flock::lock(file, FlockArg::LockExclusiveNonblock);
        let held = held.map_err(|(_, errno)| Error::io("locking", dir.path())(errno.into()))?;
        Ok(Self { dir: dir.keep(), held: Some(held) })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Does something in it; where that fails it is removed.
    pub fn fill<T>(self, work: impl FnOnce(&Path) -> Result<T, Error>) -> Result<(Self, T), Error> {
        match work(&self.dir) {
            Ok(done) => Ok((self, done)),
            Err(error) => {
                self.remove();
                Err(error)
            }
        }
    }

    /// It is gone when this returns.
    pub fn remove(mut self) {
        remove(&std::mem::take(&mut self.dir));
    }
}

/// Asynchronous code drops it where it is cut off: what is in it may be large, and is removed on a thread that may wait.
impl Drop for Work {
    fn drop(&mut self) {
        let (dir, held) = (std::mem::take(&mut self.dir), self.held.take());
        if dir.as_os_str().is_empty() {
            return;
        }
        let removing = move || {
            remove(&dir);
            drop(held);
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(removing)),
            Err(_) => removing(),
        }
    }
}

fn remove(dir: &Path) {
    if let Err(error) = heyvm_trees::remove(dir) {
        tracing::warn!(path = %dir.display(), %error, "what is half-made is left for the next to remove");
    }
}

/// Removes what nobody holds.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX))
            && let Ok(dir) = File::open(entry.path())
            && let Ok(_held) = Flock::lock(dir, FlockArg::LockExclusiveNonblock)
            && let Err(error) = heyvm_trees::remove(&entry.path())
        {
            tracing::warn!(path = %entry.path().display(), %error, "what a killed process left cannot be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_holds_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let left = parent.path().join("half-left");
        fs::create_dir_all(left.join("sub")).unwrap();
        fs::create_dir(parent.path().join("sha256-kept")).unwrap();
        let first = Work::new_in(parent.path()).unwrap();
        let second = Work::new_in(parent.path()).unwrap();
        assert!(!left.exists() && parent.path().join("sha256-kept").exists());
        assert!(first.path().exists() && second.path().exists());
        let path = first.path().to_owned();
        drop(first);
        assert!(!path.exists());
    }
}
