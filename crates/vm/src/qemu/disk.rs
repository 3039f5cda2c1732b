//! Disks of sandboxes: sparse ext4 files, copied from an empty one of the same size that is made once.
#![expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]

use std::{
    fs::{self, File},
    io,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::memory::copy_sparse;
use crate::Error;

/// Bytes of a GiB.
pub const GIB: u64 = 1 << 30;
/// Size of the file systems' blocks.
const BLOCK: u64 = 4096;

/// What a disk may grow to, in GiB: more than anybody may ask for. ext4 keeps blocks for the descriptors of so large a file
/// system. Left to itself it keeps as many as one 1024 times as large would need, and all of them are part of the one
/// transaction in which a file system grows: from 10 GiB on, that is more than a journal of 16 MiB takes.
const LARGEST_GIB: u64 = 512;

// linux/fs.h: the two files share their blocks until one of them is written to.
nix::ioctl_write_int!(clone_blocks, 0x94, 9);

/// Makes `path` an empty file system of `gib`; `seeds` is where the empty ones are kept.
pub fn create(seeds: &Path, path: &Path, gib: u32) -> Result<(), Error> {
    let seed = seed(seeds, gib)?;
    let from = File::open(&seed).map_err(Error::io("opening the empty disk", &seed))?;
    let to = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(Error::io("making the disk", path))?;
    copy_sparse(&from, &to).map_err(Error::io("filling the disk", path))?;
    Ok(())
}

/// Opens it for a VM.
pub fn open(path: &Path) -> Result<File, Error> {
    File::options().read(true).write(true).open(path).map_err(Error::io("opening the disk", path))
}

/// Whether disks can be made here; an error says why not.
pub fn can_be_made() -> Result<(), Error> {
    let ran = Command::new("mkfs.ext4").arg("-V").stdin(Stdio::null()).output();
    ran.map(drop).map_err(Error::io("running", "mkfs.ext4"))
}

/// A disk is at least so large from now on; what is on it grows when it is mounted. Gives its size in bytes.
pub fn grow(path: &Path, gib: u32) -> Result<u64, Error> {
    let grown = || {
        let file = File::options().write(true).open(path)?;
        let bytes = file.metadata()?.len().max(u64::from(gib) * GIB);
        file.set_len(bytes)?;
        Ok(bytes)
    };
    grown().map_err(Error::io("growing the disk", path))
}

/// A file with the same content, on the disk when this returns. What was left half-made there before is gone.
pub fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    let source = File::open(from).map_err(Error::io("opening", from))?;
    match fs::remove_file(to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::io("removing", to)(error)),
        _ => {}
    }
    // Read, too: it becomes a disk.
    let target = File::options().read(true).write(true).create_new(true).mode(0o600).open(to);
    let target = target.map_err(Error::io("making", to))?;
    // SAFETY: both are descriptors that we hold; no memory is touched.
    let shared = unsafe { clone_blocks(target.as_raw_fd(), source.as_raw_fd() as u64) };
    if shared.is_err() {
        copy_sparse(&source, &target).map_err(Error::io("copying the disk to", to))?;
    }
    target.sync_all().map_err(Error::io("writing", to))
}

/// Puts the copy in `half` where it belongs; where it failed, or cannot be put there, nothing of it stays.
pub fn keep(copied: Result<(), Error>, half: &Path, at: &Path) -> Result<(), Error> {
    let kept = copied.and_then(|()| fs::rename(half, at).map_err(Error::io("keeping the copy of the disk", at)));
    if kept.is_err()
        && let Err(error) = fs::remove_file(half)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, path = %half.display(), "half a copy of a disk is left until the next one is made");
    }
    kept
}

fn seed(seeds: &Path, gib: u32) -> Result<PathBuf, Error> {
    // Those of another name are of versions whose disks did not grow.
    let path = seeds.join(format!("growing-{gib}g.ext4"));
    if path.exists() {
        return Ok(path);
    }
    fs::create_dir_all(seeds).map_err(Error::io("making", seeds))?;
    let half = seeds.join(format!(".growing-{gib}g-{}-{:?}", std::process::id(), std::thread::current().id()));
    let made =
        make_file_system(&half, gib).and_then(|()| fs::rename(&half, &path).map_err(Error::io("keeping", &path)));
    if made.is_err() {
        // The error that is told is the first one.
        fs::remove_file(&half).ok();
    }
    made.map(|()| path)
}

fn make_file_system(path: &Path, gib: u32) -> Result<(), Error> {
    let file = File::create(path).map_err(Error::io("making", path))?;
    file.set_len(u64::from(gib) * GIB).map_err(Error::io("sizing", path))?;
    // Everything that can be left for later is, so that the file stays small; no space is kept for root, who is the user.
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-m", "0", "-b", &BLOCK.to_string(), "-L", "heyvm", "-O", "^metadata_csum_seed,uninit_bg"])
        .args(["-E", &format!("lazy_itable_init=1,lazy_journal_init=1,nodiscard,resize={}", LARGEST_GIB * GIB / BLOCK)])
        .args(["-J", "size=16"])
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::HostNotReady {
                what: "mkfs.ext4 is not installed".into(),
                hint: "install the package e2fsprogs".into(),
            },
            _ => Error::io("running mkfs.ext4 on", path)(error),
        })?;
    if output.status.success() {
        return Ok(());
    }
    let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Error::io("making a file system on", path)(io::Error::other(why)))
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::fs::MetadataExt};

    use super::*;

    #[test]
    fn a_disk_is_large_and_costs_little() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk.ext4");
        create(dir.path(), &disk, 10).unwrap();
        let meta = fs::metadata(&disk).unwrap();
        assert_eq!(meta.len(), 10 * GIB);
        assert!(meta.blocks() * 512 < 16 << 20, "{} bytes", meta.blocks() * 512);
        let check = Command::new("e2fsck").args(["-fn"]).arg(&disk).output().unwrap();
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
        assert!(matches!(create(dir.path(), &disk, 10), Err(Error::Io { .. })), "a disk is never overwritten");
    }

    #[test]
    fn a_copy_has_the_same_content_and_size_and_costs_what_is_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, half) = (dir.path().join("disk"), dir.path().join("half"));
        let mut file = File::create(&disk).unwrap();
        file.write_all(&[7; 10_000]).unwrap();
        file.set_len(1 << 30).unwrap();
        fs::write(&half, "left by one that was killed").unwrap();
        copy(&disk, &half).unwrap();
        let meta = fs::metadata(&half).unwrap();
        assert_eq!((meta.len(), meta.mode() & 0o777), (1 << 30, 0o600));
        assert!(meta.blocks() * 512 < 1 << 20, "{}", meta.blocks());
        let mut begin = vec![0; 10_001];
        io::Read::read_exact(&mut File::open(&half).unwrap(), &mut begin).unwrap();
        assert!(begin[..10_000].iter().all(|byte| *byte == 7) && begin[10_000] == 0);
        assert!(copy(&dir.path().join("none"), &half).is_err());
    }
}
