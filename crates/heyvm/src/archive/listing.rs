//! What of a directory goes along: all but what .gitignore, .heyvmignore and a list of our own leave out.

use std::{
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

/// Everything that goes along, sorted, without the directory itself.
pub fn paths(root: &Path, no_ignore: bool) -> Result<Vec<PathBuf>, ApiError> {
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
    for entry in walk.build() {
        let entry = entry.map_err(|error| super::refused(error.to_string(), "make it readable, or leave it out"))?;
        check_ignore_file(&entry)?;
        if entry.depth() > 0 {
            paths.push(entry.into_path());
        }
    }
    Ok(paths)
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
