//! The files of archives: `archives/<id>`, and `<id>.name` beside one that has a name. Synchronous: they may be large.
#![expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use heyvm_api::{ApiError, ErrorCode, archives::AccountArchive};
use tokio::sync::mpsc;

use crate::errors;

/// Bytes in which it is passed on.
const PIECE: usize = 256 << 10;
/// An archive that no sandbox was made from is kept this long after it was last sent or used.
const KEPT: Duration = Duration::from_secs(24 * 3600);
/// Beginning of the names of those that are not whole yet.
const HALF: &str = ".half-";
/// Extension of the file beside an archive that has its name.
const NAME: &str = "name";

fn directory(home: &Path) -> PathBuf {
    home.join("archives")
}

/// Where one is written that is not whole yet.
pub fn new_half(home: &Path) -> PathBuf {
    directory(home).join(format!("{HALF}{}", uuid::Uuid::new_v4()))
}

/// Writes the pieces to a new file.
pub fn write(path: &Path, mut pieces: mpsc::Receiver<Bytes>) -> io::Result<()> {
    let mut file = File::options().create_new(true).write(true).open(path)?;
    while let Some(piece) = pieces.blocking_recv() {
        file.write_all(&piece)?;
    }
    Ok(())
}

/// Keeps one that is whole under its id, with a name where it has one.
pub fn keep(home: &Path, half: &Path, id: &str, name: Option<&str>) -> Result<(), ApiError> {
    let kept = directory(home).join(id);
    if kept.exists() {
        touch(&kept);
    } else {
        fs::rename(half, &kept).map_err(|error| errors::io("keeping the archive", &error))?;
    }
    match name {
        Some(name) => {
            fs::write(kept.with_extension(NAME), name).map_err(|error| errors::io("naming the archive", &error))
        }
        None => Ok(()),
    }
}

/// Removes what was not kept; nothing where it has gone already.
pub fn remove_half(half: &Path) {
    if let Err(error) = remove_file(half) {
        tracing::warn!(%error, "half an archive is left for the next daemon to remove");
    }
}

/// Removes one, and its name.
pub fn remove(home: &Path, id: &str) -> Result<(), ApiError> {
    check(home, id)?;
    let path = path_of(home, id).unwrap_or_default();
    let removed = remove_file(&path.with_extension(NAME)).and_then(|()| remove_file(&path));
    removed.map_err(|error| errors::io("removing the archive", &error))
}

fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Those with a name, or `all`, newest first; `used` are the names of the sandboxes that were made from each.
pub fn list(home: &Path, all: bool, used: &HashMap<String, Vec<String>>) -> io::Result<Vec<AccountArchive>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory(home))? {
        let path = entry?.path();
        let id = path.file_name().and_then(|name| name.to_str()).filter(|name| is_id(name));
        // One that has just been removed is not there.
        let (Some(id), Ok(meta)) = (id, fs::metadata(&path)) else { continue };
        let beside = path.with_extension(NAME);
        let name = fs::read_to_string(&beside).ok();
        if name.is_none() && !all {
            continue;
        }
        let made = if name.is_some() { fs::metadata(&beside)?.modified()? } else { meta.modified()? };
        found.push(AccountArchive {
            id: id.to_owned(),
            name,
            size_bytes: meta.len(),
            created_at: made.into(),
            used_by: used.get(id).cloned().unwrap_or_default(),
        });
    }
    found.sort_by(|a, b| b.created_at.cmp(&a.created_at).then_with(|| a.id.cmp(&b.id)));
    Ok(found)
}

/// Makes the directory, and removes from it what a daemon that was killed was still taking.
pub fn prepare(home: &Path) -> io::Result<()> {
    fs::create_dir_all(directory(home))?;
    for entry in fs::read_dir(directory(home))?.flatten() {
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(HALF)) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Removes those that were not used for long, have no name and are not `named` by a sandbox.
pub fn remove_unused(home: &Path, named: &HashSet<String>) {
    for entry in fs::read_dir(directory(home)).into_iter().flatten().flatten() {
        let age = entry.metadata().and_then(|meta| meta.modified()).ok().and_then(|time| time.elapsed().ok());
        let kept = entry.path().extension().is_some() || entry.path().with_extension(NAME).exists();
        let free =
            !kept && entry.file_name().to_str().is_some_and(|name| name.starts_with("ar-") && !named.contains(name));
        if free
            && age.is_some_and(|age| age > KEPT)
            && let Err(error) = fs::remove_file(entry.path())
        {
            tracing::warn!(%error, path = %entry.path().display(), "an archive that nobody needs cannot be removed");
        }
    }
}

/// It is used now.
fn touch(archive: &Path) {
    if let Err(error) = File::open(archive).and_then(|file| file.set_modified(SystemTime::now())) {
        tracing::warn!(%error, path = %archive.display(), "that an archive is used cannot be written down");
    }
}

fn path_of(home: &Path, id: &str) -> Option<PathBuf> {
    is_id(id).then(|| directory(home).join(id))
}

fn is_id(id: &str) -> bool {
    let digits = id.strip_prefix("ar-").unwrap_or_default();
    !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether there is an archive of this id. Whoever asks is about to use it.
pub fn check(home: &Path, id: &str) -> Result<(), ApiError> {
    match path_of(home, id).filter(|path| path.exists()) {
        Some(path) => {
            touch(&path);
            Ok(())
        }
        None => Err(ApiError::new(ErrorCode::ArchiveNotFound, format!("there is no archive {id:?}"))
            .hint("upload it again with PUT /archives, or deploy the directory")),
    }
}

/// An archive's tar stream.
pub fn read(home: &Path, id: &str) -> Result<impl Read + Send + use<>, ApiError> {
    check(home, id)?;
    let path = path_of(home, id).unwrap_or_default();
    let opened = File::open(path).and_then(heyvm_archives::tar_of);
    opened.map_err(|error| errors::io("opening the archive", &error))
}

/// Passes a stream on in pieces until it ends or `take` wants no more.
pub fn feed(mut from: impl Read, mut take: impl FnMut(Vec<u8>) -> bool) -> io::Result<()> {
    loop {
        let mut piece = Vec::with_capacity(PIECE);
        (&mut from).take(PIECE as u64).read_to_end(&mut piece)?;
        if piece.is_empty() || !take(piece) {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nameless_archives_are_listed_among_all_with_who_uses_them() {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path()).unwrap();
        for (name, content) in
            [("ar-aa", "12"), ("ar-bb", "123"), ("ar-bb.name", "mine"), (".half-x", ""), ("other", "")]
        {
            fs::write(dir.path().join("archives").join(name), content).unwrap();
        }
        let used = HashMap::from([("ar-aa".to_owned(), vec!["web".to_owned()])]);
        let ids =
            |all| -> Vec<_> { list(dir.path(), all, &used).unwrap().into_iter().map(|archive| archive.id).collect() };
        assert_eq!(ids(false), ["ar-bb"]);
        assert_eq!(HashSet::from_iter(ids(true)), HashSet::from(["ar-aa".to_owned(), "ar-bb".to_owned()]));
        let all = list(dir.path(), true, &used).unwrap();
        let nameless = all.iter().find(|archive| archive.name.is_none()).unwrap();
        assert_eq!((nameless.size_bytes, &nameless.used_by[..]), (2, &["web".to_owned()][..]));
    }

    #[test]
    fn an_id_is_no_path() {
        assert!(check(Path::new("/"), "ar-../../etc/passwd").is_err());
        assert!(check(Path::new("/"), "etc/passwd").is_err());
    }
}
