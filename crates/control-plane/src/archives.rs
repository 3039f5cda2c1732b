//! Archives: tar.gz and tar.zst files by content hash, looked through while they come, and kept as long as a sandbox names
//! them or a day has not passed since they were used. Every byte is someone else's.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, stream::BoxStream};
use heyvm_api::{ApiError, ErrorCode, archives::AccountArchive, sandbox::Status, system::ArchiveInfo};
use heyvm_archives::{Content, Limits};
use tokio::sync::mpsc;

pub(crate) use self::files::{feed, prepare, read};
use crate::{Account, ControlPlane, blocking::blocking, errors};

mod files;

/// Pieces that may wait for the disk.
const WAITING: usize = 16;
/// How long the rest of an upload is listened to that has failed.
const REST: Duration = Duration::from_secs(30);
/// How often such ones are looked for.
const TIDYING: Duration = Duration::from_secs(3600);
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
        let half = Half(files::new_half(&self.config.home));
        let kept = self.receive_and_keep(&half.0, account, name, &mut body).await;
        half.remove().await;
        if kept.is_err() {
            // Who is still sending does not hear an answer: the rest is taken and thrown away.
            tokio::time::timeout(REST, body.for_each(async |_| {})).await.ok();
        }
        kept
    }

    async fn receive_and_keep(
        &self,
        half: &Path,
        account: &Account,
        name: Option<String>,
        body: &mut BoxStream<'static, io::Result<Bytes>>,
    ) -> Result<ArchiveInfo, ApiError> {
        let (hash, size) = receive(half, limits(account), body).await?;
        let archive_id = id_of(&hash);
        let (home, half, id) = (self.config.home.clone(), half.to_owned(), archive_id.clone());
        blocking(move || files::keep(&home, &half, &id, name.as_deref())).await.flatten()?;
        Ok(ArchiveInfo { archive_id, size_bytes: size })
    }

    /// Those with a name, or `all`, newest first.
    pub async fn archives(&self, all: bool) -> Result<Vec<AccountArchive>, ApiError> {
        let home = self.config.home.clone();
        let used = if all { self.archives_in_use() } else { HashMap::new() };
        let listed = blocking(move || files::list(&home, all, &used)).await?;
        listed.map_err(|error| errors::io("listing the archives", &error))
    }

    /// Removes one, and its name. Sandboxes that were made from it go on.
    pub async fn remove_archive(&self, id: &str) -> Result<(), ApiError> {
        let (home, id) = (self.config.home.clone(), id.to_owned());
        blocking(move || files::remove(&home, &id)).await.flatten()
    }

    /// Whether there is an archive of this id. Whoever asks is about to use it.
    pub(crate) async fn check_archive(&self, id: &str) -> Result<(), ApiError> {
        let (home, id) = (self.config.home.clone(), id.to_owned());
        blocking(move || files::check(&home, &id)).await.flatten()
    }

    /// Removes archives that nobody needs any more, for as long as the daemon runs.
    pub(crate) async fn tidy_archives_forever(self: Arc<Self>) {
        loop {
            let named = self.archives_in_use().into_keys().collect();
            let home = self.config.home.clone();
            if let Err(error) = blocking(move || files::remove_unused(&home, &named)).await {
                tracing::error!(%error, "archives that nobody needs could not be removed");
            }
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

/// Removed when it goes out of scope, unless it was kept under its id: then nothing is there any more.
struct Half(PathBuf);

impl Half {
    async fn remove(mut self) {
        let half = std::mem::take(&mut self.0);
        if let Err(error) = blocking(move || files::remove_half(&half)).await {
            tracing::warn!(%error, "half an archive is left for the next daemon to remove");
        }
    }
}

/// Its caller has left: nobody waits for it to be removed.
impl Drop for Half {
    fn drop(&mut self) {
        let half = std::mem::take(&mut self.0);
        if half.as_os_str().is_empty() {
            return;
        }
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn_blocking(move || files::remove_half(&half));
        }
    }
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
    let writing = tokio::task::spawn_blocking(move || files::write(&path, receiver));
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

fn check_name(name: &str) -> Result<(), ApiError> {
    if (1..=MAX_NAME).contains(&name.len()) && !name.chars().any(char::is_control) {
        return Ok(());
    }
    Err(ApiError::new(ErrorCode::InvalidArgument, "the archive's name is no name")
        .hint(format!("use 1 to {MAX_NAME} bytes without control characters")))
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
