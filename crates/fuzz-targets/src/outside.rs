//! A directory to write in, with a neighbour that has to stay as it is.

use std::{
    fs,
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
};

/// `inside`, to be worked in, and `secret` beside it.
pub struct Outside {
    dir: tempfile::TempDir,
}

impl Outside {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir(dir.path().join("inside")).expect("inside");
        fs::create_dir(dir.path().join("secret")).expect("secret");
        fs::write(dir.path().join("secret/file"), "secret").expect("secret/file");
        // As a sandbox may have left it: a link that leads out.
        symlink("../secret", dir.path().join("inside/out")).expect("a link");
        Self { dir }
    }

    pub fn inside(&self) -> PathBuf {
        self.dir.path().join("inside")
    }

    /// Panics where something was made, changed or removed but inside.
    pub fn check(&self) {
        assert_eq!(names(self.dir.path()), ["inside", "secret"]);
        assert_eq!(names(&self.dir.path().join("secret")), ["file"]);
        let file = self.dir.path().join("secret/file");
        assert_eq!(fs::read(&file).expect("secret/file"), b"secret");
        let meta = fs::metadata(&file).expect("secret/file");
        assert_eq!((meta.nlink(), meta.mode() & 0o7000), (1, 0), "linked to, or made to lend rights");
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("a directory");
    let mut names: Vec<_> =
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
