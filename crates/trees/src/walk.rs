//! Walks a tree depth first with one open directory at a time. Each directory is opened from the one above it, never
//! through a mount or a link; the way back is `..`, checked to be the directory that was left.

use std::{
    ffi::{CString, OsStr},
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Statx, StatxAttributes, StatxFlags, openat, openat2,
        statx,
    },
    io::Errno,
};

use crate::error::{Error, failed};

/// What is done with what a walk finds.
pub trait Visit {
    /// Something that is not a directory.
    fn file(&mut self, dir: &OwnedFd, name: &CString, path: &Path) -> Result<(), Error>;
    /// A directory of which everything has been visited; `dir` is the one that holds it.
    fn left(&mut self, dir: &OwnedFd, name: &CString, path: &Path) -> Result<(), Error>;
}

/// A directory that the walk is in.
struct Level {
    /// Its name in the directory above.
    name: CString,
    identity: (u32, u32, u64),
    /// Directories in it that are still to be visited.
    pending: Vec<CString>,
}

/// Visits everything below the directory `name` of `parent`, and it last. `shown` is its path for errors.
pub fn walk(parent: &OwnedFd, name: &CString, shown: &Path, visit: &mut impl Visit) -> Result<(), Error> {
    let mut path = shown.to_owned();
    let mut here = open_dir(parent, name, &path)?;
    let mut levels = vec![enter(&here, name.clone(), &path, visit)?];
    while let Some(level) = levels.last_mut() {
        if let Some(next) = level.pending.pop() {
            path.push(as_os(&next));
            here = open_dir(&here, &next, &path)?;
            let entered = enter(&here, next, &path, visit)?;
            levels.push(entered);
            continue;
        }
        let Some(done) = levels.pop() else { break };
        let up = match levels.last() {
            None => parent.try_clone().map_err(|source| Error::Io { doing: "leave", path: path.clone(), source })?,
            Some(level) => leave(&here, level.identity, &path)?,
        };
        visit.left(&up, &done.name, &path)?;
        path.pop();
        here = up;
    }
    Ok(())
}

/// The directory above, which must be the one that the walk came from.
fn leave(dir: &OwnedFd, expected: (u32, u32, u64), path: &Path) -> Result<OwnedFd, Error> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let up = openat(dir, c"..", flags, Mode::empty()).map_err(failed("leave", path))?;
    let found = look(&up, c"", AtFlags::EMPTY_PATH).map_err(failed("leave", path))?;
    if identity(&found) == expected { Ok(up) } else { Err(failed("leave", path)(Errno::STALE)) }
}

fn enter(dir: &OwnedFd, name: CString, path: &Path, visit: &mut impl Visit) -> Result<Level, Error> {
    let meta = look(dir, c"", AtFlags::EMPTY_PATH).map_err(failed("look at", path))?;
    check_attributes(&meta, path)?;
    let mut pending = Vec::new();
    for (entry, kind) in entries(dir, path)? {
        let entry_path = path.join(as_os(&entry));
        let kind = match kind {
            FileType::Unknown => kind_of(dir, &entry).map_err(failed("look at", &entry_path))?,
            known => known,
        };
        if kind == FileType::Directory {
            pending.push(entry);
        } else {
            visit.file(dir, &entry, &entry_path)?;
        }
    }
    Ok(Level { name, identity: identity(&meta), pending })
}

/// Names in a directory, without `.` and `..`.
pub fn entries(dir: &OwnedFd, path: &Path) -> Result<Vec<(CString, FileType)>, Error> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir).map_err(failed("list", path))? {
        let entry = entry.map_err(failed("list", path))?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push((entry.file_name().to_owned(), entry.file_type()));
        }
    }
    Ok(names)
}

/// Opens a directory in another one: no link and no mount.
pub fn open_dir(dir: &OwnedFd, name: &CString, path: &Path) -> Result<OwnedFd, Error> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(dir, name, flags, Mode::empty(), resolve).map_err(failed("open", path))
}

/// Opens the directory that holds `path`, which may be behind links; the name in it, and the path as given.
pub fn parent_of(path: &Path) -> Result<(OwnedFd, CString), Error> {
    let name = path.file_name().and_then(|name| CString::new(name.as_bytes()).ok());
    let name = name.ok_or_else(|| failed("remove", path)(Errno::INVAL))?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok((openat(CWD, parent, flags, Mode::empty()).map_err(failed("open", parent))?, name))
}

/// Describes what is at a name, links as themselves.
pub fn look(dir: &OwnedFd, name: &std::ffi::CStr, flags: AtFlags) -> Result<Statx, Errno> {
    let mask = StatxFlags::TYPE | StatxFlags::MODE | StatxFlags::INO | StatxFlags::UID | StatxFlags::GID;
    statx(dir, name, flags | AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT, mask | StatxFlags::MTIME)
}

/// Whether something is a directory.
pub fn kind_of(dir: &OwnedFd, name: &CString) -> Result<FileType, Errno> {
    Ok(FileType::from_raw_mode(look(dir, name, AtFlags::empty())?.stx_mode.into()))
}

/// Refuses what no removal gets past.
pub fn check_attributes(meta: &Statx, path: &Path) -> Result<(), Error> {
    let attributes = meta.stx_attributes;
    if attributes.contains(StatxAttributes::MOUNT_ROOT) {
        return Err(Error::Mount(path.to_owned()));
    }
    if attributes.intersects(StatxAttributes::IMMUTABLE | StatxAttributes::APPEND) {
        return Err(Error::Protected(path.to_owned()));
    }
    Ok(())
}

fn identity(meta: &Statx) -> (u32, u32, u64) {
    (meta.stx_dev_major, meta.stx_dev_minor, meta.stx_ino)
}

/// A name as a path's part.
pub fn as_os(name: &CString) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(name.as_bytes()))
}
