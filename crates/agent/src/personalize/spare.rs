//! Room on the sandbox's disk that the sandbox itself cannot fill: it lies beside the upper layer, and is given up for
//! as long as a start needs it. Without it a disk that is full would never start again.
//!
//! ```text
//! mount the disk ──▶ give up, when the disk is nearly full ──▶ root, identity ──▶ take
//! ```

use std::{fs::File, io, os::fd::AsFd, path::Path};

use nix::{
    fcntl::{AtFlags, FallocateFlags, OFlag, fallocate, openat},
    sys::{
        stat::{Mode, fstatat, mkdirat},
        statvfs::{Statvfs, fstatvfs},
    },
};

use crate::console;

const DIR: &str = "spare";
/// Inodes are spare files: the overlay's work directory, a file of the identity and a few directories need some.
const FILES: usize = 8;
/// The file that has the bytes.
const LARGE: &str = "large";
const BYTES: i64 = 1 << 20;
/// A disk with less than this has too little for a start.
const ENOUGH_BYTES: u64 = 4 << 20;
const ENOUGH_INODES: u64 = 64;

/// Gives it up when the disk that is mounted at `top` is nearly full.
pub fn give_up_when_full(top: &Path) -> io::Result<()> {
    let disk = File::open(top)?;
    if has_room(&fstatvfs(&disk)?) {
        return Ok(());
    }
    console::say(format_args!("the disk is full"));
    match heyvm_trees::remove(&top.join(DIR)) {
        Err(error) if error.io_kind() != Some(io::ErrorKind::NotFound) => Err(error.into()),
        _ => Ok(()),
    }
}

fn has_room(stat: &Statvfs) -> bool {
    stat.blocks_available() * stat.fragment_size() >= ENOUGH_BYTES && stat.files_available() >= ENOUGH_INODES
}

/// Takes it, unless it is there: `disk` is the top of it.
pub fn take(disk: impl AsFd) -> io::Result<()> {
    match mkdirat(disk.as_fd(), DIR, Mode::S_IRWXU) {
        Err(nix::Error::EEXIST) => {}
        made => made?,
    }
    let dir = openat(disk.as_fd(), DIR, OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let has_bytes = |file: nix::sys::stat::FileStat| file.st_size >= BYTES;
    if fstatat(&dir, LARGE, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok_and(has_bytes) {
        return Ok(());
    }
    let make = |name: &str| {
        let flags = OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        openat(&dir, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)
    };
    for number in 1..FILES {
        make(&number.to_string())?;
    }
    // The last one says that all are there.
    fallocate(make(LARGE)?, FallocateFlags::empty(), 0, BYTES)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::MetadataExt};

    use super::*;

    #[test]
    fn room_is_taken_once_and_given_up_only_when_the_disk_is_full() {
        let dir = tempfile::tempdir().unwrap();
        // As a start that was cut short leaves it.
        fs::create_dir(dir.path().join("spare")).unwrap();
        for _ in 0..2 {
            take(File::open(dir.path()).unwrap()).unwrap();
        }
        assert_eq!(fs::metadata(dir.path().join("spare/large")).unwrap().size(), BYTES as u64);
        assert_eq!(fs::read_dir(dir.path().join("spare")).unwrap().count(), FILES);
        // The tests' own disk has room.
        give_up_when_full(dir.path()).unwrap();
        assert!(dir.path().join("spare/large").exists());
    }
}
