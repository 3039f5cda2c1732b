//! Files and directories of the sandbox. Everything here may block and runs on threads of its own.

pub mod archive;
pub mod content;
pub mod listing;
pub mod unpack;

use std::{
    io,
    path::{Component, Path, PathBuf},
};

use tonic::Status;

/// A path from the host: absolute, without `..`.
pub fn absolute(path: &str) -> Result<PathBuf, Status> {
    let checked = Path::new(path);
    if !checked.is_absolute() {
        return Err(Status::invalid_argument(format!("{path:?} is not an absolute path")));
    }
    if path.contains('\0') || checked.components().any(|part| part == Component::ParentDir) {
        return Err(Status::invalid_argument(format!("{path:?} holds \"..\" or a zero byte")));
    }
    Ok(checked.to_owned())
}

/// A failed file operation as the host is told of it.
pub fn failed(doing: &str, path: &Path, error: &io::Error) -> Status {
    use io::ErrorKind::*;
    let message = format!("{doing} {}: {error}", path.display());
    match error.kind() {
        NotFound => Status::not_found(message),
        AlreadyExists => Status::already_exists(message),
        PermissionDenied => Status::permission_denied(message),
        StorageFull | QuotaExceeded | FileTooLarge => Status::resource_exhausted(message),
        NotADirectory | IsADirectory | DirectoryNotEmpty | InvalidInput | InvalidFilename => {
            Status::invalid_argument(message)
        }
        _ if error.raw_os_error() == Some(nix::libc::ELOOP) => Status::invalid_argument(message),
        ReadOnlyFilesystem => Status::failed_precondition(message),
        _ => Status::internal(message),
    }
}

/// Runs what may block on a thread of its own.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(Status::internal(format!("the agent failed: {error}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_absolute_paths_are_taken() {
        assert_eq!(absolute("/workspace/./a").unwrap(), Path::new("/workspace/a"));
        for bad in ["", "a", "../a", "/a/../b", "/a\0b"] {
            assert_eq!(absolute(bad).unwrap_err().code(), tonic::Code::InvalidArgument, "{bad:?}");
        }
    }
}
