//! Removal of a tree, looked through before anything of it is touched.

use std::{ffi::CString, os::fd::OwnedFd, path::Path};

use rustix::{
    fs::{AtFlags, FileType, unlinkat},
    io::Errno,
};

use crate::{
    error::{Error, failed},
    walk::{self, Visit},
};

/// Removes what is at `path`: a file, a link (not where it leads), or a directory with all it holds. Refuses, before
/// anything is removed, when a mount lies at the path or below it, or something there is immutable or append-only.
pub fn remove(path: &Path) -> Result<(), Error> {
    let (parent, name) = walk::parent_of(path)?;
    if check_in(&parent, &name, path)? == FileType::Directory {
        walk::walk(&parent, &name, path, &mut Removing)
    } else {
        Removing.file(&parent, &name, path)
    }
}

/// Whether [`remove`] would go on.
pub fn check(path: &Path) -> Result<(), Error> {
    let (parent, name) = walk::parent_of(path)?;
    check_in(&parent, &name, path).map(drop)
}

/// Looks through what is at a name; its kind.
pub(crate) fn check_in(parent: &OwnedFd, name: &CString, path: &Path) -> Result<FileType, Error> {
    let meta = walk::look(parent, name, AtFlags::empty()).map_err(failed("look at", path))?;
    walk::check_attributes(&meta, path)?;
    let kind = FileType::from_raw_mode(meta.stx_mode.into());
    if kind == FileType::Directory {
        walk::walk(parent, name, path, &mut Checking)?;
    }
    Ok(kind)
}

/// Removes what is at a name, which has been looked through.
pub(crate) fn remove_in(parent: &OwnedFd, name: &CString, path: &Path) -> Result<(), Error> {
    match walk::kind_of(parent, name) {
        Ok(FileType::Directory) => walk::walk(parent, name, path, &mut Removing),
        Ok(_) => Removing.file(parent, name, path),
        Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(failed("look at", path)(errno)),
    }
}

struct Checking;

impl Visit for Checking {
    fn file(&mut self, dir: &OwnedFd, name: &CString, path: &Path) -> Result<(), Error> {
        match walk::look(dir, name, AtFlags::empty()) {
            Ok(meta) => walk::check_attributes(&meta, path),
            // Removed by another meanwhile.
            Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(failed("look at", path)(errno)),
        }
    }

    fn left(&mut self, _: &OwnedFd, _: &CString, _: &Path) -> Result<(), Error> {
        Ok(())
    }
}

struct Removing;

impl Visit for Removing {
    fn file(&mut self, dir: &OwnedFd, name: &CString, path: &Path) -> Result<(), Error> {
        unlink(dir, name, path, AtFlags::empty())
    }

    fn left(&mut self, dir: &OwnedFd, name: &CString, path: &Path) -> Result<(), Error> {
        unlink(dir, name, path, AtFlags::REMOVEDIR)
    }
}

fn unlink(dir: &OwnedFd, name: &CString, path: &Path, flags: AtFlags) -> Result<(), Error> {
    match unlinkat(dir, name, flags) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::BUSY) => Err(Error::Mount(path.to_owned())),
        Err(errno) => Err(failed("remove", path)(errno)),
    }
}
