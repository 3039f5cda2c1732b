//! The files of templates: locks across daemons, what is on disk, and what goes. Synchronous: a template is large.
#![expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    time::SystemTime,
};

use heyvm_jail::process::ProcessId;
use nix::fcntl::{Flock, FlockArg};

use super::super::{record::VmDir, template::MAKING};
use crate::Error;

/// Bytes of memory of this host.
pub fn total_memory() -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    line.and_then(|rest| rest.split_ascii_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Removes what a daemon that was killed while it made a template has left, its QEMU first.
pub fn clean_up(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some((_, maker)) = name.split_once(MAKING) else { continue };
        // Another daemon may share this directory; its process id alone would not distinguish it from a later one.
        if maker.replace('-', " ").parse::<ProcessId>().is_ok_and(ProcessId::is_alive) {
            continue;
        }
        let left = VmDir::new(dir, &name);
        if let Err(error) = left.put_down().and_then(|()| left.remove()) {
            tracing::warn!(%error, name, "a half-made template of a daemon that was killed is left");
        }
    }
}

/// Waits until no other daemon works on this key.
pub fn lock(dir: &Path, key: &str) -> Result<Flock<File>, Error> {
    let path = dir.join(format!("{key}.lock"));
    fs::create_dir_all(dir).map_err(Error::io("making", dir))?;
    let file = File::create(&path).map_err(Error::io("making", &path))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| Error::io("locking", path)(errno.into()))
}

/// Whether there is a template.
pub fn exists(home: &Path) -> Result<bool, Error> {
    let state = home.join("state");
    state.try_exists().map_err(Error::io("looking for", &state))
}

/// The state goes first: without it there is no template.
pub fn remove(home: &Path) -> Result<(), Error> {
    let state = home.join("state");
    match fs::remove_file(&state) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::io("removing", state)(error)),
        _ => {}
    }
    match heyvm_trees::remove(home) {
        Err(error) if error.io_kind() != Some(io::ErrorKind::NotFound) => {
            Err(Error::io("removing", home)(error.into()))
        }
        _ => Ok(()),
    }
}

/// It is used now.
pub fn mark_used(home: &Path) -> std::io::Result<()> {
    File::open(home.join("state"))?.set_modified(SystemTime::now())
}

/// Removes the oldest, but for those in `kept` and those another daemon works on, until the rest fits.
pub fn evict(dir: &Path, kept: &[String], budget: u64) -> std::io::Result<()> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir)?.flatten() {
        let (name, home) = (entry.file_name().to_string_lossy().into_owned(), entry.path());
        let Ok(state) = fs::metadata(home.join("state")) else { continue };
        if name.contains(MAKING) {
            continue;
        }
        let memory = fs::metadata(home.join("memory")).map_or(0, |memory| memory.blocks());
        all.push((state.modified()?, (state.blocks() + memory) * 512, name, home));
    }
    all.sort();
    let mut total: u64 = all.iter().map(|(_, bytes, ..)| bytes).sum();
    for (_, bytes, name, home) in all {
        if total <= budget {
            break;
        }
        if kept.contains(&name) {
            continue;
        }
        let lock = File::create(dir.join(format!("{name}.lock")))?;
        let Ok(_across_daemons) = Flock::lock(lock, FlockArg::LockExclusiveNonblock) else { continue };
        match remove(&home) {
            Ok(()) => total = total.saturating_sub(bytes),
            Err(error) => tracing::warn!(%error, "a template could not be removed"),
        }
    }
    Ok(())
}
