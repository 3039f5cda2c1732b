//! Layers of an image, applied one over the other to a directory. Every byte is somebody else's.
//! Format: OCI image specification, "layer": tar archives with `.wh.` whiteouts.
//!
//! The root is a directory that nobody else can enter. Names are looked up in [`Layer::real_dir`] alone, which takes every
//! link as within the root, so that nothing is written outside of it whatever the layers hold.
#![expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]

use std::{
    collections::{HashMap, HashSet, VecDeque},
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, Read},
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt, lchown, symlink},
    },
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::AT_FDCWD,
    libc::dev_t,
    sys::{
        stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat},
        time::TimeSpec,
    },
    unistd::getuid,
};
use tar::{Entry, EntryType};

use crate::{Error, archive};

/// What an image may unpack to, in bytes, and in entries.
pub const MAX_BYTES: u64 = 32 << 30;
const MAX_ENTRIES: u64 = 2_000_000;
/// How deep directories may lie in one another.
const MAX_DEPTH: usize = 256;
/// As many links on the way to a file as Linux follows.
const MAX_LINKS: usize = 40;
/// Time of a directory of which no entry tells one: any, but the same each time.
const UNTOLD: u64 = 0;
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Records that a union file system of old kept for itself.
const ANOTHERS: &[u8] = b".wh..wh.";

/// Counts what all layers of an image make together, also the directories that no entry names.
#[derive(Debug, Default)]
pub struct Budget {
    bytes: u64,
    entries: u64,
}

impl Budget {
    fn take(&mut self, bytes: u64) -> io::Result<()> {
        self.entries += 1;
        self.bytes = self.bytes.saturating_add(bytes);
        if self.entries > MAX_ENTRIES || self.bytes > MAX_BYTES {
            return Err(io::Error::other("the image unpacks to more than is allowed"));
        }
        Ok(())
    }
}

/// Applies one layer file, compressed or not, over what is in `root`.
pub fn apply(file: &Path, root: &Path, budget: &mut Budget) -> Result<(), Error> {
    let broken = |error: io::Error| match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::OutOfResources("disk space"),
        _ => Error::invalid(format!("a layer cannot be unpacked: {error}")),
    };
    let dirs = HashMap::from([(PathBuf::new(), UNTOLD)]);
    let mut layer = Layer { root, budget, placed: HashSet::new(), dirs };
    archive::each(file, broken, |entry| {
        layer.budget.take(entry.size()).map_err(broken)?;
        let path = entry.path().map_err(broken)?.into_owned();
        let Some(name) = inside(&path) else {
            return Err(Error::invalid(format!("{} leaves the image's root", path.display())));
        };
        if !name.as_os_str().is_empty() {
            layer.place(entry, &name).map_err(broken)?;
        }
        Ok(true)
    })?;
    layer.date_dirs().map_err(broken)
}

/// The path below the root; `None` when it leaves it.
fn inside(path: &Path) -> Option<PathBuf> {
    let mut name = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(part) => name.push(part),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    Some(name)
}

/// One layer on its way into the root.
struct Layer<'a> {
    root: &'a Path,
    budget: &'a mut Budget,
    /// What this layer brought, below the root, with the directories above it: its whiteouts hide what was there before it alone.
    placed: HashSet<PathBuf>,
    /// Directories it changes and the times they shall have, which hold only once all else is in place.
    dirs: HashMap<PathBuf, u64>,
}

impl Layer<'_> {
    fn place(&mut self, entry: &mut Entry<'_, impl Read>, name: &Path) -> io::Result<()> {
        let parent = self.real_dir(name.parent().unwrap_or(Path::new("")))?;
        self.keep_time(&parent)?;
        let last = name.file_name().unwrap_or_default();
        if last.as_bytes() == OPAQUE {
            return self.empty(&parent);
        }
        if last.as_bytes().starts_with(ANOTHERS) {
            return Ok(());
        }
        if let Some(hidden) = last.as_bytes().strip_prefix(WHITEOUT) {
            return self.hide(&parent, OsStr::from_bytes(hidden));
        }
        let below = parent.join(last);
        let target = self.root.join(&below);
        let kind = entry.header().entry_type();
        if kind != EntryType::Directory || !fs::symlink_metadata(&target).is_ok_and(|meta| meta.is_dir()) {
            clear(&target)?;
        }
        let mode = mode(entry, kind)?;
        match kind {
            EntryType::Directory => match fs::create_dir(&target) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => drop(self.dirs.insert(below.clone(), entry.header().mtime()?)),
            },
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let mut file = File::options().write(true).create_new(true).open(&target)?;
                if io::copy(entry, &mut file)? != entry.size() {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            EntryType::Symlink => symlink(link_target(entry)?, &target)?,
            EntryType::Link => {
                let existing =
                    inside(&link_target(entry)?).ok_or_else(|| io::Error::other("a hard link leaves the root"))?;
                let dir = self.real_dir(existing.parent().unwrap_or(Path::new("")))?;
                let existing = self.root.join(dir).join(existing.file_name().unwrap_or_default());
                fs::hard_link(existing, &target)?;
                self.mark(&below);
                return Ok(());
            }
            EntryType::Char | EntryType::Block | EntryType::Fifo => {
                if !make_special(entry, kind, &target, mode)? {
                    return Ok(());
                }
            }
            // Headers for what follows, and kinds nobody knows.
            _ => return Ok(()),
        }
        self.mark(&below);
        own(entry, &target, mode, kind == EntryType::Symlink)?;
        date(&target, entry.header().mtime()?)
    }

    /// What is above one that is there already is there, too.
    fn mark(&mut self, below: &Path) {
        for path in below.ancestors() {
            if !self.placed.insert(path.to_owned()) {
                return;
            }
        }
    }

    /// The directory that `name` leads to, below the root and free of links; made where it is missing. A link leads to
    /// where it would in the guest: distributions link /bin to usr/bin, and a later layer's bin/sh belongs behind that.
    fn real_dir(&mut self, name: &Path) -> io::Result<PathBuf> {
        let mut to_go: VecDeque<OsString> = parts(name).collect();
        let (mut real, mut links) = (PathBuf::new(), 0);
        while let Some(part) = to_go.pop_front() {
            if part == ".." {
                real.pop();
                continue;
            }
            let next = self.root.join(&real).join(&part);
            match fs::symlink_metadata(&next) {
                Ok(meta) if meta.is_dir() => real.push(part),
                Ok(meta) if meta.is_symlink() => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(io::Error::other(format!("too many links on the way to {}", name.display())));
                    }
                    let target = fs::read_link(&next)?;
                    if target.is_absolute() {
                        real.clear();
                    }
                    to_go = parts(&target).chain(to_go).collect();
                }
                other => {
                    match other {
                        Ok(_) => fs::remove_file(&next)?,
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                        Err(error) => return Err(error),
                    }
                    if real.iter().count() >= MAX_DEPTH {
                        return Err(io::Error::other(format!("directories lie more than {MAX_DEPTH} deep")));
                    }
                    self.budget.take(0)?;
                    self.keep_time(&real)?;
                    fs::create_dir(&next)?;
                    real.push(part);
                    self.dirs.insert(real.clone(), UNTOLD);
                }
            }
        }
        Ok(real)
    }

    fn hide(&self, parent: &Path, hidden: &OsStr) -> io::Result<()> {
        // ".wh..." would name the directory above.
        if !matches!(Path::new(hidden).components().next(), Some(Component::Normal(_))) {
            return Err(io::Error::other("a whiteout hides no file"));
        }
        let below = parent.join(hidden);
        if self.placed.contains(&below) { Ok(()) } else { clear(&self.root.join(below)) }
    }

    /// Removes what earlier layers have in a directory.
    fn empty(&self, dir: &Path) -> io::Result<()> {
        for entry in fs::read_dir(self.root.join(dir))? {
            let entry = entry?;
            let below = dir.join(entry.file_name());
            if !self.placed.contains(&below) {
                clear(&entry.path())?;
            } else if entry.file_type()?.is_dir() {
                self.empty(&below)?;
            }
        }
        Ok(())
    }

    /// A change in a directory shall not show in its time, unless the layer says so.
    fn keep_time(&mut self, dir: &Path) -> io::Result<()> {
        if !self.dirs.contains_key(dir) {
            let time = u64::try_from(fs::symlink_metadata(self.root.join(dir))?.mtime()).unwrap_or(UNTOLD);
            self.dirs.insert(dir.to_owned(), time);
        }
        Ok(())
    }

    fn date_dirs(&self) -> io::Result<()> {
        for (dir, time) in &self.dirs {
            // A later entry may have put a link in its place, or in that of a directory above it.
            let still = |dir: &Path| fs::symlink_metadata(self.root.join(dir)).is_ok_and(|meta| meta.is_dir());
            if dir.ancestors().all(still) {
                date(&self.root.join(dir), *time)?;
            }
        }
        Ok(())
    }
}

fn parts(path: &Path) -> impl Iterator<Item = OsString> {
    path.components().filter_map(|part| match part {
        Component::Normal(_) | Component::ParentDir => Some(part.as_os_str().to_owned()),
        Component::CurDir | Component::RootDir | Component::Prefix(_) => None,
    })
}

fn link_target(entry: &Entry<'_, impl Read>) -> io::Result<PathBuf> {
    Ok(entry.link_name()?.ok_or_else(|| io::Error::other("a link leads nowhere"))?.into_owned())
}

/// The entry's permissions; for a user who is not root, such that what is made can be filled and read.
fn mode(entry: &Entry<'_, impl Read>, kind: EntryType) -> io::Result<u32> {
    let mode = entry.header().mode()? & 0o7777;
    Ok(match kind {
        _ if getuid().is_root() => mode,
        EntryType::Directory => mode | 0o700,
        _ => mode | 0o400,
    })
}

/// Devices are for root to make, where even root may, and mean something in the guest alone.
fn make_special(entry: &Entry<'_, impl Read>, kind: EntryType, target: &Path, mode: u32) -> io::Result<bool> {
    let number = |part: io::Result<Option<u32>>| Ok::<_, io::Error>(dev_t::from(part?.unwrap_or(0)));
    let (flag, device) = match kind {
        // GNU tar leaves a FIFO's numbers empty.
        EntryType::Fifo => (SFlag::S_IFIFO, 0),
        kind => {
            let flag = if kind == EntryType::Char { SFlag::S_IFCHR } else { SFlag::S_IFBLK };
            (flag, makedev(number(entry.header().device_major())?, number(entry.header().device_minor())?))
        }
    };
    match mknod(target, flag, Mode::from_bits_truncate(mode), device) {
        Err(Errno::EPERM) => Ok(false),
        made => Ok(made.map(|()| true)?),
    }
}

fn own(entry: &Entry<'_, impl Read>, target: &Path, mode: u32, is_link: bool) -> io::Result<()> {
    if getuid().is_root() {
        let id = |id: u64| u32::try_from(id).ok();
        lchown(target, id(entry.header().uid()?), id(entry.header().gid()?))?;
    }
    if !is_link {
        // After the owner: a change of owner takes set-user-id away.
        fs::set_permissions(target, fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

fn date(target: &Path, time: u64) -> io::Result<()> {
    let time = TimeSpec::new(i64::try_from(time).unwrap_or(i64::MAX), 0);
    Ok(utimensat(AT_FDCWD, target, &time, &time, UtimensatFlags::NoFollowSymlink)?)
}

fn clear(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => Ok(heyvm_trees::remove(path)?),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use tar::{Builder, Header};

    use super::*;

    fn layer(entries: &[(&str, EntryType, &str)]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut builder = Builder::new(file.as_file());
        for (name, kind, content) in entries {
            let mut header = Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(0o755);
            let gnu = header.as_gnu_mut().unwrap();
            gnu.name[..name.len()].copy_from_slice(name.as_bytes());
            let is_file = *kind == EntryType::Regular;
            if !is_file {
                gnu.linkname[..content.len()].copy_from_slice(content.as_bytes());
            }
            header.set_uid(nix::unistd::getuid().as_raw().into());
            header.set_gid(nix::unistd::getgid().as_raw().into());
            let data = if is_file { content.as_bytes() } else { &[] };
            header.set_size(data.len() as u64);
            header.set_mtime(1_000);
            header.set_cksum();
            builder.append(&header, data).unwrap();
        }
        builder.finish().unwrap();
        drop(builder);
        file
    }

    fn applied(layers: &[&[(&str, EntryType, &str)]]) -> (tempfile::TempDir, Result<(), Error>) {
        let root = tempfile::tempdir().unwrap();
        let mut budget = Budget::default();
        let done = layers.iter().try_for_each(|entries| apply(layer(entries).path(), root.path(), &mut budget));
        (root, done)
    }

    use EntryType::{Directory, Link, Regular, Symlink};

    #[test]
    fn later_layers_hide_earlier_ones() {
        let (root, done) = applied(&[
            &[("a/one", Regular, "1"), ("a/two", Regular, "2"), ("b/three", Regular, "3")],
            &[("a/.wh.one", Regular, ""), ("b/.wh..wh..opq", Regular, ""), ("b/four", Regular, "4")],
        ]);
        done.unwrap();
        assert!(!root.path().join("a/one").exists() && root.path().join("a/two").exists());
        assert!(!root.path().join("b/three").exists() && root.path().join("b/four").exists());
    }

    #[test]
    fn fifos_of_every_tar_format_are_taken() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        fs::create_dir(&from).unwrap();
        nix::unistd::mkfifo(&from.join("fifo"), Mode::S_IRWXU).unwrap();
        for format in ["gnu", "oldgnu", "ustar", "posix"] {
            let (tar, root) = (dir.path().join(format!("{format}.tar")), dir.path().join(format));
            let mut packing = std::process::Command::new("tar");
            packing.arg("--format").arg(format).arg("-cf").arg(&tar).arg("-C").arg(&from).arg(".");
            assert!(packing.status().unwrap().success());
            fs::create_dir(&root).unwrap();
            apply(&tar, &root, &mut Budget::default()).unwrap();
            let made = fs::symlink_metadata(root.join("fifo")).map(|meta| meta.file_type());
            assert!(std::os::unix::fs::FileTypeExt::is_fifo(&made.unwrap()), "{format}");
        }
    }

    #[test]
    fn a_linked_directory_is_followed_within_the_root() {
        let (root, done) = applied(&[
            &[("usr/bin", Directory, ""), ("bin", Symlink, "usr/bin")],
            &[("bin/sh", Regular, "shell"), ("sh", Link, "bin/sh")],
        ]);
        done.unwrap();
        assert_eq!(fs::read_to_string(root.path().join("usr/bin/sh")).unwrap(), "shell");
        assert_eq!(fs::metadata(root.path().join("sh")).unwrap().nlink(), 2);
    }

    #[test]
    fn nothing_leaves_the_root() {
        let outside = tempfile::tempdir().unwrap();
        let out = outside.path().to_str().unwrap();
        let (root, done) = applied(&[&[("link", Symlink, out), ("link/file", Regular, "x")]]);
        done.unwrap();
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0, "the absolute link was taken as within the root");
        assert!(root.path().join(out.trim_start_matches('/')).join("file").exists());
        for hostile in [("../evil", Regular, "x"), ("a/../../evil", Regular, "x"), ("l", Link, "../../etc/passwd")] {
            let (_root, done) = applied(&[&[hostile]]);
            assert!(done.is_err(), "{hostile:?}");
        }
    }

    #[test]
    fn a_whiteout_hides_a_file_beside_it_and_nothing_else() {
        let (root, done) = applied(&[&[("a/.wh...", Regular, "")]]);
        assert!(done.is_err() && root.path().join("a").exists());
        for name in [".wh.", ".wh..", ".wh..."] {
            let (root, done) = applied(&[&[("kept", Regular, "1")], &[(name, Regular, "")]]);
            assert!(done.is_err() && root.path().join("kept").exists(), "{name}");
        }
        let (root, done) = applied(&[
            &[("d/old", Regular, "1"), ("d/sub/old", Regular, "1")],
            &[
                ("d/new", Regular, "2"),
                ("d/sub/new", Regular, "2"),
                ("d/.wh..wh..opq", Regular, ""),
                ("d/.wh.new", Regular, ""),
            ],
        ]);
        done.unwrap();
        let names = |dir: &str| -> Vec<_> {
            fs::read_dir(root.path().join(dir)).unwrap().map(|entry| entry.unwrap().file_name()).collect()
        };
        assert_eq!((names("d").len(), names("d/sub")), (2, vec!["new".into()]));
    }

    #[test]
    fn links_to_links_are_followed_and_circles_refused() {
        let (root, done) = applied(&[&[
            ("run", Directory, ""),
            ("var/run", Symlink, "/one"),
            ("one", Symlink, "../../run"),
            ("var/run/file", Regular, "x"),
        ]]);
        done.unwrap();
        assert!(root.path().join("run/file").exists());
        let (_root, done) = applied(&[&[("a", Symlink, "b"), ("b", Symlink, "a"), ("a/file", Regular, "x")]]);
        assert!(done.unwrap_err().to_string().contains("too many links"));
    }

    #[test]
    fn a_directory_that_became_a_link_gives_its_time_to_nobody() {
        let outside = tempfile::tempdir().unwrap();
        fs::create_dir(outside.path().join("b")).unwrap();
        let out = outside.path().to_str().unwrap();
        let (_root, done) = applied(&[&[("a/b", Directory, ""), ("a", Symlink, out)]]);
        done.unwrap();
        assert_ne!(fs::metadata(outside.path().join("b")).unwrap().mtime(), 1_000);
    }

    #[test]
    fn directories_that_nobody_names_count_too() {
        let entries = layer(&[("a/b/c/d", Regular, ""), ("a/b/c/e", Regular, "")]);
        for (left, fits) in [(5, true), (4, false)] {
            let root = tempfile::tempdir().unwrap();
            let mut budget = Budget { entries: MAX_ENTRIES - left, bytes: 0 };
            assert_eq!(apply(entries.path(), root.path(), &mut budget).is_ok(), fits, "{left}");
        }
    }

    #[test]
    fn directories_are_not_endlessly_deep() {
        let deep = |depth: usize| {
            let file = tempfile::NamedTempFile::new().unwrap();
            let mut builder = Builder::new(file.as_file());
            let mut header = Header::new_gnu();
            header.set_size(0);
            header.set_uid(getuid().as_raw().into());
            header.set_gid(nix::unistd::getgid().as_raw().into());
            header.set_mode(0o644);
            header.set_mtime(0);
            builder.append_data(&mut header, "d/".repeat(depth) + "file", io::empty()).unwrap();
            builder.finish().unwrap();
            drop(builder);
            let root = tempfile::tempdir().unwrap();
            apply(file.path(), root.path(), &mut Budget::default())
        };
        deep(MAX_DEPTH).unwrap();
        let error = deep(MAX_DEPTH + 1).unwrap_err();
        assert!(error.to_string().contains("more than 256 deep"), "{error}");
    }

    #[test]
    fn what_is_held_in_memory_is_bounded() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut builder = Builder::new(zstd::Encoder::new(file.as_file(), 1).unwrap().auto_finish());
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::GNULongName);
        header.set_size(64 << 20);
        header.set_cksum();
        builder.append(&header, io::repeat(b'x').take(64 << 20)).unwrap();
        drop(builder);
        let root = tempfile::tempdir().unwrap();
        let error = apply(file.path(), root.path(), &mut Budget::default()).unwrap_err();
        assert!(error.to_string().contains("header is too large"), "{error}");
    }
}
