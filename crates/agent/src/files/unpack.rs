//! Unpacking a tar stream that may have been made to do harm.
//!
//! Every path is opened relative to the directory with `RESOLVE_BENEATH`, so that neither a name nor a symbolic link
//! that an earlier entry has made can lead out of it; bytes and entries are counted as they come, not as announced.

use std::{
    cell::Cell,
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read, Write},
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Component, Path, PathBuf},
    rc::Rc,
};

use heyvm_agent_protocol::{CHUNK, v1::UnpackReply};
use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2},
    sys::{
        stat::{Mode, UtimensatFlags, fchmod, futimens, mkdirat, utimensat},
        time::TimeSpec,
    },
    unistd::{UnlinkatFlags, linkat, symlinkat, unlinkat},
};
use tonic::Status;

use super::failed;

/// A header, with a long name or extended attributes in front of it, may be this large.
const MAX_HEADER: usize = 1 << 20;

/// How much an archive may hold.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    bytes: u64,
    entries: u64,
}

impl Limits {
    /// Zero means no limit but the disk's.
    pub fn new(bytes: u64, entries: u64) -> Self {
        let or_none = |limit| if limit == 0 { u64::MAX } else { limit };
        Self { bytes: or_none(bytes), entries: or_none(entries) }
    }
}

/// What of an archive is unpacked, and how much it may be.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Only what lies below this directory of the archive, named from there; all of it when empty.
    root: PathBuf,
    /// How much.
    limits: Limits,
}

impl Wanted {
    /// An error when `root` is not a relative path that stays below.
    pub fn new(root: &str, limits: Limits) -> Result<Self, Status> {
        Ok(Self { root: inside(Path::new(root))?, limits })
    }
}

/// Unpacks `archive` below `dir`, which is made when missing. With `clean` nothing else is left in it afterwards; an
/// archive that fails then leaves the directory as it was.
pub fn unpack(dir: &Path, clean: bool, wanted: Wanted, archive: impl Read) -> Result<UnpackReply, Status> {
    fs::create_dir_all(dir).map_err(|error| failed("cannot prepare", dir, &error))?;
    if !clean {
        return unpack_into(dir, wanted, archive);
    }
    let aside = dir.join(ASIDE);
    let prepared = remove_if_there(&aside).and_then(|()| fs::create_dir(&aside));
    prepared.map_err(|error| failed("cannot prepare", &aside, &error))?;
    let done = unpack_into(&aside, wanted, archive).and_then(|reply| {
        take_over(dir, &aside).map_err(|error| failed("cannot replace what is in", dir, &error))?;
        Ok(reply)
    });
    if done.is_err() {
        let _ = remove_if_there(&aside);
    }
    done
}

/// Where an archive waits until all of it is there. In the directory itself: the same file system, and the directory
/// stays the one in which programs run.
const ASIDE: &str = ".heyvm-new";

fn remove_if_there(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// What is in `aside` takes the place of everything else in `dir`.
fn take_over(dir: &Path, aside: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        match entry.file_type()? {
            _ if entry.path() == aside => {}
            kind if kind.is_dir() => fs::remove_dir_all(entry.path())?,
            _ => fs::remove_file(entry.path())?,
        }
    }
    for entry in fs::read_dir(aside)? {
        let entry = entry?;
        fs::rename(entry.path(), dir.join(entry.file_name()))?;
    }
    fs::remove_dir(aside)
}

fn unpack_into(dir: &Path, wanted: Wanted, archive: impl Read) -> Result<UnpackReply, Status> {
    let root = File::open(dir).map_err(|error| failed("cannot open", dir, &error))?;
    let mut unpacking = Unpacking {
        root: root.into(),
        parent: None,
        found: wanted.root.as_os_str().is_empty(),
        wanted,
        done: UnpackReply::default(),
        buffer: vec![0; CHUNK],
    };
    let allowance = Rc::new(Cell::new(0));
    let mut archive = tar::Archive::new(Metered { inner: archive, allowance: Rc::clone(&allowance) });
    let broken = |error: io::Error| Status::invalid_argument(format!("the archive cannot be read: {error}"));
    let mut entries = archive.entries().map_err(broken)?;
    loop {
        allowance.set(MAX_HEADER);
        let Some(entry) = entries.next() else { return unpacking.ended() };
        let mut entry = entry.map_err(broken)?;
        allowance.set(usize::MAX);
        unpacking.entry(&mut entry)?;
        io::copy(&mut entry, &mut io::sink()).map_err(broken)?;
    }
}

/// Gives only as much as is allowed: the tar reader holds headers in memory whatever their size.
struct Metered<R> {
    inner: R,
    allowance: Rc<Cell<usize>>,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let allowed = self.allowance.get();
        if allowed == 0 && !buffer.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a header is too large"));
        }
        let most = buffer.len().min(allowed);
        let length = self.inner.read(&mut buffer[..most])?;
        if allowed != usize::MAX {
            self.allowance.set(allowed - length);
        }
        Ok(length)
    }
}

struct Unpacking {
    root: OwnedFd,
    /// The directory of the last entry: the next one is mostly in the same.
    parent: Option<(PathBuf, OwnedFd)>,
    wanted: Wanted,
    /// Whether something of what is wanted was there.
    found: bool,
    done: UnpackReply,
    buffer: Vec<u8>,
}

impl Unpacking {
    fn ended(self) -> Result<UnpackReply, Status> {
        if self.found {
            return Ok(self.done);
        }
        Err(Status::invalid_argument(format!("the archive has no directory {}", self.wanted.root.display())))
    }

    fn entry(&mut self, entry: &mut tar::Entry<'_, impl Read>) -> Result<(), Status> {
        use tar::EntryType::*;
        self.done.entries += 1;
        let limits = self.wanted.limits;
        if self.done.entries > limits.entries {
            return Err(Status::resource_exhausted(format!("more than {} entries", limits.entries)));
        }
        let kind = entry.header().entry_type();
        if kind == XGlobalHeader {
            return Ok(());
        }
        let named = entry.path_bytes();
        let named = inside(Path::new(OsStr::from_bytes(&named)))?;
        let Ok(path) = named.strip_prefix(&self.wanted.root) else { return Ok(()) };
        self.found = true;
        let link = entry.link_name_bytes().map(|link| PathBuf::from(OsStr::from_bytes(&link)));
        let link = || link.ok_or_else(|| Status::invalid_argument(format!("{} leads nowhere", path.display())));
        let mode = Mode::from_bits_truncate(entry.header().mode().unwrap_or(0o644));
        let done = match kind {
            Regular | Continuous | GNUSparse => {
                let mtime = entry.header().mtime().unwrap_or(0);
                return self.file(path, mode, mtime, entry);
            }
            Directory => self.directory(path, mode),
            Symlink => self.symlink(path, &link()?),
            Link => match inside(&link()?)?.strip_prefix(&self.wanted.root) {
                Ok(target) => self.hard_link(path, target),
                Err(_) => Err(Problem::LeadsOut),
            },
            _ => {
                let what = format!("{} is a device, a pipe or a socket", path.display());
                return Err(Status::invalid_argument(what));
            }
        };
        done.map_err(|problem| problem.status(path))
    }

    fn file(&mut self, path: &Path, mode: Mode, mtime: u64, content: &mut impl Read) -> Result<(), Status> {
        let failed = |error: io::Error| failed("cannot unpack", path, &error);
        let mut file = File::from(self.create(path).map_err(|problem| problem.status(path))?);
        loop {
            let length = content
                .read(&mut self.buffer)
                .map_err(|error| Status::invalid_argument(format!("the archive is cut short: {error}")))?;
            if length == 0 {
                break;
            }
            self.done.bytes += length as u64;
            let most = self.wanted.limits.bytes;
            if self.done.bytes > most {
                return Err(Status::resource_exhausted(format!("more than {most} bytes unpacked")));
            }
            file.write_all(&self.buffer[..length]).map_err(failed)?;
        }
        fchmod(&file, mode).map_err(|errno| failed(errno.into()))?;
        // An archive without times is of now: caches and zip files make nothing good of 1970.
        if mtime == 0 {
            return Ok(());
        }
        let time = TimeSpec::new(i64::try_from(mtime).unwrap_or(i64::MAX), 0);
        futimens(&file, &time, &time).map_err(|errno| failed(errno.into()))
    }

    fn create(&mut self, path: &Path) -> Result<OwnedFd, Problem> {
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        self.replacing(path, |parent, name| openat2(parent, name, how(flags).mode(Mode::from_bits_truncate(0o600))))
    }

    fn directory(&mut self, path: &Path, mode: Mode) -> Result<(), Problem> {
        if path.as_os_str().is_empty() {
            return Ok(());
        }
        let (parent, name) = self.parent_of(path)?;
        match mkdirat(parent, name, Mode::S_IRWXU) {
            Err(Errno::EEXIST) => {}
            done => done?,
        }
        let made = openat2(&self.root, path, how(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC))?;
        Ok(fchmod(&made, mode)?)
    }

    fn symlink(&mut self, path: &Path, target: &Path) -> Result<(), Problem> {
        if !stays_inside(path, target) {
            return Err(Problem::LeadsOut);
        }
        self.replacing(path, |parent, name| symlinkat(target, parent, name))?;
        let (parent, name) = self.parent_of(path)?;
        // Nobody minds when the time of a link cannot be set.
        let _ = utimensat(parent, name, &TimeSpec::UTIME_NOW, &TimeSpec::UTIME_NOW, UtimensatFlags::NoFollowSymlink);
        Ok(())
    }

    fn hard_link(&mut self, path: &Path, target: &Path) -> Result<(), Problem> {
        let dir = target.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let from = openat2(&self.root, dir, how(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC))?;
        let name = target.file_name().ok_or(Problem::LeadsOut)?.to_owned();
        self.replacing(path, |parent, new| linkat(&from, name.as_os_str(), parent, new, AtFlags::empty()))
    }

    /// Makes something at `path`, in place of a file or link that is there.
    fn replacing<T>(&mut self, path: &Path, make: impl Fn(&OwnedFd, &OsStr) -> nix::Result<T>) -> Result<T, Problem> {
        let (parent, name) = self.parent_of(path)?;
        match make(parent, name) {
            Err(Errno::EEXIST) => {
                unlinkat(parent, name, UnlinkatFlags::NoRemoveDir)?;
                Ok(make(parent, name)?)
            }
            made => Ok(made?),
        }
    }

    /// The directory of `path`, made when missing, and its name in there.
    fn parent_of<'a>(&mut self, path: &'a Path) -> Result<(&OwnedFd, &'a OsStr), Problem> {
        let name = path.file_name().ok_or(Problem::LeadsOut)?;
        let dir = path.parent().unwrap_or(Path::new(""));
        if dir.as_os_str().is_empty() {
            return Ok((&self.root, name));
        }
        if self.parent.as_ref().is_none_or(|(known, _)| known != dir) {
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            let opened = match openat2(&self.root, dir, how(flags)) {
                Err(Errno::ENOENT) => {
                    let (above, last) = self.parent_of(dir)?;
                    mkdirat(above, last, Mode::from_bits_truncate(0o755))?;
                    openat2(&self.root, dir, how(flags))
                }
                opened => opened,
            };
            self.parent = Some((dir.to_owned(), opened?));
        }
        Ok((self.parent.as_ref().map_or(&self.root, |(_, fd)| fd), name))
    }
}

fn how(flags: OFlag) -> OpenHow {
    OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS)
}

/// Why one entry cannot be made.
#[derive(Debug)]
enum Problem {
    LeadsOut,
    Io(Errno),
}

impl From<Errno> for Problem {
    fn from(errno: Errno) -> Self {
        // What RESOLVE_BENEATH says of a link that leads out.
        if errno == Errno::EXDEV { Self::LeadsOut } else { Self::Io(errno) }
    }
}

impl Problem {
    fn status(&self, path: &Path) -> Status {
        match self {
            Self::LeadsOut => Status::invalid_argument(format!("{} leads out of the directory", path.display())),
            Self::Io(errno) => failed("cannot unpack", path, &(*errno).into()),
        }
    }
}

/// The path without `.`; an error for one that is absolute, has `..` in it or is longer than the kernel takes.
fn inside(path: &Path) -> Result<PathBuf, Status> {
    if path.as_os_str().len() >= nix::libc::PATH_MAX as usize {
        return Err(Status::invalid_argument("a name in the archive is too long"));
    }
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::CurDir => {}
            _ => {
                let what = format!("{} is absolute or holds \"..\"", path.display());
                return Err(Status::invalid_argument(what));
            }
        }
    }
    Ok(plain)
}

/// Whether a link at `path` stays in the directory, as far as its text tells.
fn stays_inside(path: &Path, target: &Path) -> bool {
    let mut depth = path.components().count().saturating_sub(1);
    target.components().all(|part| match part {
        Component::Normal(_) => {
            depth += 1;
            true
        }
        Component::CurDir => true,
        Component::ParentDir => depth.checked_sub(1).map(|less| depth = less).is_some(),
        Component::RootDir | Component::Prefix(_) => false,
    })
}
