//! Every way to a file: walked by the kernel below one directory, never out of it.

use std::{fs::File, os::fd::OwnedFd, path::Path};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, Stat, fstat, openat2},
    io::Errno,
};

/// Below the directory, through no link, into no other file system: what is mounted there is not part of the bargain.
const CONFINED: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_XDEV);
/// The kernel gives up on a walk that is disturbed by a rename elsewhere; it is begun again this often.
const TRIES: usize = 16;

/// What a file is, whatever its name.
pub type Identity = (u64, u64);

/// Its identity.
pub fn identity(stat: &Stat) -> Identity {
    (stat.st_dev, stat.st_ino)
}

/// One directory of this host.
#[derive(Debug)]
pub struct Tree {
    root: OwnedFd,
}

impl Tree {
    /// Opens it, through no symbolic link; later walks begin here, whatever becomes of its name.
    pub fn open(path: &Path) -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        for _ in 0..TRIES {
            match openat2(CWD, path, flags, Mode::empty(), resolve) {
                Err(Errno::AGAIN) => {}
                opened => return Ok(Self { root: opened? }),
            }
        }
        Err(Errno::AGAIN)
    }

    /// The directory itself.
    pub fn root(&self) -> &OwnedFd {
        &self.root
    }

    /// The file at `path`, not opened: a link is the link itself.
    pub fn find(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        let path = if path.is_empty() { b"." } else { path };
        confined(&self.root, path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty())
    }
}

/// A walk from `dir` that does not leave it.
pub fn confined(dir: &OwnedFd, path: &[u8], flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    for _ in 0..TRIES {
        match openat2(dir, path, flags | OFlags::CLOEXEC, mode, CONFINED) {
            Err(Errno::AGAIN) => {}
            done => return done,
        }
    }
    Err(Errno::AGAIN)
}

/// The file of that name in `dir`, not opened, and what it is.
pub fn child(dir: &OwnedFd, name: &[u8]) -> Result<(OwnedFd, Stat), Errno> {
    let found = confined(dir, name, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty())?;
    let stat = fstat(&found)?;
    Ok((found, stat))
}

/// Opens what was found. Only files and directories: to open a device may be to do something.
pub fn open(found: &OwnedFd, flags: OFlags) -> Result<File, Errno> {
    let kind = fstat(found)?.st_mode & super::wire::KIND;
    match kind {
        0o100_000 if flags.contains(OFlags::DIRECTORY) => return Err(Errno::NOTDIR),
        0o100_000 | 0o040_000 => {}
        0o120_000 => return Err(Errno::LOOP),
        _ => return Err(Errno::OPNOTSUPP),
    }
    let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    Ok(rustix::fs::open(itself(found), flags, Mode::empty())?.into())
}

/// A path that means the file itself and nothing else.
pub fn itself(found: &impl std::os::fd::AsRawFd) -> String {
    format!("/proc/self/fd/{}", found.as_raw_fd())
}

/// Sets the permissions of what was found.
pub fn set_permissions(found: &OwnedFd, mode: u32) -> Result<(), Errno> {
    rustix::fs::chmodat(CWD, itself(found), Mode::from_raw_mode(mode & super::wire::PERMISSIONS), AtFlags::empty())
}
