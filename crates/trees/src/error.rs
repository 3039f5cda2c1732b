//! Why a tree is not removed or replaced.

use std::{io, path::PathBuf};

/// Why a tree is not removed or replaced.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A mount lies at the path, below it, or holds it: nothing of it is touched.
    #[error("{0} is a mount: nothing behind it is removed")]
    Mount(PathBuf),
    /// A file is immutable or append-only (`chattr +i`, `+a`).
    #[error("{0} is protected (chattr +i or +a) and cannot be removed")]
    Protected(PathBuf),
    /// A system call failed.
    #[error("could not {doing} {path}: {source}")]
    Io {
        /// What was done, as a verb.
        doing: &'static str,
        /// The path, as far as it is known.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A swap failed, and so did taking it back.
    #[error("{cause}; could not undo it: {undo}; what was there before is in {kept}")]
    NotUndone {
        /// Why the swap failed.
        cause: Box<Error>,
        /// Why it could not be taken back.
        undo: Box<Error>,
        /// Where the old content is.
        kept: PathBuf,
    },
}

impl Error {
    /// The kind of I/O failure behind it, if it is one.
    pub fn io_kind(&self) -> Option<io::ErrorKind> {
        match self {
            Self::Io { source, .. } => Some(source.kind()),
            Self::NotUndone { cause, .. } => cause.io_kind(),
            Self::Mount(_) | Self::Protected(_) => None,
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Io { ref source, .. } => io::Error::new(source.kind(), error.to_string()),
            Error::Mount(_) => io::Error::new(io::ErrorKind::ResourceBusy, error),
            Error::Protected(_) => io::Error::new(io::ErrorKind::PermissionDenied, error),
            Error::NotUndone { .. } => io::Error::other(error),
        }
    }
}

/// Names a failed system call.
pub(crate) fn failed(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(rustix::io::Errno) -> Error {
    let path = path.into();
    move |errno| match errno {
        // What RESOLVE_NO_XDEV says of a mount.
        rustix::io::Errno::XDEV => Error::Mount(path),
        _ => Error::Io { doing, path, source: errno.into() },
    }
}
