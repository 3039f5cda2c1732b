//! New content for a directory that stays the one in which programs run.
//!
//! ```text
//!  begin ──▶ built aside ──▶ checked ──▶ old renamed away ──▶ new renamed in ══▶ old removed
//!    │            │             │              │                    │ (from here on it counts)
//!    └────────────┴─────────────┴──────◀───────┴─────◀──────────────┘ a failure: everything is as it was
//! ```
//! What cannot be removed later (a mount, an immutable file) is looked for before the first rename.

use std::{
    ffi::CString,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, UTIME_OMIT, Uid, chmodat,
        chownat, fstatfs, mkdirat, openat, renameat_with, unlinkat, utimensat,
    },
    io::Errno,
};

use crate::{
    error::{Error, failed},
    removal::{check_in, remove_in},
    walk::{self, as_os},
};

/// Where new content waits until all of it is there. In the directory itself: the same file system.
const STAGING: &str = ".heyvm-new";
/// Where the old content waits for its removal.
const OLD: &str = ".heyvm-old";
/// `statfs`'s type of FUSE: the files of someone else, the host's for example.
const FUSE: u64 = 0x6573_5546;

/// Old content that could not be removed although the new one is in place.
#[derive(Debug)]
pub struct Leftover {
    /// Where it is.
    pub path: PathBuf,
    /// Why it is still there.
    pub why: Error,
}

/// New content for one directory, on its way. Dropped without [`commit`](Self::commit), it leaves nothing behind.
#[derive(Debug)]
pub struct Replacement {
    path: PathBuf,
    dir: OwnedFd,
    staging: CString,
    steps: Vec<Step>,
}

/// A step that has been done, with what is needed to undo it. Paths are below the directory.
#[derive(Debug)]
enum Step {
    Renamed { from: PathBuf, to: PathBuf },
    Made(PathBuf),
    Removed(PathBuf, Directory),
}

/// What is to be kept of a directory that is made anew.
#[derive(Debug, Clone, Copy)]
struct Directory {
    mode: Mode,
    owner: Option<(Uid, Gid)>,
    modified: Timespec,
}

impl Replacement {
    /// Refuses a directory that a mount lies at, above (the files of a FUSE server) or below; else makes an empty
    /// directory in it to be filled.
    pub fn begin(path: &Path) -> Result<Self, Error> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = openat(CWD, path, flags, Mode::empty()).map_err(failed("open", path))?;
        let meta = walk::look(&dir, c"", AtFlags::EMPTY_PATH).map_err(failed("look at", path))?;
        walk::check_attributes(&meta, path)?;
        let files = fstatfs(&dir).map_err(failed("look at", path))?;
        if u64::try_from(files.f_type).is_ok_and(|kind| kind & 0xffff_ffff == FUSE) {
            return Err(Error::Mount(path.to_owned()));
        }
        let staging = c_string(Path::new(STAGING))?;
        let new = Self { path: path.to_owned(), dir, staging, steps: Vec::new() };
        new.check_content()?;
        // Of one that was cut off.
        remove_in(&new.dir, &new.staging, &new.staging())?;
        mkdirat(&new.dir, &new.staging, Mode::RWXU).map_err(failed("make", new.staging()))?;
        Ok(new)
    }

    /// The directory to be filled.
    pub fn staging(&self) -> PathBuf {
        self.path.join(as_os(&self.staging))
    }

    /// Puts what was built in place of everything else, or leaves everything as it was.
    pub fn commit(mut self) -> Result<Option<Leftover>, Error> {
        self.check_content()?;
        let staged = open_staging(&self)?;
        let new: Vec<_> = walk::entries(&staged, &self.staging())?.into_iter().map(|(name, _)| as_os(&name)).collect();
        let old_names: Vec<_> = walk::entries(&self.dir, &self.path)?
            .into_iter()
            .map(|(name, _)| as_os(&name))
            .filter(|name| *name != as_os(&self.staging))
            .collect();
        let mut old = PathBuf::from(OLD);
        let mut number = 0;
        while old_names.contains(&old) || new.contains(&old) {
            number += 1;
            old = PathBuf::from(format!("{OLD}-{number}"));
        }
        if let Err(cause) = self.swap(&old, &old_names, &new) {
            let kept = self.path.join(&old);
            return Err(match self.undo() {
                Ok(()) => cause,
                Err(undo) => Error::NotUndone { cause: Box::new(cause), undo: Box::new(undo), kept },
            });
        }
        let path = self.path.join(&old);
        let removed = remove_in(&self.dir, &c_string(&old)?, &path);
        Ok(removed.err().map(|why| Leftover { path, why }))
    }

    fn check_content(&self) -> Result<(), Error> {
        for (name, _) in walk::entries(&self.dir, &self.path)?.into_iter().filter(|(name, _)| *name != self.staging) {
            check_in(&self.dir, &name, &self.path.join(as_os(&name)))?;
        }
        Ok(())
    }

    fn swap(&mut self, old: &Path, old_names: &[PathBuf], new: &[PathBuf]) -> Result<(), Error> {
        self.make(old, Directory::default())?;
        for name in old_names {
            self.rename(name.clone(), old.join(name))?;
        }
        for name in new {
            self.rename(as_os(&self.staging).join(name), name.clone())?;
        }
        Ok(())
    }

    /// Renames; a directory that the file system moves only piece by piece (one of an image below an overlay) is made
    /// at its new place and its content moved.
    fn rename(&mut self, from: PathBuf, to: PathBuf) -> Result<(), Error> {
        let (from_dir, from_name) = self.parent(&from)?;
        let (to_dir, to_name) = self.parent(&to)?;
        let shown = self.path.join(&from);
        match renameat_with(&from_dir, &from_name, &to_dir, &to_name, RenameFlags::NOREPLACE) {
            Ok(()) => {
                self.steps.push(Step::Renamed { from, to });
                return Ok(());
            }
            Err(Errno::XDEV) if walk::kind_of(&from_dir, &from_name) == Ok(FileType::Directory) => {}
            Err(Errno::BUSY) => return Err(Error::Mount(shown)),
            Err(errno) => return Err(failed("move", shown)(errno)),
        }
        let meta = walk::look(&from_dir, &from_name, AtFlags::empty()).map_err(failed("look at", &shown))?;
        let kept = Directory {
            mode: Mode::from_raw_mode((meta.stx_mode & 0o7777).into()),
            owner: Some((Uid::from_raw(meta.stx_uid), Gid::from_raw(meta.stx_gid))),
            modified: Timespec { tv_sec: meta.stx_mtime.tv_sec, tv_nsec: meta.stx_mtime.tv_nsec.into() },
        };
        let dir = walk::open_dir(&from_dir, &from_name, &shown)?;
        self.make(&to, kept)?;
        for (name, _) in walk::entries(&dir, &shown)? {
            self.rename(from.join(as_os(&name)), to.join(as_os(&name)))?;
        }
        unlinkat(&from_dir, &from_name, AtFlags::REMOVEDIR).map_err(failed("remove", &shown))?;
        self.steps.push(Step::Removed(from, kept));
        kept.date(&to_dir, &to_name).map_err(failed("date", self.path.join(&to)))
    }

    fn make(&mut self, path: &Path, like: Directory) -> Result<(), Error> {
        let (dir, name) = self.parent(path)?;
        like.make(&dir, &name).map_err(failed("make", self.path.join(path)))?;
        self.steps.push(Step::Made(path.to_owned()));
        Ok(())
    }

    /// Takes all steps back, the last one first.
    fn undo(&mut self) -> Result<(), Error> {
        while let Some(step) = self.steps.pop() {
            match &step {
                Step::Renamed { from, to } => {
                    let (from_dir, from_name) = self.parent(from)?;
                    let (to_dir, to_name) = self.parent(to)?;
                    renameat_with(&to_dir, &to_name, &from_dir, &from_name, RenameFlags::NOREPLACE)
                        .map_err(failed("move back", self.path.join(from)))?;
                }
                Step::Made(path) => {
                    let (dir, name) = self.parent(path)?;
                    unlinkat(&dir, &name, AtFlags::REMOVEDIR).map_err(failed("remove", self.path.join(path)))?;
                }
                Step::Removed(path, like) => {
                    let (dir, name) = self.parent(path)?;
                    like.make(&dir, &name).map_err(failed("make", self.path.join(path)))?;
                }
            }
        }
        Ok(())
    }

    /// The directory that holds a path below the directory, reached without links and mounts, and the name in it.
    fn parent(&self, path: &Path) -> Result<(OwnedFd, CString), Error> {
        let mut dir =
            self.dir.try_clone().map_err(|source| Error::Io { doing: "open", path: self.path.clone(), source })?;
        let mut shown = self.path.clone();
        for part in path.parent().into_iter().flat_map(Path::iter) {
            shown.push(part);
            dir = walk::open_dir(&dir, &c_string(Path::new(part))?, &shown)?;
        }
        Ok((dir, c_string(path.file_name().map_or(path, Path::new))?))
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        // Nothing counts on it: the next one removes what is left of this one.
        remove_in(&self.dir, &self.staging, &self.staging()).ok();
    }
}

impl Default for Directory {
    fn default() -> Self {
        let omit = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
        Self { mode: Mode::RWXU, owner: None, modified: omit }
    }
}

impl Directory {
    fn make(&self, dir: &OwnedFd, name: &CString) -> Result<(), Errno> {
        mkdirat(dir, name, Mode::RWXU)?;
        if let Some((uid, gid)) = self.owner {
            chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        chmodat(dir, name, self.mode, AtFlags::empty())?;
        self.date(dir, name)
    }

    fn date(&self, dir: &OwnedFd, name: &CString) -> Result<(), Errno> {
        let omit = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
        let times = Timestamps { last_access: omit, last_modification: self.modified };
        utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW)
    }
}

fn open_staging(new: &Replacement) -> Result<OwnedFd, Error> {
    walk::open_dir(&new.dir, &new.staging, &new.staging())
}

fn c_string(name: &Path) -> Result<CString, Error> {
    use std::os::unix::ffi::OsStrExt;
    CString::new(name.as_os_str().as_bytes()).map_err(|_| failed("open", name)(Errno::INVAL))
}
