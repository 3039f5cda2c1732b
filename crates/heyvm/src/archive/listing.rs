//! What of a directory goes along: all but what .gitignore, .heyvmignore and a list of our own leave out.

use std::{
    collections::{BTreeMap, HashSet},
    ffi::OsString,
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use heyvm_api::{ApiError, ErrorCode};
use ignore::{DirEntry, WalkBuilder};

/// The user's own list, in the words of .gitignore.
const IGNORE_FILE: &str = ".heyvmignore";

/// What nobody wants in a sandbox. It yields to both files: `!target/` in one of them takes it along.
const LEFT_OUT: &str = "\
.git
.hg
.svn
node_modules
target/
__pycache__/
.venv
venv/
.mypy_cache/
.pytest_cache/
.ruff_cache/
.tox/
.DS_Store
.heyo/
";

/// What the version control keeps for itself: not worth a word when it stays behind.
const ITS_OWN: [&str; 3] = [".git", ".hg", ".svn"];
/// Names of ignored files that are remembered; the others are counted.
const MAX_NAMED: usize = 20;

/// Files and directories that stay behind; a directory counts as one.
#[derive(Debug, Default)]
pub struct Ignored {
    by_files: u64,
    by_default: u64,
    names: Vec<String>,
}

impl Ignored {
    /// One line: how many, and why.
    pub fn note(&self) -> Option<String> {
        let count = self.by_files + self.by_default;
        let why: Vec<_> = [(".gitignore or .heyvmignore", self.by_files), ("the default list", self.by_default)]
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .map(|(by, number)| format!("{number} by {by}"))
            .collect();
        let names = super::listed(self.names.iter().cloned(), count);
        let were = if count == 1 { "1 file or directory is" } else { "files and directories are" };
        let number = if count == 1 { String::new() } else { format!("{count} ") };
        (count > 0).then(|| format!("{number}{were} ignored ({}): {names}; --no-ignore takes all", why.join(", ")))
    }

    /// Compares what is in a directory with what the walk has shown of it.
    fn look_at(&mut self, root: &Path, dir: &Path, taken: &HashSet<OsString>) {
        let Ok(entries) = fs::read_dir(dir) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            if taken.contains(&name) || ITS_OWN.iter().any(|own| name == *own) {
                continue;
            }
            let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let in_list = |line: &str| match line.strip_suffix('/') {
                Some(directory) => is_dir && name == directory,
                None => name == line,
            };
            if LEFT_OUT.lines().any(in_list) {
                self.by_default += 1;
            } else {
                self.by_files += 1;
            }
            if self.names.len() < MAX_NAMED {
                let path = entry.path();
                let shown = path.strip_prefix(root).unwrap_or(&path).display().to_string();
                self.names.push(if is_dir { format!("{shown}/") } else { shown });
            }
        }
    }
}

/// Everything that goes along, sorted, without the directory itself, and what does not.
pub fn paths(root: &Path, no_ignore: bool) -> Result<(Vec<PathBuf>, Ignored), ApiError> {
    let mut walk = WalkBuilder::new(root);
    walk.standard_filters(false).follow_links(false).sort_by_file_name(|a, b| a.cmp(b));
    // The walk reads patterns from files only.
    let mut left_out = tempfile::NamedTempFile::new().map_err(|error| cannot_list(&error))?;
    if !no_ignore {
        left_out.write_all(LEFT_OUT.as_bytes()).map_err(|error| cannot_list(&error))?;
        if let Some(error) = walk.add_ignore(left_out.path()) {
            return Err(cannot_list(&error));
        }
        // What the repository above leaves out stays out, too: its root's .gitignore may name what is secret here.
        let in_repository = root.canonicalize().is_ok_and(|root| root.ancestors().any(|dir| dir.join(".git").exists()));
        walk.parents(in_repository).git_exclude(in_repository);
        walk.git_ignore(true).require_git(false).add_custom_ignore_filename(IGNORE_FILE);
    }
    let mut paths = Vec::new();
    let mut directories: BTreeMap<PathBuf, HashSet<OsString>> = BTreeMap::new();
    for entry in walk.build() {
        let entry = entry.map_err(|error| super::refused(error.to_string(), "make it readable, or leave it out"))?;
        check_ignore_file(&entry)?;
        if !no_ignore && entry.file_type().is_some_and(|kind| kind.is_dir()) {
            directories.entry(entry.path().to_owned()).or_default();
        }
        if entry.depth() > 0 {
            if let Some(taken) = entry.path().parent().and_then(|parent| directories.get_mut(parent)) {
                taken.insert(entry.file_name().to_owned());
            }
            paths.push(entry.into_path());
        }
    }
    let mut ignored = Ignored::default();
    directories.iter().for_each(|(dir, taken)| ignored.look_at(root, dir, taken));
    Ok((paths, ignored))
}

fn cannot_list(error: &dyn std::error::Error) -> ApiError {
    ApiError::new(ErrorCode::OutOfResources, format!("no file for patterns can be made: {error}"))
        .hint("make room in the directory for temporary files, or name another one in TMPDIR")
        .step("archive")
}

/// A line of ours that means nothing would leave in what was to be left out. Git passes over its own, and so do we.
fn check_ignore_file(entry: &DirEntry) -> Result<(), ApiError> {
    let Some(error) = entry.error().map(ToString::to_string).filter(|error| error.contains(IGNORE_FILE)) else {
        return Ok(());
    };
    Err(super::refused(error, "correct that line of .heyvmignore, or use --no-ignore"))
}
