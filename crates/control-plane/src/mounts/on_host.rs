//! The host's side of a mount: its directory, and the journal of what the guest knows. Synchronous: a file system may stall.
#![expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]

use std::{fs, io, os::unix::fs::DirBuilderExt, path::Path};

use heyvm_api::{ApiError, ErrorCode, error::with_causes, sandbox::Mount};
use heyvm_mounts::{Directory, DirectoryIdentity};

use super::SYSTEM;

const DIRECTORY_HINT: &str = "name a directory that is there, for example one of your project";

/// Resolves the links of a mount's host path, once: from then on the path is opened through no link, and the directory
/// must be the one that is identified here.
pub fn resolve(mount: &mut Mount, home: &Path) -> Result<DirectoryIdentity, ApiError> {
    let asked = &mount.host_path;
    let no_directory = |why: String| {
        ApiError::new(ErrorCode::InvalidDirectory, format!("host_path {asked:?} cannot be mounted: {why}"))
            .hint(DIRECTORY_HINT)
    };
    let path = fs::canonicalize(asked).map_err(|error| no_directory(error.to_string()))?;
    if !path.is_dir() {
        return Err(no_directory("it is no directory".into()));
    }
    permitted(&path, home)?;
    let directory = Directory::open(&path).map_err(not_opened)?;
    let path = path.into_os_string().into_string();
    mount.host_path = path.map_err(|path| no_directory(format!("{} is not UTF-8", path.display())))?;
    Ok(directory.identity().clone())
}

/// Refuses directories that no sandbox may have. `path` holds no links.
fn permitted(path: &Path, home: &Path) -> Result<(), ApiError> {
    let home = fs::canonicalize(home).unwrap_or_else(|_| home.to_owned());
    let why = if path == Path::new("/") || SYSTEM.iter().any(|system| path.starts_with(system)) {
        "the whole host and its kernel's files are not for a sandbox"
    } else if path.starts_with(&home) || home.starts_with(path) {
        "heyvm's own files are in it"
    } else {
        return Ok(());
    };
    let message = format!("host_path {:?} cannot be mounted: {why}", path.display().to_string());
    Err(ApiError::new(ErrorCode::Forbidden, message).hint(DIRECTORY_HINT))
}

/// Opens the directory of a mount: the one that is known, or the one that is there where an earlier version recorded its
/// path alone.
pub fn open(path: &Path, known: Option<&DirectoryIdentity>, home: &Path) -> Result<Directory, ApiError> {
    permitted(path, home)?;
    let directory = match known {
        Some(known) => Directory::reopen(path, known),
        None => Directory::open(path),
    };
    directory.map_err(not_opened)
}

/// Who is at a path now.
pub fn identify(path: &Path) -> Result<DirectoryIdentity, ApiError> {
    Ok(Directory::open(path).map_err(not_opened)?.identity().clone())
}

fn not_opened(error: heyvm_mounts::Error) -> ApiError {
    use heyvm_mounts::Error::{Link, Replaced};
    let hint = match error {
        Link { .. } | Replaced { .. } => {
            "see what stands there now; heyvm mount-add with the same paths, on the stopped sandbox, mounts that instead"
        }
        _ => "the directory must be there and open to the one who runs the daemon",
    };
    ApiError::new(ErrorCode::InvalidDirectory, with_causes(&error)).hint(hint)
}

/// Makes the directory of a journal. Without it the mount is served all the same, and a later daemon begins anew.
pub fn prepare(journal: &Path) {
    let Some(dir) = journal.parent() else { return };
    if let Err(error) = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir) {
        tracing::warn!(%error, "the directory for the journals of mounts cannot be made");
    }
}

/// Removes the journals of a sandbox.
pub fn forget(journals: &Path) {
    if let Err(error) = heyvm_trees::remove(journals)
        && error.io_kind() != Some(io::ErrorKind::NotFound)
    {
        tracing::warn!(%error, "the journals of a sandbox's mounts cannot be removed");
    }
}
