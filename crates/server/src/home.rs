//! The directory everything lives in: its permissions, the lock that one daemon holds, the socket it listens on.
#![expect(clippy::disallowed_methods, reason = "runs at the start, at the end, and on threads that may wait")]

use std::{
    fs::{self, DirBuilder, File, TryLockError},
    io::{self, Read, Seek, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tokio::net::UnixListener;

use crate::Error;

/// A log beyond this is turned over.
const MAX_LOG: u64 = 16 << 20;
const SOCKET: &str = "daemon.sock";
/// A daemon that was told to end has ended by then.
const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);

/// A home that this process alone is the daemon of. Dropping it gives the lock back.
#[derive(Debug)]
pub struct Home {
    path: PathBuf,
    directory: File,
    lock: File,
}

/// What a look at a home shows. Nothing but [`Presence::Removed`] may end a VM.
#[derive(Debug)]
pub enum Presence {
    /// It is there, and this process is its daemon.
    Ours,
    /// The directory itself was removed, with every VM's files: no one can find the VMs again.
    Removed,
    /// The directory was moved, or its lock was removed or replaced: another daemon may start there.
    Lost(&'static str),
    /// It cannot be looked at now.
    Unknown(io::Error),
}

impl Home {
    /// Makes the directories, takes the lock and writes our process id into it. A daemon that still holds the lock but
    /// does not listen any more is ending: it is waited for.
    pub fn open(path: PathBuf) -> Result<Self, Error> {
        Self::open_within(path, PATIENCE)
    }

    fn open_within(path: PathBuf, patience: Duration) -> Result<Self, Error> {
        for dir in [path.clone(), path.join("run")] {
            private_directory(&dir).map_err(Error::io(format!("making {}", dir.display())))?;
        }
        let directory = File::open(&path).map_err(Error::io(format!("opening {}", path.display())))?;
        let file = path.join("run/daemon.lock");
        let doing = || format!("locking {}", file.display());
        let mut lock = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(&file)
            .map_err(Error::io(doing()))?;
        let give_up = Instant::now() + patience;
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if Instant::now() < give_up && !somebody_listens(&path) => {
                    std::thread::sleep(POLL);
                }
                Err(TryLockError::WouldBlock) => {
                    let mut holder = String::new();
                    lock.read_to_string(&mut holder).ok();
                    return Err(Error::AlreadyRunning(holder.trim().to_owned()));
                }
                Err(TryLockError::Error(error)) => return Err(Error::io(doing())(error)),
            }
        }
        let write_id = |lock: &mut File| {
            lock.set_len(0)?;
            lock.rewind()?;
            writeln!(lock, "{}", std::process::id())
        };
        write_id(&mut lock).map_err(Error::io(doing()))?;
        Ok(Self { path, directory, lock })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Listens on the daemon's socket, which its owner alone may open. Whatever is there is stale: we hold the lock.
    pub fn listen(&self) -> io::Result<UnixListener> {
        let run = self.path.join("run");
        match fs::remove_file(run.join(SOCKET)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let (_dir, address) = address(&run)?;
        let listener = UnixListener::bind(&address)?;
        fs::set_permissions(&address, fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    }

    /// Removes the socket, unless it may be another daemon's.
    pub fn stop_listening(&self) {
        if !matches!(self.look(), Presence::Ours) {
            return;
        }
        if let Err(error) = fs::remove_file(self.path.join("run").join(SOCKET)) {
            tracing::debug!(%error, "the daemon's socket is left for the next one to replace");
        }
    }

    /// Whether the home is still there, and ours: it may have been removed, or another one put in its place.
    pub fn look(&self) -> Presence {
        self.try_to_look().unwrap_or_else(Presence::Unknown)
    }

    fn try_to_look(&self) -> io::Result<Presence> {
        let directory = self.directory.metadata()?;
        match is_at(&self.path, &directory)? {
            true => {}
            // A directory that was removed has no links any more; one that was moved has.
            false if directory.nlink() == 0 => return Ok(Presence::Removed),
            false => return Ok(Presence::Lost("the home was moved, or another one put in its place")),
        }
        match is_at(&self.path.join("run/daemon.lock"), &self.lock.metadata()?)? {
            true => Ok(Presence::Ours),
            false => Ok(Presence::Lost("run/daemon.lock was removed or replaced")),
        }
    }

    /// Looks whether it is still ours, and then turns its log over where that has grown too large.
    pub fn look_after(&self) -> Presence {
        let presence = self.look();
        if matches!(presence, Presence::Ours) {
            self.turn_log_over();
        }
        presence
    }

    /// Keeps the last part of a log that has grown too large beside it, and begins anew.
    fn turn_log_over(&self) {
        let log = self.path.join("daemon.log");
        let large = fs::metadata(&log).is_ok_and(|meta| meta.is_file() && meta.len() > MAX_LOG);
        // Our standard error has the file open, so it cannot be renamed.
        let turned = |_| File::options().write(true).open(&log).and_then(|file| file.set_len(0));
        if large && let Err(error) = fs::copy(&log, self.path.join("daemon.log.1")).and_then(turned) {
            tracing::warn!(%error, "the daemon's log has grown large and cannot be turned over");
        }
    }
}

/// Connects to the daemon's socket.
pub async fn connect(home: &Path) -> io::Result<tokio::net::UnixStream> {
    let (_dir, address) = address(&home.join("run"))?;
    tokio::net::UnixStream::connect(address).await
}

/// An address holds 107 bytes; through the directory's descriptor, while it is open, the path may be longer.
fn address(run: &Path) -> io::Result<(File, String)> {
    let dir = File::open(run)?;
    let address = format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd());
    Ok((dir, address))
}

/// Whether `path` leads to what `opened` is of; an error when that cannot be found out.
fn is_at(path: &Path, opened: &fs::Metadata) -> io::Result<bool> {
    match fs::metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (opened.dev(), opened.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn somebody_listens(home: &Path) -> bool {
    let dialled =
        address(&home.join("run")).and_then(|(_dir, address)| std::os::unix::net::UnixStream::connect(address));
    dialled.is_ok()
}

fn private_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    let meta = fs::metadata(path)?;
    if meta.permissions().mode() & 0o077 != 0 {
        fs::set_permissions(path, fs::Permissions::from_mode(0o700))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_daemon_per_home() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("h");
        let home = Home::open(path.clone()).unwrap();
        let refused = Home::open_within(path.clone(), Duration::ZERO).unwrap_err().to_string();
        assert!(refused.contains(&std::process::id().to_string()), "{refused}");
        assert!(matches!(home.look(), Presence::Ours));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        heyvm_trees::remove(&path).unwrap();
        assert!(matches!(home.look(), Presence::Removed), "{:?}", home.look());
        let successor = Home::open(path).unwrap();
        assert!(matches!((home.look(), successor.look()), (Presence::Removed, Presence::Ours)));
    }

    #[test]
    fn nothing_but_the_removal_of_the_home_itself_counts_as_that() {
        let dir = tempfile::tempdir().unwrap();
        let (path, moved) = (dir.path().join("h"), dir.path().join("moved"));
        let home = Home::open(path.clone()).unwrap();
        fs::rename(&path, &moved).unwrap();
        assert!(matches!(home.look(), Presence::Lost(_)), "{:?}", home.look());
        fs::create_dir(&path).unwrap();
        assert!(matches!(home.look(), Presence::Lost(_)), "{:?}", home.look());
        fs::remove_dir(&path).unwrap();
        fs::rename(&moved, &path).unwrap();
        assert!(matches!(home.look(), Presence::Ours));
        // A stat that fails as on a failing disk: the path's parent is no directory.
        fs::rename(path.join("run"), path.join("kept")).unwrap();
        fs::write(path.join("run"), "").unwrap();
        assert!(matches!(home.look(), Presence::Unknown(_)), "{:?}", home.look());
        fs::remove_file(path.join("run")).unwrap();
        fs::rename(path.join("kept"), path.join("run")).unwrap();
        fs::remove_file(path.join("run/daemon.lock")).unwrap();
        assert!(matches!(home.look(), Presence::Lost(_)), "{:?}", home.look());
    }

    #[tokio::test]
    async fn a_daemon_that_ends_is_waited_for_and_one_that_listens_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("h");
        let first = Home::open(path.clone()).unwrap();
        let listener = first.listen().unwrap();
        assert!(Home::open(path.clone()).is_err());
        drop(listener);
        let second = tokio::task::spawn_blocking(move || Home::open(path));
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!second.is_finished());
        drop(first);
        second.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn the_socket_may_have_a_long_path_and_is_its_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("long".repeat(50));
        let home = Home::open(path.clone()).unwrap();
        for _ in 0..2 {
            let listener = home.listen().unwrap();
            let (accepted, connected) = tokio::join!(listener.accept(), connect(&path));
            assert!(accepted.is_ok() && connected.is_ok());
            // A daemon that was killed leaves its socket behind; the next one listens all the same.
        }
        let mode = fs::metadata(path.join("run/daemon.sock")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        home.stop_listening();
        assert!(connect(&path).await.is_err());
    }

    #[test]
    fn a_large_log_is_turned_over() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::open(dir.path().to_owned()).unwrap();
        let log = dir.path().join("daemon.log");
        fs::write(&log, "small").unwrap();
        home.turn_log_over();
        assert_eq!(fs::read(&log).unwrap(), b"small");
        File::options().write(true).open(&log).unwrap().set_len(MAX_LOG + 1).unwrap();
        home.turn_log_over();
        assert_eq!(fs::metadata(&log).unwrap().len(), 0);
        assert_eq!(fs::metadata(dir.path().join("daemon.log.1")).unwrap().len(), MAX_LOG + 1);
    }
}
