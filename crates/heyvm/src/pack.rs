//! A directory as a tar.gz: what is left out, what is refused. The same files give the same bytes.

use std::{
    fs::{self, File},
    io::{self, Seek, SeekFrom},
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Component, Path, PathBuf},
};

use flate2::{Compression, GzBuilder};
use heyvm_api::{ApiError, ErrorCode};
use ignore::{WalkBuilder, overrides::OverrideBuilder};
use tar::{Builder, EntryType, Header};

/// What nobody wants in a sandbox unless `--no-ignore` says so.
const LEFT_OUT: [&str; 12] = [
    ".git",
    ".hg",
    ".svn",
    "node_modules",
    "target",
    "__pycache__",
    ".venv",
    "venv",
    ".mypy_cache",
    ".pytest_cache",
    ".DS_Store",
    ".heyo",
];

/// Packs `directory` into an unlinked file, rewound.
pub fn pack(directory: &Path, no_ignore: bool) -> Result<File, ApiError> {
    let meta = fs::metadata(directory).map_err(|error| {
        refused(format!("{} cannot be deployed: {error}", directory.display()), "name a directory that is there")
    })?;
    if !meta.is_dir() {
        return Err(refused(format!("{} is not a directory", directory.display()), "name the directory the app is in"));
    }
    let root = directory.canonicalize().map_err(|error| failed(directory, &error))?;
    let paths = files(&root, no_ignore)?;
    if paths.is_empty() {
        return Err(refused(
            format!("{} holds nothing to deploy", directory.display()),
            "files that .gitignore, .heyvmignore or the default list leave out do not count; --no-ignore takes them",
        ));
    }
    let archive = tempfile::tempfile().map_err(|error| failed(directory, &error))?;
    let mut builder = Builder::new(GzBuilder::new().mtime(0).write(&archive, Compression::fast()));
    for path in &paths {
        append(&mut builder, &root, path)?;
    }
    let finished = builder.into_inner().and_then(flate2::write::GzEncoder::finish);
    finished.map(drop).and_then(|()| (&archive).seek(SeekFrom::Start(0))).map_err(|error| failed(directory, &error))?;
    Ok(archive)
}

fn refused(message: String, hint: &str) -> ApiError {
    ApiError::new(ErrorCode::InvalidDirectory, message).hint(hint).step("archive")
}

fn failed(path: &Path, error: &io::Error) -> ApiError {
    refused(format!("{}: {error}", path.display()), "is it readable, and is there disk space?")
}

/// Everything that goes along, sorted, without the directory itself.
fn files(root: &Path, no_ignore: bool) -> Result<Vec<PathBuf>, ApiError> {
    let mut walk = WalkBuilder::new(root);
    walk.hidden(false).follow_links(false).sort_by_file_name(|a, b| a.cmp(b));
    walk.ignore(false).git_global(false).git_exclude(false).parents(false);
    walk.git_ignore(!no_ignore).require_git(false);
    if !no_ignore {
        walk.add_custom_ignore_filename(".heyvmignore");
        let mut left_out = OverrideBuilder::new(root);
        for name in LEFT_OUT {
            // A pattern that begins with ! leaves out.
            let added = left_out.add(&format!("!{name}")).map(drop);
            added.map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))?;
        }
        let built = left_out.build().map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))?;
        walk.overrides(built);
    }
    let mut paths = Vec::new();
    for entry in walk.build() {
        let entry = entry.map_err(|error| refused(error.to_string(), "is everything in the directory readable?"))?;
        if entry.depth() > 0 {
            paths.push(entry.into_path());
        }
    }
    Ok(paths)
}

fn append(builder: &mut Builder<impl io::Write>, root: &Path, path: &Path) -> Result<(), ApiError> {
    let io = |error: io::Error| failed(path, &error);
    let name = path.strip_prefix(root).unwrap_or(path);
    let meta = fs::symlink_metadata(path).map_err(io)?;
    let kind = meta.file_type();
    let mut header = Header::new_gnu();
    header.set_mode(meta.permissions().mode() & 0o777);
    // Owners and times stay here: the same files are the same archive.
    (header.set_uid(0), header.set_gid(0), header.set_mtime(0), header.set_size(0));
    if kind.is_dir() {
        header.set_entry_type(EntryType::Directory);
        return builder.append_data(&mut header, name, io::empty()).map_err(io);
    }
    if kind.is_symlink() {
        let target = fs::read_link(path).map_err(io)?;
        check_link(root, path, &target)?;
        header.set_entry_type(EntryType::Symlink);
        return builder.append_link(&mut header, name, target).map_err(io);
    }
    if kind.is_file() {
        let file = File::open(path).map_err(io)?;
        header.set_size(meta.len());
        // A file that grows meanwhile must not break the archive.
        return builder.append_data(&mut header, name, io::Read::take(file, meta.len())).map_err(io);
    }
    let what = if kind.is_socket() {
        "a socket"
    } else if kind.is_fifo() {
        "a pipe"
    } else {
        "a device"
    };
    Err(refused(
        format!("{} is {what}, which cannot be deployed", path.display()),
        "remove it, or name it in .heyvmignore",
    ))
}

fn check_link(root: &Path, link: &Path, target: &Path) -> Result<(), ApiError> {
    let hint = "make it lead to a file within the directory, or name it in .heyvmignore";
    let mut depth: i64 = link.strip_prefix(root).map_or(0, |name| name.components().count() as i64 - 1);
    for part in target.components() {
        depth += match part {
            Component::Normal(_) => 1,
            Component::CurDir => 0,
            Component::ParentDir => -1,
            Component::RootDir | Component::Prefix(_) => -1_000_000,
        };
        if depth < 0 {
            return Err(refused(
                format!("{} leads to {}, outside of the directory", link.display(), target.display()),
                hint,
            ));
        }
    }
    if fs::metadata(link).is_err() {
        return Err(refused(format!("{} leads to {}, which is not there", link.display(), target.display()), hint));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn names(directory: &Path, no_ignore: bool) -> Vec<String> {
        let archive = pack(directory, no_ignore).unwrap();
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(archive));
        archive.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().display().to_string()).collect()
    }

    fn app() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("app.py", "x"),
            ("kept/file", "x"),
            ("node_modules/m/index.js", "x"),
            ("secret.env", "x"),
            ("big.bin", "x"),
        ] {
            fs::create_dir_all(dir.path().join(name).parent().unwrap()).unwrap();
            fs::write(dir.path().join(name), text).unwrap();
        }
        fs::write(dir.path().join(".gitignore"), "*.env\n").unwrap();
        fs::write(dir.path().join(".heyvmignore"), "big.bin\n").unwrap();
        dir
    }

    #[test]
    fn ignored_files_stay_behind() {
        let dir = app();
        assert_eq!(names(dir.path(), false), [".gitignore", ".heyvmignore", "app.py", "kept/", "kept/file"]);
        assert!(names(dir.path(), true).contains(&"node_modules/m/index.js".to_owned()));
        assert!(names(dir.path(), true).contains(&"secret.env".to_owned()));
    }

    #[test]
    fn the_same_files_are_the_same_bytes() {
        use std::io::Read;
        let bytes = || {
            let mut bytes = Vec::new();
            pack(app().path(), false).unwrap().read_to_end(&mut bytes).unwrap();
            bytes
        };
        assert_eq!(bytes(), bytes());
    }

    #[test]
    fn what_cannot_be_deployed_is_refused() {
        let check = |spoil: &dyn Fn(&Path)| {
            let dir = app();
            spoil(dir.path());
            let error = pack(dir.path(), false).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidDirectory, "{error:?}");
            assert!(error.hint.is_some());
        };
        check(&|dir| drop(std::os::unix::net::UnixListener::bind(dir.join("socket")).unwrap()));
        check(&|dir| symlink("/etc/passwd", dir.join("link")).unwrap());
        check(&|dir| symlink("../outside", dir.join("link")).unwrap());
        check(&|dir| symlink("missing", dir.join("link")).unwrap());
        check(&|dir| fs::remove_dir_all(dir).unwrap());
        let empty = tempfile::tempdir().unwrap();
        assert_eq!(pack(empty.path(), false).unwrap_err().code, ErrorCode::InvalidDirectory);
    }
}
