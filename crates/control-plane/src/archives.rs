//! Archives: tar.gz and tar.zst files by content hash, looked through while they come, and kept as long as a sandbox names
//! them or a day has not passed since they were used. Every byte is someone else's.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures::{StreamExt, stream::BoxStream};
use heyvm_api::{ApiError, ErrorCode, archives::AccountArchive, sandbox::Status, system::ArchiveInfo};
use heyvm_archives::{Content, Limits};
use tokio::sync::mpsc;

use crate::{Account, ControlPlane, errors};

/// Bytes in which it is passed on.
const PIECE: usize = 256 << 10;
/// Pieces that may wait for the disk.
const WAITING: usize = 16;
/// An archive that no sandbox was made from is kept this long after it was last sent or used.
const KEPT: Duration = Duration::from_secs(24 * 3600);
/// How long the rest of an upload is listened to that has failed.
const REST: Duration = Duration::from_secs(30);
/// How often such ones are looked for.
const TIDYING: Duration = Duration::from_secs(3600);
/// Beginning of the names of those that are not whole yet.
const HALF: &str = ".half-";
/// Extension of the file beside an archive that has its name.
const NAME: &str = "name";
const MAX_NAME: usize = 255;
const MAX_PATH: usize = 4096;
/// Hex digits of the hash that make an archive's id.
const ID_DIGITS: usize = 32;

impl ControlPlane {
    /// Takes an archive: checks it (paths, kinds, unpacked size) while it comes, stores it by content hash.
    /// With a name it is kept until it is removed.
    pub async fn put_archive(
        &self,
        account: &Account,
        name: Option<String>,
        mut body: BoxStream<'static, io::Result<Bytes>>,
    ) -> Result<ArchiveInfo, ApiError> {
        if let Some(name) = &name {
            check_name(name)?;
        }
        let dir = directory(&self.config.home);
        let half = Half(dir.join(format!("{HALF}{}", uuid::Uuid::new_v4())));
        let received = receive(&half.0, limits(account), &mut body).await;
        if received.is_err() {
            // Who is still sending does not hear an answer: the rest is taken and thrown away.
            let _ = tokio::time::timeout(REST, body.for_each(async |_| {})).await;
        }
        let (hash, size) = received?;
        let archive_id = id_of(&hash);
        let target = dir.join(&archive_id);
        let (from, to) = (half.0.clone(), target.clone());
        tokio::task::spawn_blocking(move || {
            if to.exists() {
                touch(&to);
            } else {
                fs::rename(&from, &to).map_err(|error| errors::io("keeping the archive", &error))?;
            }
            if let Some(name) = name {
                fs::write(to.with_extension(NAME), name).map_err(|error| errors::io("naming the archive", &error))?;
            }
            Ok::<(), ApiError>(())
        })
        .await
        .map_err(|error| errors::internal(&error))??;
        Ok(ArchiveInfo { archive_id, size_bytes: size })
    }

    /// Those with a name, or `all`, newest first.
    pub async fn archives(&self, all: bool) -> Result<Vec<AccountArchive>, ApiError> {
        let dir = directory(&self.config.home);
        let used = if all { self.archives_in_use() } else { HashMap::new() };
        let listed = tokio::task::spawn_blocking(move || list(&dir, all, &used))
            .await
            .map_err(|error| errors::internal(&error))?;
        listed.map_err(|error| errors::io("listing the archives", &error))
    }

    /// Removes one, and its name. Sandboxes that were made from it go on.
    pub async fn remove_archive(&self, id: &str) -> Result<(), ApiError> {
        check(&self.config.home, id)?;
        let path = path_of(&self.config.home, id).unwrap_or_default();
        for path in [path.with_extension(NAME), path] {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(errors::io("removing the archive", &error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Removes archives that nobody needs any more, for as long as the daemon runs.
    pub(crate) async fn tidy_archives_forever(self: Arc<Self>) {
        loop {
            let named = self.archives_in_use().into_keys().collect();
            let dir = directory(&self.config.home);
            let _ = tokio::task::spawn_blocking(move || remove_unused(&dir, &named)).await;
            tokio::time::sleep(TIDYING).await;
        }
    }
}

impl ControlPlane {
    /// Ids of the archives that sandboxes were made from which are not removed, and the sandboxes' names.
    fn archives_in_use(&self) -> HashMap<String, Vec<String>> {
        let mut used: HashMap<String, Vec<String>> = HashMap::new();
        for record in self.all().into_iter().map(|sandbox| sandbox.snapshot()) {
            if let (Some(id), true) = (record.archive_id, record.status != Status::Removed) {
                used.entry(id).or_default().push(record.name);
            }
        }
        used
    }
}

/// The id of the archive whose content has this SHA-256, in hex.
pub fn id_of(hash: &str) -> String {
    format!("ar-{}", hash.get(..ID_DIGITS).unwrap_or(hash))
}

/// How much an archive may be: the owner of the machine uses the disk as far as it goes.
pub fn limits(account: &Account) -> Limits {
    if account.is_owner() { Limits::NONE } else { Limits::STANDARD }
}

/// Writes what comes to a new file, checked on the way; its SHA-256, in hex, and its size.
async fn receive(
    path: &Path,
    limits: Limits,
    body: &mut BoxStream<'static, io::Result<Bytes>>,
) -> Result<(String, u64), ApiError> {
    let (pieces, receiver) = mpsc::channel(WAITING);
    let path = path.to_owned();
    let writing = tokio::task::spawn_blocking(move || write(&path, receiver));
    let checked = async {
        let mut content = Content::new(limits);
        while let Some(piece) = body.next().await {
            let piece = piece.map_err(heyvm_archives::Error::BrokenOff)?;
            content.pass(&piece).await?;
            // A writer that has failed says why in its result.
            if pieces.send(piece).await.is_err() {
                break;
            }
        }
        drop(pieces);
        content.finish().await
    };
    let checked = checked.await;
    // Also after a failure: what it still makes must be there to be removed.
    let written = writing.await.map_err(|error| errors::internal(&error))?;
    written.map_err(|error| errors::io("writing the archive", &error))?;
    Ok(checked?)
}

fn write(path: &Path, mut pieces: mpsc::Receiver<Bytes>) -> io::Result<()> {
    let mut file = File::options().create_new(true).write(true).open(path)?;
    while let Some(piece) = pieces.blocking_recv() {
        file.write_all(&piece)?;
    }
    Ok(())
}

fn check_name(name: &str) -> Result<(), ApiError> {
    if (1..=MAX_NAME).contains(&name.len()) && !name.chars().any(char::is_control) {
        return Ok(());
    }
    Err(ApiError::new(ErrorCode::InvalidArgument, "the archive's name is no name")
        .hint(format!("use 1 to {MAX_NAME} bytes without control characters")))
}

fn list(dir: &Path, all: bool, used: &HashMap<String, Vec<String>>) -> io::Result<Vec<AccountArchive>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
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

fn directory(home: &Path) -> PathBuf {
    home.join("archives")
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

fn remove_unused(dir: &Path, named: &HashSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
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

/// Removed when it goes out of scope, unless it was renamed.
struct Half(PathBuf);

impl Drop for Half {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
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

/// A directory of an archive, as the agent takes it: relative.
pub fn root(text: &str) -> Result<String, ApiError> {
    let plain = text.trim_matches('/');
    let good = text.len() < MAX_PATH && !plain.is_empty() && !text.contains('\0');
    if good && plain.split('/').all(|part| !matches!(part, "" | "." | "..")) {
        return Ok(plain.to_owned());
    }
    let shown: String = text.chars().filter(|c| !c.is_control()).take(64).collect();
    Err(ApiError::new(ErrorCode::InvalidArgument, format!("archive_root {shown:?} is no directory of an archive"))
        .hint("name it as the archive does, for example srv/app, or leave it out"))
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
        for (name, content) in
            [("ar-aa", "12"), ("ar-bb", "123"), ("ar-bb.name", "mine"), (".half-x", ""), ("other", "")]
        {
            fs::write(dir.path().join(name), content).unwrap();
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
