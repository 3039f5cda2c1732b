//! Unpacking a tar stream that may have been made to do harm.
//!
//! Every path is opened relative to the directory with `RESOLVE_BENEATH`, so that neither a name nor a symbolic link that
//! an earlier entry (or someone else, meanwhile) has made leads out of it. Bytes and entries are counted as they come, not
//! as announced.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, CWD, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, Uid, chownat, fchmod, fchown,
        futimens, linkat, mkdirat, openat, openat2, symlinkat, unlinkat, utimensat,
    },
    io::Errno,
};
use tar::{Entry, EntryType};

use crate::{MAX_HEADER, entries, inside, leads_inside};

/// Bytes that are read at a time, and of zeros that become a hole.
const PIECE: usize = 64 << 10;
const HOLE: usize = 4096;
/// Bytes of all holes of an archive: they cost no space, but the time to find them.
pub const MAX_HOLES: u64 = 128 << 30;
const ZEROS: [u8; HOLE] = [0; HOLE];
/// Bytes of directories' names that are remembered for their modes and times; the rest get theirs at once.
const MAX_REMEMBERED: usize = 32 << 20;
/// Names of what is left out that are remembered; the others are counted.
const MAX_NAMED: usize = 20;

/// What is unpacked, and how.
#[derive(Debug, Clone)]
pub struct Options {
    root: PathBuf,
    bytes: u64,
    entries: u64,
    links: Links,
    modes: u32,
    owner: Option<(Uid, Gid)>,
}

/// Which symbolic links are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// All: whoever follows them later is of the same world as who has made them.
    Any,
    /// Those that lead below the directory, whatever other links are there. Others are left out, and none that is there
    /// already is followed.
    Inside,
}

impl Options {
    /// For a guest: everything is kept.
    pub fn for_a_guest() -> Self {
        Self { root: PathBuf::new(), bytes: u64::MAX, entries: u64::MAX, links: Links::Any, modes: 0o7777, owner: None }
    }

    /// For a directory of the host: no link leads out of it, and no file lends the rights of its owner.
    pub fn for_the_host() -> Self {
        Self { links: Links::Inside, modes: 0o777, ..Self::for_a_guest() }
    }

    /// No more than so many bytes of files, and entries; zero means as much as the disk holds.
    pub fn limits(self, bytes: u64, entries: u64) -> Self {
        let or_none = |limit| if limit == 0 { u64::MAX } else { limit };
        Self { bytes: or_none(bytes), entries: or_none(entries), ..self }
    }

    /// Gives what is unpacked, and the directory that it is unpacked to, to a user.
    pub fn owned_by(self, uid: u32, gid: u32) -> Self {
        Self { owner: Some((Uid::from_raw(uid), Gid::from_raw(gid))), ..self }
    }

    /// Only what lies below this directory of the archive, named from there.
    pub fn below(self, root: &str) -> Result<Self, Error> {
        let root = inside(Path::new(root)).ok_or_else(|| Error::refused(root, "is absolute or holds \"..\""))?;
        Ok(Self { root, ..self })
    }
}

/// What was unpacked.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Done {
    /// Bytes of files, without holes.
    pub bytes: u64,
    /// Files, directories and links.
    pub entries: u64,
    /// What was not made.
    pub left_out: LeftOut,
}

/// Links that lead out of the directory, where those are not made.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct LeftOut {
    /// How many.
    pub count: u64,
    /// The first ones.
    pub names: Vec<PathBuf>,
}

/// Why an archive is not unpacked, or not whole.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is no tar, or cut short, or its headers are too large.
    #[error("the archive cannot be read: {0}")]
    Broken(io::Error),
    /// An entry would leave the directory, or is nothing that is unpacked.
    #[error("{path} {why}")]
    Refused {
        /// Its name.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// More than the limits allow.
    #[error("more than {0}")]
    TooMuch(String),
    /// It cannot be written.
    #[error("cannot unpack {path}: {source}")]
    Io {
        /// What cannot.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Error {
    fn refused(path: impl Into<PathBuf>, why: &str) -> Self {
        Self::Refused { path: path.into(), why: why.into() }
    }

    fn io(path: &Path) -> impl Fn(io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}

/// Unpacks `archive` below the directory at `dir`, which is there. Reads to the archive's end, not to the stream's.
pub fn unpack<R: Read>(dir: &Path, options: &Options, archive: R) -> Result<(Done, R), Error> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = openat(CWD, dir, flags, Mode::empty()).map_err(|errno| Error::io(dir)(errno.into()))?;
    own(&root, options.owner).map_err(|errno| Error::io(dir)(errno.into()))?;
    let mut unpacking = Unpacking {
        root,
        options,
        parent: None,
        found: options.root.as_os_str().is_empty(),
        done: Done::default(),
        directories: Vec::new(),
        remembered: 0,
        holes: 0,
        buffer: vec![0; PIECE],
    };
    let rest = entries(archive, MAX_HEADER, Error::Broken, |entry| unpacking.entry(entry).map(|()| true))?;
    unpacking.finish_directories()?;
    if !unpacking.found {
        return Err(Error::Refused { path: options.root.clone(), why: "is no directory of the archive".into() });
    }
    Ok((unpacking.done, rest))
}

fn own(file: &OwnedFd, owner: Option<(Uid, Gid)>) -> Result<(), Errno> {
    owner.map_or(Ok(()), |(user, group)| fchown(file, Some(user), Some(group)))
}

fn own_at(dir: &OwnedFd, name: &OsStr, owner: Option<(Uid, Gid)>) -> Result<(), Errno> {
    let chown = |(user, group)| chownat(dir, name, Some(user), Some(group), AtFlags::SYMLINK_NOFOLLOW);
    owner.map_or(Ok(()), chown)
}

struct Unpacking<'a> {
    root: OwnedFd,
    options: &'a Options,
    /// The directory of the last entry: the next one is mostly in the same.
    parent: Option<(PathBuf, OwnedFd)>,
    /// Whether something of what is wanted was there.
    found: bool,
    done: Done,
    /// What directories are given last: a directory may forbid to write in it, and each file changes its time.
    directories: Vec<(PathBuf, Attributes)>,
    remembered: usize,
    holes: u64,
    buffer: Vec<u8>,
}

/// What an entry is given once its content is there.
#[derive(Debug, Clone, Copy)]
struct Attributes {
    mode: Mode,
    owner: Option<(Uid, Gid)>,
    /// Zero stands for no time: archives of none are of now, since caches and zip files make nothing good of 1970.
    mtime: u64,
}

impl Attributes {
    fn times(self) -> Option<Timestamps> {
        let time = Timespec { tv_sec: i64::try_from(self.mtime).unwrap_or(i64::MAX), tv_nsec: 0 };
        let omit = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
        (self.mtime > 0).then_some(Timestamps { last_access: omit, last_modification: time })
    }

    fn apply(self, file: &OwnedFd) -> Result<(), Errno> {
        // A change of the owner takes the set-user-id bit away.
        own(file, self.owner)?;
        fchmod(file, self.mode)?;
        self.times().map_or(Ok(()), |times| futimens(file, &times))
    }
}

impl Unpacking<'_> {
    fn entry(&mut self, entry: &mut Entry<'_, impl Read>) -> Result<(), Error> {
        use EntryType::*;
        self.done.entries += 1;
        if self.done.entries > self.options.entries {
            return Err(Error::TooMuch(format!("{} entries", self.options.entries)));
        }
        let kind = entry.header().entry_type();
        if kind == XGlobalHeader {
            return Ok(());
        }
        let named = PathBuf::from(OsStr::from_bytes(&entry.path_bytes()));
        let plain = inside(&named).ok_or_else(|| Error::refused(&named, "is absolute, holds \"..\" or is too long"))?;
        let Ok(path) = plain.strip_prefix(&self.options.root) else { return Ok(()) };
        self.found = true;
        let link = entry.link_name_bytes().map(|link| PathBuf::from(OsStr::from_bytes(&link)));
        let link = || link.ok_or_else(|| Error::refused(path, "leads nowhere"));
        let mode = Mode::from_raw_mode(entry.header().mode().unwrap_or(0o644) & self.options.modes);
        let attributes = Attributes { mode, owner: self.options.owner, mtime: entry.header().mtime().unwrap_or(0) };
        let made = match kind {
            Regular | Continuous | GNUSparse => return self.file(path, attributes, kind == GNUSparse, entry),
            Directory => self.directory(path, attributes),
            Symlink => self.symlink(path, attributes, &link()?),
            Link => {
                let target = inside(&link()?);
                match target.as_deref().map(|target| target.strip_prefix(&self.options.root)) {
                    Some(Ok(target)) => self.hard_link(path, target),
                    _ => Err(Problem::LeadsOut),
                }
            }
            _ => return Err(Error::refused(path, "is a device, a FIFO or a socket")),
        };
        made.map_err(|problem| problem.of(path))
    }

    fn file(
        &mut self,
        path: &Path,
        attributes: Attributes,
        has_holes: bool,
        content: &mut impl Read,
    ) -> Result<(), Error> {
        let failed = Error::io(path);
        let mut file = File::from(self.create(path).map_err(|problem| problem.of(path))?);
        let mut size = 0;
        loop {
            let length = match content.read(&mut self.buffer) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Error::Broken(error)),
            };
            size += length as u64;
            for piece in self.buffer[..length].chunks(if has_holes { HOLE } else { PIECE }) {
                if has_holes && *piece == ZEROS[..piece.len()] {
                    self.holes += piece.len() as u64;
                    if self.holes > MAX_HOLES {
                        return Err(Error::TooMuch(format!("{MAX_HOLES} bytes of holes")));
                    }
                    file.seek(SeekFrom::Current(piece.len() as i64)).map_err(&failed)?;
                    continue;
                }
                self.done.bytes += piece.len() as u64;
                if self.done.bytes > self.options.bytes {
                    return Err(Error::TooMuch(format!("{} bytes unpacked", self.options.bytes)));
                }
                file.write_all(piece).map_err(&failed)?;
            }
        }
        if has_holes {
            file.set_len(size).map_err(&failed)?;
        }
        attributes.apply(&file.into()).map_err(|errno| failed(errno.into()))
    }

    fn create(&mut self, path: &Path) -> Result<OwnedFd, Problem> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = self.resolve();
        self.replacing(path, |parent, name| openat2(parent, name, flags, Mode::RUSR | Mode::WUSR, resolve))
    }

    fn directory(&mut self, path: &Path, attributes: Attributes) -> Result<(), Problem> {
        if path.as_os_str().is_empty() {
            return Ok(());
        }
        let (parent, name) = self.parent_of(path)?;
        match mkdirat(parent, name, Mode::RWXU) {
            Err(Errno::EXIST) => {}
            made => made?,
        }
        // Also that it is a directory, and below.
        let made = self.open_directory(path)?;
        if self.remembered + path.as_os_str().len() > MAX_REMEMBERED {
            return Ok(attributes.apply(&made)?);
        }
        self.remembered += path.as_os_str().len();
        self.directories.push((path.to_owned(), attributes));
        Ok(())
    }

    /// Modes and times of directories, the deepest first.
    fn finish_directories(&mut self) -> Result<(), Error> {
        let mut directories = std::mem::take(&mut self.directories);
        // The last entry of a name counts: sorting is stable.
        directories.reverse();
        directories.sort_by_key(|(path, _)| std::cmp::Reverse(path.components().count()));
        let mut last: Option<&Path> = None;
        for (path, attributes) in &directories {
            if last == Some(path) {
                continue;
            }
            last = Some(path);
            match self.open_directory(path) {
                Ok(directory) => attributes.apply(&directory).map_err(|errno| Problem::from(errno).of(path))?,
                // Something else has taken its place.
                Err(Problem::Io(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) | Problem::LeadsOut) => {}
                Err(problem) => return Err(problem.of(path)),
            }
        }
        Ok(())
    }

    fn symlink(&mut self, path: &Path, attributes: Attributes, target: &Path) -> Result<(), Problem> {
        if self.options.links == Links::Inside && !leads_inside(path, target) {
            self.done.entries -= 1;
            self.done.left_out.count += 1;
            if self.done.left_out.names.len() < MAX_NAMED {
                self.done.left_out.names.push(path.to_owned());
            }
            return Ok(());
        }
        self.replacing(path, |parent, name| symlinkat(target, parent, name))?;
        let (parent, name) = self.parent_of(path)?;
        own_at(parent, name, attributes.owner)?;
        // A link whose time cannot be set is as good.
        if let Some(times) = attributes.times() {
            utimensat(parent, name, &times, AtFlags::SYMLINK_NOFOLLOW).ok();
        }
        Ok(())
    }

    fn hard_link(&mut self, path: &Path, target: &Path) -> Result<(), Problem> {
        let dir = target.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let from = openat2(
            &self.root,
            dir,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
            self.resolve(),
        )?;
        let name = target.file_name().ok_or(Problem::LeadsOut)?.to_owned();
        if path == target {
            return Ok(());
        }
        self.replacing(path, |parent, new| linkat(&from, &name, parent, new, AtFlags::empty()))
    }

    /// Makes something at `path`, in place of a file or link that is there.
    fn replacing<T>(&mut self, path: &Path, make: impl Fn(&OwnedFd, &OsStr) -> Result<T, Errno>) -> Result<T, Problem> {
        let (parent, name) = self.parent_of(path)?;
        match make(parent, name) {
            Err(Errno::EXIST) => {
                unlinkat(parent, name, AtFlags::empty())?;
                Ok(make(parent, name)?)
            }
            made => Ok(made?),
        }
    }

    /// The directory of `path`, made when missing, and its name in there.
    fn parent_of<'p>(&mut self, path: &'p Path) -> Result<(&OwnedFd, &'p OsStr), Problem> {
        let name = path.file_name().ok_or(Problem::LeadsOut)?;
        let dir = path.parent().unwrap_or(Path::new(""));
        if dir.as_os_str().is_empty() {
            return Ok((&self.root, name));
        }
        if self.parent.as_ref().is_none_or(|(known, _)| known != dir) {
            self.parent = Some((dir.to_owned(), self.make_directories(dir)?));
        }
        Ok((self.parent.as_ref().map_or(&self.root, |(_, fd)| fd), name))
    }

    fn make_directories(&self, dir: &Path) -> Result<OwnedFd, Problem> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |path: &Path| openat2(&self.root, path, flags, Mode::empty(), self.resolve());
        match open(dir) {
            Err(Errno::NOENT) => {}
            opened => return Ok(opened?),
        }
        let mut above: Option<OwnedFd> = None;
        let mut path = PathBuf::new();
        for part in dir {
            path.push(part);
            let opened = match open(&path) {
                Err(Errno::NOENT) => {
                    match mkdirat(above.as_ref().unwrap_or(&self.root), part, Mode::from_raw_mode(0o755)) {
                        Err(Errno::EXIST) => {}
                        made => {
                            made?;
                            own_at(above.as_ref().unwrap_or(&self.root), part, self.options.owner)?;
                        }
                    }
                    open(&path)
                }
                opened => opened,
            };
            above = Some(opened?);
        }
        above.ok_or(Problem::LeadsOut)
    }

    fn open_directory(&self, path: &Path) -> Result<OwnedFd, Problem> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(openat2(&self.root, path, flags, Mode::empty(), self.resolve())?)
    }

    fn resolve(&self) -> ResolveFlags {
        let links = match self.options.links {
            Links::Any => ResolveFlags::NO_MAGICLINKS,
            Links::Inside => ResolveFlags::NO_SYMLINKS,
        };
        ResolveFlags::BENEATH | links
    }
}

/// Why one entry cannot be made.
#[derive(Debug)]
enum Problem {
    LeadsOut,
    Io(Errno),
}

impl From<Errno> for Problem {
    fn from(errno: Errno) -> Self {
        match errno {
            // What RESOLVE_BENEATH says of a link that leads out, and RESOLVE_NO_SYMLINKS of any.
            Errno::XDEV | Errno::LOOP => Self::LeadsOut,
            errno => Self::Io(errno),
        }
    }
}

impl Problem {
    fn of(self, path: &Path) -> Error {
        match self {
            Self::LeadsOut => Error::refused(path, "leads out of the directory"),
            Self::Io(errno) => Error::io(path)(errno.into()),
        }
    }
}
