//! Files and directories of the sandbox. Everything here may block and runs on threads of its own.

pub mod archive;
pub mod content;
pub mod listing;
pub mod unpack;

use std::{
    io,
    path::{Component, Path, PathBuf},
};

use heyvm_agent_protocol::DISK_FULL;
use nix::sys::statvfs::statvfs;
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
    let message = match error.kind() {
        StorageFull => format!("{doing} {}: {DISK_FULL}{}", path.display(), without_inodes(path)),
        _ => format!("{doing} {}: {error}", path.display()),
    };
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

/// A disk may be full although it has free blocks.
fn without_inodes(path: &Path) -> &'static str {
    let existing = path.ancestors().find_map(|path| statvfs(path).ok());
    match existing {
        Some(stat) if stat.files() > 0 && stat.files_available() == 0 => " (it has no free inodes: too many files)",
        _ => "",
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
    fn a_full_disk_is_named() {
        let full = io::Error::from_raw_os_error(nix::libc::ENOSPC);
        let status = failed("cannot write", Path::new("/no/such/file"), &full);
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        assert_eq!(status.message(), format!("cannot write /no/such/file: {DISK_FULL}"));
    }

    #[test]
    fn only_plain_absolute_paths_are_taken() {
        assert_eq!(absolute("/workspace/./a").unwrap(), Path::new("/workspace/a"));
        for bad in ["", "a", "../a", "/a/../b", "/a\0b"] {
            assert_eq!(absolute(bad).unwrap_err().code(), tonic::Code::InvalidArgument, "{bad:?}");
        }
    }
}
