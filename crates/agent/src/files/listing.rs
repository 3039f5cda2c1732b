//! What there is: one file's description, a directory's, and its removal.

use std::{
    fs::{self, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
};

use heyvm_agent_protocol::v1::{FileInfo, ListDirReply};
use tonic::Status;

use super::{absolute, failed};

/// Entries of one directory that are told at most.
const MAX_ENTRIES: usize = 10_000;
/// Bytes of names that are told at most: well below the largest message.
const MAX_NAMES: usize = 2 << 20;

/// Describes a file; a symbolic link is not followed.
pub fn stat(path: &str) -> Result<FileInfo, Status> {
    let path = absolute(path)?;
    let meta = fs::symlink_metadata(&path).map_err(|error| failed("cannot look at", &path, &error))?;
    let name = path.file_name().map_or("/".into(), |name| name.to_string_lossy().into_owned());
    Ok(describe(name, &path, &meta))
}

fn describe(name: String, path: &Path, meta: &Metadata) -> FileInfo {
    let kind = match meta.file_type() {
        kind if kind.is_file() => "file",
        kind if kind.is_dir() => "directory",
        kind if kind.is_symlink() => "symlink",
        _ => "other",
    };
    let target = if meta.is_symlink() { fs::read_link(path).ok() } else { None };
    FileInfo {
        name,
        kind: kind.into(),
        size: meta.len(),
        mode: meta.mode() & 0o7777,
        mtime: meta.mtime(),
        target: target.map(|target| target.to_string_lossy().into_owned()).unwrap_or_default(),
    }
}

/// Describes what is in a directory, by name.
pub fn list(path: &str) -> Result<ListDirReply, Status> {
    let path = absolute(path)?;
    let read = fs::read_dir(&path).map_err(|error| failed("cannot list", &path, &error))?;
    let (mut entries, mut names, mut truncated) = (Vec::new(), 0, false);
    for entry in read {
        let entry = entry.map_err(|error| failed("cannot list", &path, &error))?;
        if entries.len() == MAX_ENTRIES || names > MAX_NAMES {
            truncated = true;
            break;
        }
        // What has just been removed is not there.
        let Ok(meta) = entry.metadata() else { continue };
        let info = describe(entry.file_name().to_string_lossy().into_owned(), &entry.path(), &meta);
        names += info.name.len() + info.target.len();
        entries.push(info);
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(ListDirReply { entries, truncated })
}

/// Removes a file, an empty directory or, when `recursive`, a directory with everything below it: unless something is
/// mounted there, which is not the sandbox's to remove.
pub fn remove(path: &str, recursive: bool) -> Result<(), Status> {
    let path = absolute(path)?;
    if path.parent().is_none() {
        return Err(Status::invalid_argument("/ cannot be removed"));
    }
    let removed = match fs::symlink_metadata(&path) {
        Ok(meta) if !meta.is_dir() => fs::remove_file(&path),
        Ok(_) if recursive => heyvm_trees::remove(&path).map_err(io::Error::from),
        Ok(_) => fs::remove_dir(&path),
        Err(error) => Err(error),
    };
    removed.map_err(|error| match error.kind() {
        io::ErrorKind::DirectoryNotEmpty => {
            Status::failed_precondition(format!("{} is a directory and not empty", path.display()))
        }
        io::ErrorKind::ResourceBusy => {
            Status::failed_precondition(format!("cannot remove {}: {error}", path.display()))
        }
        _ => failed("cannot remove", &path, &error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Code;

    #[test]
    fn a_directory_is_told_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        fs::create_dir(path("sub")).unwrap();
        fs::write(path("sub/b"), "bb").unwrap();
        std::os::unix::fs::symlink("/gone", path("sub/a")).unwrap();
        let listed = list(&path("sub")).unwrap();
        let told: Vec<_> = listed.entries.iter().map(|e| (&*e.name, &*e.kind, e.size, &*e.target)).collect();
        assert_eq!(told, [("a", "symlink", 5, "/gone"), ("b", "file", 2, "")]);
        assert!(!listed.truncated);
        assert_eq!(stat(&path("sub/a")).unwrap().target, "/gone");
        assert_eq!(remove(&path("sub"), false).unwrap_err().code(), Code::FailedPrecondition);
        remove(&path("sub/a"), false).unwrap();
        remove(&path("sub"), true).unwrap();
        assert_eq!(stat(&path("sub")).unwrap_err().code(), Code::NotFound);
        assert_eq!(list(&path("sub")).unwrap_err().code(), Code::NotFound);
        assert_eq!(remove("/", true).unwrap_err().code(), Code::InvalidArgument);
    }
}
