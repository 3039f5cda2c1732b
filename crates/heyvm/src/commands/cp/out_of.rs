//! Out of a sandbox. What it streams is hostile: nothing is written but within the target, and no link leads out of it.

use std::{
    fs::{self, File, Permissions},
    io::{self, Read},
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Component, Path, PathBuf},
    time::{Duration, SystemTime},
};

use heyvm_api::{ApiError, ErrorCode, client::Client};
use tar::{Archive, Entry, EntryType};
use tokio_util::io::{StreamReader, SyncIoBridge};

use super::{Copied, Remote, invalid, watched};
use crate::progress::Line;

/// Copies out of a sandbox to `target`.
pub async fn out_of(client: &Client, source: Remote<'_>, target: &Path, line: Line) -> Result<Copied, ApiError> {
    let is_directory = source.is_directory(client).await?;
    let name = source.absolute().trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_owned();
    // A target that is a directory gets a copy in it; any other target becomes the copy.
    let target = if target.is_dir() && !matches!(name.as_str(), "" | "." | "..") {
        target.join(&name)
    } else {
        target.to_owned()
    };
    let pieces = client.stream(&source.tar(&source.absolute()), "application/x-tar").await?;
    let reader = SyncIoBridge::new(StreamReader::new(Box::pin(watched(pieces, line))));
    let unpacked =
        tokio::task::spawn_blocking(
            move || {
                if is_directory { directory(reader, &target) } else { single(reader, &target) }
            },
        );
    unpacked.await.map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))?
}

/// One file, whole or not at all.
fn single(reader: impl Read, target: &Path) -> Result<Copied, ApiError> {
    let mut archive = Archive::new(reader);
    let mut entries = archive.entries().map_err(|error| broken_off(&error))?;
    let mut entry = entries.next().ok_or_else(|| hostile("no file"))?.map_err(|error| broken_off(&error))?;
    if entry.header().entry_type() != EntryType::Regular {
        return Err(hostile("something that is no file"));
    }
    let local = |error: io::Error| failed(target, &error);
    let size = entry.size();
    // What stands for something else stays what it is: a device, a pipe, a link, be it /dev/stdout.
    let stands_for_another = fs::symlink_metadata(target).is_ok_and(|meta| {
        let kind = meta.file_type();
        kind.is_symlink() || kind.is_char_device() || kind.is_block_device() || kind.is_fifo()
    });
    if stands_for_another {
        let mut file = File::options().write(true).create(true).truncate(true).open(target).map_err(local)?;
        copy(&mut entry, &mut file, target, size)?;
    } else {
        let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(parent).map_err(local)?;
        copy(&mut entry, file.as_file_mut(), target, size)?;
        let mode = entry.header().mode().unwrap_or(0o644) & 0o777;
        file.as_file().set_permissions(Permissions::from_mode(mode)).map_err(local)?;
        date(file.as_file(), &entry).map_err(local)?;
        file.persist(target).map_err(|error| local(error.error))?;
    }
    Ok(Copied { bytes: size, entries: 1, left_out: Vec::new() })
}

fn copy(entry: &mut impl Read, file: &mut File, target: &Path, size: u64) -> Result<(), ApiError> {
    let mut watched = Watched { inner: entry, failure: None };
    let copied = io::copy(&mut watched, file);
    if let Some(error) = watched.failure {
        return Err(broken_off(&error));
    }
    match copied {
        Ok(copied) if copied == size => Ok(()),
        Ok(_) => Err(broken_off(&io::ErrorKind::UnexpectedEof.into())),
        Err(error) => Err(failed(target, &error)),
    }
}

/// Tells failures of the stream from failures here.
struct Watched<R> {
    inner: R,
    failure: Option<io::Error>,
}

impl<R: Read> Read for Watched<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer).map_err(|error| {
            let kind = error.kind();
            if kind != io::ErrorKind::Interrupted {
                self.failure = Some(error);
            }
            kind.into()
        })
    }
}

/// A directory with all it holds.
fn directory(reader: impl Read, target: &Path) -> Result<Copied, ApiError> {
    fs::create_dir_all(target).map_err(|error| failed(target, &error))?;
    let mut copy = Copying { target, copied: Copied::default(), modes: Vec::new() };
    let mut archive = Archive::new(reader);
    for entry in archive.entries().map_err(|error| broken_off(&error))? {
        copy.entry(&mut entry.map_err(|error| broken_off(&error))?)?;
    }
    // The stream may end in an error only behind the last entry.
    io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(|error| broken_off(&error))?;
    // Last, and the deepest first: a directory may forbid to write in it.
    for (path, mode) in copy.modes.iter().rev() {
        fs::set_permissions(path, Permissions::from_mode(*mode)).map_err(|error| failed(path, &error))?;
    }
    Ok(copy.copied)
}

struct Copying<'a> {
    target: &'a Path,
    copied: Copied,
    modes: Vec<(PathBuf, u32)>,
}

impl Copying<'_> {
    fn entry(&mut self, entry: &mut Entry<'_, impl Read>) -> Result<(), ApiError> {
        let named = entry.path().map_err(|_| hostile("an entry without a name"))?.into_owned();
        let name = inside(&named).ok_or_else(|| leaves(&named))?;
        let path = self.target.join(&name);
        self.check_parents(&name)?;
        let local = |error: io::Error| failed(&path, &error);
        let mode = entry.header().mode().unwrap_or(0o644) & 0o777;
        match entry.header().entry_type() {
            EntryType::Directory => {
                match fs::create_dir(&path) {
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists && is_real_directory(&path) => {}
                    made => made.map_err(local)?,
                }
                self.modes.push((path, mode));
            }
            EntryType::Regular => {
                remove_file(&path).map_err(local)?;
                let mut file = File::create_new(&path).map_err(local)?;
                copy(entry, &mut file, &path, entry.size())?;
                file.set_permissions(Permissions::from_mode(mode)).map_err(local)?;
                date(&file, entry).map_err(local)?;
                self.copied.bytes += entry.size();
            }
            EntryType::Symlink => {
                let target = entry.link_name().ok().flatten().ok_or_else(|| hostile("a link to nothing"))?;
                if !leads_inside(&name, &target) {
                    self.copied.left_out.push(name.display().to_string());
                    return Ok(());
                }
                remove_file(&path).map_err(local)?;
                std::os::unix::fs::symlink(&target, &path).map_err(local)?;
            }
            kind => return Err(hostile(&format!("{} as {kind:?}", named.display()))),
        }
        self.copied.entries += 1;
        Ok(())
    }

    /// Every directory above an entry is one of the copy, and none is a link.
    fn check_parents(&self, name: &Path) -> Result<(), ApiError> {
        let mut path = self.target.to_owned();
        for part in name.parent().into_iter().flat_map(Path::components) {
            path.push(part);
            if !is_real_directory(&path) {
                return Err(leaves(name));
            }
        }
        Ok(())
    }
}

/// Gives a copy its original's time.
fn date(file: &File, entry: &Entry<'_, impl Read>) -> io::Result<()> {
    let seconds = entry.header().mtime().unwrap_or(0);
    let time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).filter(|_| seconds > 0);
    time.map_or(Ok(()), |time| file.set_modified(time))
}

fn is_real_directory(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir())
}

/// What is there makes way, a link too, which is not followed.
fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The name without `.`; `None` for one that is empty, absolute, or has `..` in it.
fn inside(name: &Path) -> Option<PathBuf> {
    let mut clean = PathBuf::new();
    for part in name.components() {
        match part {
            Component::Normal(part) => clean.push(part),
            Component::CurDir => {}
            _ => return None,
        }
    }
    Some(clean).filter(|clean| !clean.as_os_str().is_empty())
}

/// Up no further than to the top, then only down: what a `..` behind a name leads to depends on other links.
fn leads_inside(name: &Path, target: &Path) -> bool {
    let mut up = 0;
    let mut parts = target.components().filter(|part| *part != Component::CurDir).peekable();
    while parts.next_if_eq(&Component::ParentDir).is_some() {
        up += 1;
    }
    up < name.components().count() && parts.all(|part| matches!(part, Component::Normal(_)))
}

fn leaves(name: &Path) -> ApiError {
    hostile(&format!("{}, which leaves the copy", name.display()))
}

fn hostile(what: &str) -> ApiError {
    ApiError::new(ErrorCode::ArchiveInvalid, format!("the sandbox sent {what}"))
        .hint("do not trust what runs in it; what was copied before this is in the target")
}

fn broken_off(error: &io::Error) -> ApiError {
    ApiError::new(ErrorCode::SandboxUnreachable, format!("the copy broke off: {error}"))
        .hint("heyvm get NAME says whether the sandbox still runs")
}

fn failed(path: &Path, error: &io::Error) -> ApiError {
    let message = format!("{}: {error}", path.display());
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            ApiError::new(ErrorCode::OutOfResources, message).hint("make room, or copy to another disk")
        }
        io::ErrorKind::NotFound => invalid(message).hint("make the directory that it goes in first"),
        _ => invalid(message).hint("copy to a place that is yours to write to"),
    }
}

#[cfg(test)]
mod tests;
