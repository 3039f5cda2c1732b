//! A directory as an archive: what is left out, what is refused. The same files, of the same times, give the same bytes.
//!
//! - [`listing`]: what goes along, and what does not.  [`compressor`]: how it is compressed.

mod compressor;
mod listing;

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use heyvm_api::{ApiError, ErrorCode};
use heyvm_bounded_tar::{Packer, Problem, Rules, Shrunk};

pub use compressor::Compressor;
pub use heyvm_archives::{Compression, Limits};
use listing::Ignored;

/// Files change while they are copied, and owners stay here.
pub const RULES: Rules = Rules { shrunk: Shrunk::Refused, owners: false };

/// What of a directory goes along.
#[derive(Debug)]
pub struct Plan {
    root: PathBuf,
    paths: Vec<PathBuf>,
    ignored: Ignored,
    bytes: u64,
}

impl Plan {
    /// Looks through a directory.
    pub fn of(directory: &Path, no_ignore: bool) -> Result<Self, ApiError> {
        let root = root_of(directory)?;
        let (paths, ignored) = listing::paths(&root, no_ignore)?;
        if paths.is_empty() {
            return Err(refused(
                format!("{} holds nothing to deploy", directory.display()),
                "files that .gitignore, .heyvmignore or the default list leave out do not count; --no-ignore takes them",
            ));
        }
        let size =
            |path: &PathBuf| fs::symlink_metadata(path).map_or(0, |meta| if meta.is_file() { meta.len() } else { 0 });
        let bytes = paths.iter().map(size).sum();
        Ok(Self { root, paths, ignored, bytes })
    }

    /// Refuses at once what a server would refuse after the upload.
    pub fn check(&self, limits: &Limits) -> Result<(), ApiError> {
        if self.bytes <= limits.unpacked && self.paths.len() as u64 <= limits.entries {
            return Ok(());
        }
        Err(too_large(&format!(
            "{} holds {:.1} GiB in {} files; the server takes {} GiB and {} files",
            self.root.display(),
            self.bytes as f64 / f64::from(1 << 30),
            self.paths.len(),
            limits.unpacked >> 30,
            limits.entries
        )))
    }

    /// One line about what is ignored, if anything is.
    pub fn ignored(&self) -> Option<String> {
        self.ignored.note()
    }

    /// Writes the tar. Reports after each file how many bytes of files have been packed. The answer is one line about
    /// what cannot be packed and was left out, if anything was.
    pub fn write(&self, out: impl Write, mut packed: impl FnMut(u64)) -> Result<Option<String>, Problem> {
        let mut packer = Packer::new(out, RULES);
        let mut bytes = 0;
        for path in &self.paths {
            let name = path.strip_prefix(&self.root).unwrap_or(path);
            match packer.append(path, name) {
                // What was removed meanwhile might as well have been removed before.
                Ok(_) | Err(Problem::Gone) => {}
                Err(problem) => return Err(problem),
            }
            bytes += fs::symlink_metadata(path).map_or(0, |meta| meta.len());
            packed(bytes);
        }
        let note = left_out(packer.left_out());
        packer.finish()?.flush().map_err(Problem::Output)?;
        Ok(note)
    }
}

/// One line about the sockets, FIFOs and devices that a copy leaves out.
pub fn left_out((count, names): (u64, &[PathBuf])) -> Option<String> {
    if count == 0 {
        return None;
    }
    let what =
        if count == 1 { "1 socket, FIFO or device was left out" } else { "sockets, FIFOs and devices were left out" };
    let number = if count == 1 { String::new() } else { format!("{count} ") };
    Some(format!("{number}{what}: {}", listed(names.iter().map(|name| name.display().to_string()), count)))
}

/// The first names, and how many more there are.
pub fn listed(names: impl Iterator<Item = String>, count: u64) -> String {
    const SHOWN: usize = 5;
    let shown: Vec<_> = names.take(SHOWN).collect();
    let more = count.saturating_sub(shown.len() as u64);
    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
    format!("{}{more}", shown.join(", "))
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

fn refused(message: String, hint: &str) -> ApiError {
    ApiError::new(ErrorCode::InvalidDirectory, message).hint(hint).step("archive")
}

fn too_large(message: &str) -> ApiError {
    ApiError::new(ErrorCode::TooLarge, message)
        .hint("Copy large files with `heyvm cp` once the sandbox runs, or mount the directory with --mount (locally).")
        .step("archive")
}

/// A directory that cannot be packed, as an error of the command.
pub fn refuse(problem: &Problem) -> ApiError {
    let message = problem.to_string();
    match problem {
        Problem::Changed { .. } => refused(message, "deploy again, or name it in .heyvmignore"),
        Problem::Io { .. } | Problem::Gone => refused(message, "make it readable, or name it in .heyvmignore"),
        Problem::Output(_) => ApiError::new(ErrorCode::Internal, format!("could not pack: {message}")).step("archive"),
    }
}

#[cfg(test)]
mod tests;
