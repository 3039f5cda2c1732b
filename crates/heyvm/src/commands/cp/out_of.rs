//! Out of a sandbox. What it streams is hostile: directories go through `heyvm-bounded-tar`, which writes nothing but below
//! the target and makes no link that leads out of it, also while the guest changes the target through a mount.

use std::{
    fs::{self, File, Permissions},
    io::{self, Read, Write},
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::Path,
    time::{Duration, SystemTime},
};

use heyvm_api::{ApiError, ErrorCode, client::Client};
use heyvm_bounded_tar::{Entry, EntryType, Error, LeftOut, MAX_HEADER, Metered, Options, entries, unpack};
use tokio_util::io::{StreamReader, SyncIoBridge};

use super::{Copied, Remote, STANDARD, invalid, watched};
use crate::{archive::listed, progress::Line};

/// Copies out of a sandbox to `target`.
pub async fn out_of(client: &Client, source: Remote<'_>, target: &Path, line: Line) -> Result<Copied, ApiError> {
    let is_directory = source.is_directory(client).await?;
    let to_standard = target.as_os_str() == STANDARD;
    if is_directory && to_standard {
        return Err(invalid(format!("{} is a directory", source.path)).hint("Copy one file to the standard output."));
    }
    let name = source.absolute().trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_owned();
    // A target that is a directory gets a copy in it; any other target becomes the copy.
    let target = if !to_standard && target.is_dir() && !matches!(name.as_str(), "" | "." | "..") {
        target.join(&name)
    } else {
        target.to_owned()
    };
    let pieces = client.stream(&source.tar(&source.absolute()), "application/x-tar").await?;
    let reader = SyncIoBridge::new(StreamReader::new(Box::pin(watched(pieces, line))));
    let unpacked = tokio::task::spawn_blocking(move || match (is_directory, to_standard) {
        (true, _) => directory(reader, &target),
        (false, true) => only(reader, to_stdout),
        (false, false) => only(reader, |entry| single(entry, &target)),
    });
    unpacked.await.map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))?
}

/// The one file of a stream.
fn only<R: Read>(
    reader: R,
    mut take: impl FnMut(&mut Entry<'_, Metered<R>>) -> Result<u64, ApiError>,
) -> Result<Copied, ApiError> {
    let mut copied = None;
    entries(
        reader,
        MAX_HEADER,
        |error| broken_off(&error),
        |entry| {
            if !matches!(entry.header().entry_type(), EntryType::Regular | EntryType::GNUSparse) {
                return Err(hostile("something that is no file"));
            }
            copied = Some(take(entry)?);
            Ok(false)
        },
    )?;
    let bytes = copied.ok_or_else(|| hostile("no file"))?;
    Ok(Copied { bytes, entries: 1, ..Copied::default() })
}

/// A file's bytes alone.
fn to_stdout(entry: &mut Entry<'_, impl Read>) -> Result<u64, ApiError> {
    let size = entry.size();
    copy(entry, &mut io::stdout().lock(), Path::new("standard output"), size)
}

/// One file, whole or not at all.
fn single(entry: &mut Entry<'_, impl Read>, target: &Path) -> Result<u64, ApiError> {
    let local = |error: io::Error| failed(target, &error);
    let size = entry.size();
    // What stands for something else stays what it is: a device, a pipe, a link, be it /dev/stdout.
    let stands_for_another = fs::symlink_metadata(target).is_ok_and(|meta| {
        let kind = meta.file_type();
        kind.is_symlink() || kind.is_char_device() || kind.is_block_device() || kind.is_fifo()
    });
    if stands_for_another {
        let mut file = File::options().write(true).create(true).truncate(true).open(target).map_err(local)?;
        return copy(entry, &mut file, target, size);
    }
    let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(parent).map_err(local)?;
    copy(entry, file.as_file_mut(), target, size)?;
    let mode = entry.header().mode().unwrap_or(0o644) & 0o777;
    file.as_file().set_permissions(Permissions::from_mode(mode)).map_err(local)?;
    date(file.as_file(), entry).map_err(local)?;
    file.persist(target).map_err(|error| local(error.error))?;
    Ok(size)
}

fn copy(entry: &mut impl Read, out: &mut impl Write, target: &Path, size: u64) -> Result<u64, ApiError> {
    let mut buffer = vec![0; 64 << 10];
    let mut copied = 0;
    loop {
        let length = match entry.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(broken_off(&error)),
        };
        out.write_all(&buffer[..length]).map_err(|error| failed(target, &error))?;
        copied += length as u64;
    }
    out.flush().map_err(|error| failed(target, &error))?;
    if copied == size { Ok(size) } else { Err(broken_off(&io::ErrorKind::UnexpectedEof.into())) }
}

/// A directory with all it holds.
fn directory(reader: impl Read, target: &Path) -> Result<Copied, ApiError> {
    fs::create_dir_all(target).map_err(|error| failed(target, &error))?;
    let (done, mut rest) = unpack(target, &Options::for_the_host(), reader).map_err(|error| refused(target, error))?;
    // The stream may end in an error only behind the last entry.
    io::copy(&mut rest, &mut io::sink()).map_err(|error| broken_off(&error))?;
    Ok(Copied { bytes: done.bytes, entries: done.entries, notes: left_out(&done.left_out).into_iter().collect() })
}

/// One line about links that lead out of the copy.
fn left_out(links: &LeftOut) -> Option<String> {
    let names = listed(links.names.iter().map(|name| name.display().to_string()), links.count);
    match links.count {
        0 => None,
        1 => Some(format!("1 link was left out, which leads out of the copy: {names}")),
        count => Some(format!("{count} links were left out, which lead out of the copy: {names}")),
    }
}

/// Gives a copy its original's time.
fn date(file: &File, entry: &Entry<'_, impl Read>) -> io::Result<()> {
    let seconds = entry.header().mtime().unwrap_or(0);
    let time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).filter(|_| seconds > 0);
    time.map_or(Ok(()), |time| file.set_modified(time))
}

fn refused(target: &Path, error: Error) -> ApiError {
    match error {
        Error::Broken(error) => broken_off(&error),
        Error::Refused { path, why } => hostile(&format!("{}, which {why}", path.display())),
        Error::TooMuch(what) => hostile(&format!("more than {what}")),
        Error::Io { path, source } => failed(&target.join(path), &source),
    }
}

fn hostile(what: &str) -> ApiError {
    ApiError::new(ErrorCode::ArchiveInvalid, format!("the sandbox sent {what}"))
        .hint("do not trust what runs in it; what was copied before this is in the target")
}

fn broken_off(error: &io::Error) -> ApiError {
    if error.kind() == io::ErrorKind::InvalidData {
        return hostile(&format!("no tar that can be read: {error}"));
    }
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
