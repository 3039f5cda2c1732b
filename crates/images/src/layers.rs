//! Layers of an image, applied one over the other to a directory. Every byte is somebody else's.
//! Format: OCI image specification, "layer": tar archives with `.wh.` whiteouts.
//!
//! No name is ever looked up through a symbolic link: each directory on the way is checked first, and a link in its place
//! is replaced, so that nothing is written outside of the root whatever the layers hold.

use std::{
    fs::{self, File},
    io::{self, BufReader, Read},
    os::unix::fs::{PermissionsExt, lchown, symlink},
    path::{Component, Path, PathBuf},
};

use nix::{
    libc::dev_t,
    sys::stat::{Mode, SFlag, makedev, mknod},
    unistd::getuid,
};
use tar::{Entry, EntryType};

use crate::Error;

/// What an image may unpack to, in bytes, and in entries.
const MAX_BYTES: u64 = 32 << 30;
const MAX_ENTRIES: u64 = 2_000_000;
const WHITEOUT: &str = ".wh.";
const OPAQUE: &str = ".wh..wh..opq";

/// Counts what all layers of an image hold together.
#[derive(Debug, Default)]
pub struct Budget {
    bytes: u64,
    entries: u64,
}

/// Applies one layer file, compressed or not, over what is in `root`.
pub fn apply(layer: &Path, root: &Path, budget: &mut Budget) -> Result<(), Error> {
    let mut archive = tar::Archive::new(open(layer)?);
    let broken = |error: io::Error| match error.kind() {
        io::ErrorKind::StorageFull => Error::OutOfResources("disk space"),
        _ => Error::invalid(format!("a layer cannot be unpacked: {error}")),
    };
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        budget.entries += 1;
        budget.bytes = budget.bytes.saturating_add(entry.size());
        if budget.entries > MAX_ENTRIES || budget.bytes > MAX_BYTES {
            return Err(Error::invalid("the image unpacks to more than is allowed"));
        }
        let path = entry.path().map_err(broken)?.into_owned();
        let Some(name) = inside(&path) else {
            return Err(Error::invalid(format!("{} leaves the image's root", path.display())));
        };
        if !name.as_os_str().is_empty() {
            place(&mut entry, root, &name).map_err(broken)?;
        }
    }
    Ok(())
}

/// A file as what it says it is at its beginning: gzip, zstd, xz, or plain.
pub fn open(path: &Path) -> Result<Box<dyn Read>, Error> {
    let opened = || -> io::Result<Box<dyn Read>> {
        let mut magic = [0; 6];
        let length = File::open(path)?.read(&mut magic)?;
        let file = BufReader::new(File::open(path)?);
        Ok(match &magic[..length] {
            [0x1f, 0x8b, ..] => Box::new(flate2::read::MultiGzDecoder::new(file)),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::Decoder::with_buffer(file)?),
            [0xfd, b'7', b'z', b'X', b'Z', 0] => Box::new(xz2::read::XzDecoder::new(file)),
            _ => Box::new(file),
        })
    };
    opened().map_err(Error::io("reading", path))
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

fn place(entry: &mut Entry<'_, impl Read>, root: &Path, name: &Path) -> io::Result<()> {
    let parent = real_dir(root, name.parent().unwrap_or(Path::new("")))?;
    let last = name.file_name().unwrap_or_default();
    let text = last.to_string_lossy();
    if text == OPAQUE {
        return empty(&parent);
    }
    if let Some(hidden) = text.strip_prefix(WHITEOUT) {
        return clear(&parent.join(hidden));
    }
    let target = parent.join(last);
    let kind = entry.header().entry_type();
    if kind != EntryType::Directory || !fs::symlink_metadata(&target).is_ok_and(|meta| meta.is_dir()) {
        clear(&target)?;
    }
    let mode = entry.header().mode()? & 0o7777;
    match kind {
        EntryType::Directory => match fs::create_dir(&target) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        },
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            io::copy(entry, &mut File::options().write(true).create_new(true).open(&target)?)?;
        }
        EntryType::Symlink => symlink(link_target(entry)?, &target)?,
        EntryType::Link => {
            let existing =
                inside(&link_target(entry)?).ok_or_else(|| io::Error::other("a hard link leaves the root"))?;
            let dir = real_dir(root, existing.parent().unwrap_or(Path::new("")))?;
            return fs::hard_link(dir.join(existing.file_name().unwrap_or_default()), &target);
        }
        EntryType::Char | EntryType::Block | EntryType::Fifo => {
            if !make_special(entry, kind, &target, mode)? {
                return Ok(());
            }
        }
        // Headers for what follows, and kinds nobody knows.
        _ => return Ok(()),
    }
    own(entry, &target, mode, kind == EntryType::Symlink)
}

fn link_target(entry: &Entry<'_, impl Read>) -> io::Result<PathBuf> {
    Ok(entry.link_name()?.ok_or_else(|| io::Error::other("a link leads nowhere"))?.into_owned())
}

/// Devices are for root to make, and mean something in the guest alone.
fn make_special(entry: &Entry<'_, impl Read>, kind: EntryType, target: &Path, mode: u32) -> io::Result<bool> {
    if !getuid().is_root() {
        return Ok(false);
    }
    let number = |part: Option<u32>| dev_t::from(part.unwrap_or(0));
    let device = makedev(number(entry.header().device_major()?), number(entry.header().device_minor()?));
    let flag = match kind {
        EntryType::Char => SFlag::S_IFCHR,
        EntryType::Block => SFlag::S_IFBLK,
        _ => SFlag::S_IFIFO,
    };
    mknod(target, flag, Mode::from_bits_truncate(mode), device)?;
    Ok(true)
}

fn own(entry: &mut Entry<'_, impl Read>, target: &Path, mode: u32, is_link: bool) -> io::Result<()> {
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

/// The directory `name` below `root`, made where it is missing; a link or a file in its way makes place.
fn real_dir(root: &Path, name: &Path) -> io::Result<PathBuf> {
    let mut dir = root.to_owned();
    for part in name.components() {
        dir.push(part);
        match fs::symlink_metadata(&dir) {
            Ok(meta) if meta.is_dir() => {}
            // Distributions link /bin to usr/bin: a later layer's bin/sh belongs behind that link, as long as it stays inside.
            Ok(meta) if meta.file_type().is_symlink() => dir = followed(root, &dir)?,
            Ok(_) => {
                fs::remove_file(&dir)?;
                fs::create_dir(&dir)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => fs::create_dir(&dir)?,
            Err(error) => return Err(error),
        }
    }
    Ok(dir)
}

/// Where a directory link leads, taken as within the root; it must be a real directory without further links.
fn followed(root: &Path, link: &Path) -> io::Result<PathBuf> {
    let target = fs::read_link(link)?;
    let base = if target.is_absolute() {
        Path::new("")
    } else {
        link.parent().and_then(|p| p.strip_prefix(root).ok()).unwrap_or(Path::new(""))
    };
    let mut dir = PathBuf::new();
    for part in base.join(&target).components() {
        match part {
            Component::Normal(part) => dir.push(part),
            Component::ParentDir => drop(dir.pop()),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    let mut real = root.to_owned();
    for part in dir.components() {
        real.push(part);
        match fs::symlink_metadata(&real) {
            Ok(meta) if meta.is_dir() => {}
            Ok(_) => return Err(io::Error::other(format!("{} is a link to a link", link.display()))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => fs::create_dir(&real)?,
            Err(error) => return Err(error),
        }
    }
    Ok(real)
}

fn empty(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        clear(&entry?.path())?;
    }
    Ok(())
}

fn clear(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

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
}
