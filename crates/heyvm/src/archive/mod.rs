//! A directory as a tar.gz: what is left out, what is refused. The same files give the same bytes.
//!
//! - [`listing`]: what goes along.  [`entry`]: one file, directory or link as an entry of a tar.

pub mod entry;
mod listing;

use std::{
    fs::{self, File},
    io::{self, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use flate2::{Compression, GzBuilder, write::GzEncoder};
use heyvm_api::{ApiError, ErrorCode};
use tar::Builder;

use entry::{Problem, Purpose};

/// Packs `directory` into an unlinked file, rewound. Tells after each file how many bytes the archive has by then.
pub fn pack(directory: &Path, no_ignore: bool, told: impl FnMut(u64)) -> Result<File, ApiError> {
    let root = root_of(directory)?;
    let paths = listing::paths(&root, no_ignore)?;
    if paths.is_empty() {
        return Err(refused(
            format!("{} holds nothing to deploy", directory.display()),
            "files that .gitignore, .heyvmignore or the default list leave out do not count; --no-ignore takes them",
        ));
    }
    write(&root, &paths, told)
}

fn root_of(directory: &Path) -> Result<PathBuf, ApiError> {
    let meta = fs::metadata(directory).map_err(|error| {
        let hint = match error.kind() {
            io::ErrorKind::PermissionDenied => "make it readable: heyvm runs as you",
            _ => "name a directory that is there",
        };
        refused(format!("{} cannot be deployed: {error}", directory.display()), hint)
    })?;
    if !meta.is_dir() {
        return Err(refused(format!("{} is not a directory", directory.display()), "name the directory the app is in"));
    }
    directory.canonicalize().map_err(|error| refuse(&Problem::io(directory, error)))
}

fn write(root: &Path, paths: &[PathBuf], mut told: impl FnMut(u64)) -> Result<File, ApiError> {
    let failed = |error| refuse(&Problem::Output(error));
    let archive = tempfile::tempfile().map_err(failed)?;
    let mut builder = Builder::new(GzBuilder::new().mtime(0).write(io::BufWriter::new(&archive), Compression::fast()));
    for path in paths {
        let name = path.strip_prefix(root).unwrap_or(path);
        match entry::append(&mut builder, path, name, Purpose::Deploy) {
            // What was removed meanwhile might as well have been removed before.
            Ok(()) | Err(Problem::Gone) => {}
            Err(problem) => return Err(refuse(&problem)),
        }
        told((&archive).stream_position().map_err(failed)?);
    }
    let finished = builder.into_inner().and_then(GzEncoder::finish).and_then(|file| Ok(file.into_inner()?));
    finished.map(drop).and_then(|()| (&archive).seek(SeekFrom::Start(0))).map_err(failed)?;
    Ok(archive)
}

fn refused(message: String, hint: &str) -> ApiError {
    ApiError::new(ErrorCode::InvalidDirectory, message).hint(hint).step("archive")
}

fn refuse(problem: &Problem) -> ApiError {
    let message = problem.to_string();
    match problem {
        Problem::Special { .. } => refused(message, "remove it, or name it in .heyvmignore"),
        Problem::LeadsOut { .. } | Problem::LeadsNowhere { .. } => {
            refused(message, "make it a relative link to a file within the directory, or name it in .heyvmignore")
        }
        Problem::Changed { .. } => refused(message, "deploy again, or name it in .heyvmignore"),
        Problem::Io { .. } | Problem::Gone => refused(message, "make it readable, or name it in .heyvmignore"),
        Problem::Output(_) => {
            ApiError::new(ErrorCode::OutOfResources, format!("the archive cannot be kept: {message}"))
                .hint("make room in the directory for temporary files, or name another one in TMPDIR")
                .step("archive")
        }
    }
}

#[cfg(test)]
mod tests;
