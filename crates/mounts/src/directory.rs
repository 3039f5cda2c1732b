//! A directory of this host that may be served: opened through no link, and recognised again at the next start.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{fstat, fstatvfs},
    io::Errno,
};
use serde::{Deserialize, Serialize};

use crate::{Error, tree::Tree};

/// Identifies a directory across daemons and reboots of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectoryIdentity {
    device: u64,
    inode: u64,
    /// Identifies the file system where device numbers are assigned anew at each boot.
    file_system: u64,
    boot: String,
}

impl DirectoryIdentity {
    /// Whether both mean the same directory. Device numbers count within one boot of the host only.
    fn matches(&self, other: &Self) -> bool {
        let same_device = self.device == other.device;
        let same_file_system = self.boot != other.boot && self.file_system == other.file_system;
        self.inode == other.inode && (same_device || same_file_system)
    }
}

/// An open directory. Whatever becomes of its name, this stays the directory that was checked.
#[derive(Debug)]
pub struct Directory {
    pub(crate) tree: Tree,
    path: PathBuf,
    identity: DirectoryIdentity,
}

impl Directory {
    /// Opens the directory at `path`, an absolute path that holds no symbolic link: a guest may have put one there since
    /// the path was checked.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let path = path.to_owned();
        let tree = match Tree::open(&path) {
            Ok(tree) => tree,
            Err(Errno::LOOP) => return Err(Error::Link { path }),
            Err(errno) => return Err(Error::Directory { path, source: errno.into() }),
        };
        match identify(&tree) {
            Ok(identity) => Ok(Self { tree, path, identity }),
            Err(source) => Err(Error::Directory { path, source }),
        }
    }

    /// Opens the directory at `path` and refuses any but the one that was identified before.
    pub fn reopen(path: &Path, known: &DirectoryIdentity) -> Result<Self, Error> {
        let directory = Self::open(path)?;
        if directory.identity.matches(known) { Ok(directory) } else { Err(Error::Replaced { path: directory.path }) }
    }

    /// Identifies this directory, to be remembered for [`Directory::reopen`].
    pub fn identity(&self) -> &DirectoryIdentity {
        &self.identity
    }
}

fn identify(tree: &Tree) -> io::Result<DirectoryIdentity> {
    let (stat, file_system) = (fstat(tree.root())?, fstatvfs(tree.root())?);
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
    Ok(DirectoryIdentity { device: stat.st_dev, inode: stat.st_ino, file_system: file_system.f_fsid, boot })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_and_other_directories_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let dir = fs::canonicalize(dir.path()).unwrap();
        let (outer, inner) = (dir.join("outer"), dir.join("outer/inner"));
        fs::create_dir_all(&inner).unwrap();
        let known = Directory::open(&inner).unwrap().identity().clone();
        Directory::reopen(&inner, &known).unwrap();

        fs::rename(&inner, dir.join("kept")).unwrap();
        fs::create_dir(&inner).unwrap();
        assert!(matches!(Directory::reopen(&inner, &known), Err(Error::Replaced { .. })));
        fs::remove_dir(&inner).unwrap();
        symlink(dir.join("kept"), &inner).unwrap();
        assert!(matches!(Directory::reopen(&inner, &known), Err(Error::Link { .. })));

        fs::remove_file(&inner).unwrap();
        fs::remove_dir(&outer).unwrap();
        fs::create_dir(dir.join("real")).unwrap();
        fs::rename(dir.join("kept"), dir.join("real/inner")).unwrap();
        symlink("real", &outer).unwrap();
        assert!(matches!(Directory::reopen(&inner, &known), Err(Error::Link { .. })), "a parent is a link");
        Directory::reopen(&dir.join("real/inner"), &known).unwrap();
        assert!(matches!(Directory::open(&dir.join("nowhere")), Err(Error::Directory { .. })));
    }

    #[test]
    fn device_numbers_count_within_one_boot() {
        let known = DirectoryIdentity { device: 1, inode: 2, file_system: 3, boot: "a".into() };
        let after_reboot = DirectoryIdentity { device: 9, boot: "b".into(), ..known.clone() };
        assert!(known.matches(&known) && known.matches(&after_reboot));
        assert!(!known.matches(&DirectoryIdentity { device: 9, ..known.clone() }));
        assert!(!known.matches(&DirectoryIdentity { inode: 9, ..known.clone() }));
        assert!(!known.matches(&DirectoryIdentity { file_system: 9, ..after_reboot }));
    }
}
