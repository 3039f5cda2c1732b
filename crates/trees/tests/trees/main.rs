//! Removal and replacement beside mounts, links and files that cannot be removed.
#![allow(missing_docs, clippy::unwrap_used)]

mod namespace;
mod removal;
mod replacement;

use std::{collections::BTreeMap, fs, path::Path};

/// Everything below a directory: its path, and the content of files, the target of links.
fn tree(dir: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(next) = pending.pop() {
        for entry in fs::read_dir(&next).unwrap().map(Result::unwrap) {
            let (path, kind) = (entry.path(), entry.file_type().unwrap());
            let content = if kind.is_dir() {
                pending.push(path.clone());
                "/".to_owned()
            } else if kind.is_symlink() {
                format!("-> {}", fs::read_link(&path).unwrap().display())
            } else {
                fs::read_to_string(&path).unwrap()
            };
            found.insert(path.strip_prefix(dir).unwrap().display().to_string(), content);
        }
    }
    found
}

/// Makes files with their directories, each holding its own name.
fn make(dir: &Path, names: &[&str]) {
    for name in names {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, name).unwrap();
    }
}
