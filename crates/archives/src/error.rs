//! What can go wrong with an archive, and how the outside is told of it.

use std::{io, time::Duration};

use heyvm_api::{ApiError, ErrorCode};

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not what an archive must be.
    #[error("{0}")]
    Refused(String),
    /// It is larger than allowed, compressed.
    #[error("the archive is larger than {}", size(*.limit))]
    TooLarge {
        /// Bytes.
        limit: u64,
    },
    /// Its sender went away or stopped.
    #[error("the upload broke off: {0}")]
    BrokenOff(#[source] io::Error),
    /// Its sender sent nothing for so long.
    #[error("the upload stood still for {} s", .0.as_secs())]
    StoodStill(Duration),
    /// There is no such object.
    #[error("the archive's content is not there")]
    Missing,
    /// The settings cannot be used.
    #[error("{0}")]
    Settings(String),
    /// The disk with the archives is full.
    #[error("there is no room for more archives")]
    Full(#[source] object_store::Error),
    /// Where archives are kept does not answer, or refuses.
    #[error("archives cannot be {doing} now")]
    Unavailable {
        /// As in "cannot be kept".
        doing: &'static str,
        /// Why; may name the store's address.
        #[source]
        source: object_store::Error,
    },
    /// A bug.
    #[error("the check of an archive failed")]
    Internal(#[source] tokio::task::JoinError),
}

impl Error {
    /// A failure of the object store to do something with an object that should be there.
    pub(crate) fn of_object(doing: &'static str) -> impl FnOnce(object_store::Error) -> Self {
        move |source| match source {
            object_store::Error::NotFound { .. } => Self::Missing,
            source => Self::of_store(doing)(source),
        }
    }

    /// A failure of the object store while it was `doing` something.
    pub(crate) fn of_store(doing: &'static str) -> impl FnOnce(object_store::Error) -> Self {
        move |source| match source {
            source if is_full(&source) => Self::Full(source),
            source => Self::Unavailable { doing, source },
        }
    }
}

fn is_full(error: &object_store::Error) -> bool {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::StorageFull) {
            return true;
        }
        cause = error.source();
    }
    false
}

fn size(bytes: u64) -> String {
    match bytes {
        bytes if bytes >= 1 << 30 && bytes.is_multiple_of(1 << 30) => format!("{} GiB", bytes >> 30),
        bytes if bytes >= 1 << 20 => format!("{} MiB", bytes >> 20),
        bytes => format!("{bytes} bytes"),
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        match &error {
            Error::Refused(_) => ApiError::new(ErrorCode::ArchiveInvalid, text)
                .hint("pack a directory of files, directories and links within it")
                .step("archive"),
            Error::TooLarge { .. } => ApiError::new(ErrorCode::TooLarge, text)
                .hint(
                    "Leave files out with .heyvmignore, copy large ones with `heyvm cp` once the sandbox runs, or mount the \
                     directory with --mount (locally).",
                )
                .step("archive"),
            Error::BrokenOff(_) | Error::StoodStill(_) => {
                ApiError::new(ErrorCode::ArchiveInvalid, text).hint("send it again").step("archive")
            }
            Error::Missing => ApiError::new(ErrorCode::ArchiveNotFound, text).hint("upload it again"),
            Error::Settings(_) => {
                ApiError::new(ErrorCode::HostNotReady, text).hint("see [archives] in the server's configuration")
            }
            Error::Full(source) => {
                tracing::error!(error = printable(source), "no room for archives");
                ApiError::new(ErrorCode::OutOfResources, text)
                    .hint("try again later; the server's operator must make room")
            }
            Error::Unavailable { source, .. } => {
                tracing::error!(error = printable(source), "{text}");
                ApiError::new(ErrorCode::StorageUnavailable, text)
                    .hint("nothing was lost; try again in a moment. The server's log has the details")
            }
            Error::Internal(source) => {
                tracing::error!(%source, "{text}");
                ApiError::new(ErrorCode::Internal, text).hint("the server's log has the details")
            }
        }
    }
}

/// A store's answer may quote what was signed and by whose key: only what stands before it is shown.
pub(crate) fn printable(error: &object_store::Error) -> String {
    let text = error.to_string();
    text.split('<').next().unwrap_or_default().chars().filter(|c| !c.is_control()).take(500).collect()
}
