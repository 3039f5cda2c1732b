//! Whose archives there are, and how one comes to be:
//!
//! ```text
//! presign ─▶ waiting ─upload─▶ uploaded ─finalize─▶ usable ─remove─▶ gone
//!               └── not finalized within a day ──────────────────────▶ gone
//! sent for one deploy ─▶ usable ─── a day old, and its sandbox gone ───▶ gone
//! ```
//! An upload may be repeated until the archive is finalized; repeated afterwards, it must bring the same. Contents that are
//! the same are kept once, whoever sends them. A removed archive's content goes with the last one that has it; sandboxes
//! that were made from it have their own.

use std::{io, sync::Arc, time::Duration};

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::{Stream, TryStreamExt, stream::BoxStream};
use heyvm_api::{ApiError, ErrorCode};
use heyvm_store::{ArchiveRow, ContentRow, Store};
use rand::RngCore;
use sha2::{Digest, Sha256};

use crate::{Limits, Storage, Stored};

/// An upload that is not finalized after this long is forgotten, and one for a deploy whose sandbox is gone.
const UNFINISHED: Duration = Duration::from_secs(24 * 3600);
/// What may be taken for left behind is at least this old.
const LEFT_BEHIND: Duration = Duration::from_secs(24 * 3600);
/// How often both are looked for.
const TIDYING: Duration = Duration::from_secs(3600);
/// How long an upload may begin after it was asked for.
const TICKET: Duration = Duration::from_secs(3600);
const MAX_NAME: usize = 255;
const MIB: i64 = 1 << 20;

/// Everybody's archives.
#[derive(Debug)]
pub struct Archives {
    store: Store,
    storage: Storage,
    limits: Limits,
    mib_per_account: Option<i64>,
}

/// What lets one upload an archive.
#[derive(Debug, Clone)]
pub struct Ticket {
    /// The archive.
    pub id: String,
    /// The secret that goes with it.
    pub secret: String,
    /// How long it is good for.
    pub lifetime: Duration,
}

/// An archive that can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Archive {
    /// `ar-` and 32 hex digits.
    pub id: String,
    /// What its owner calls it.
    pub name: Option<String>,
    /// Bytes, compressed.
    pub size: u64,
    /// When it was asked for.
    pub created_at: DateTime<Utc>,
}

impl Archives {
    /// Those that `store` knows, with their contents in `storage`. An account without a quota of its own may have
    /// `mib_per_account` of them together.
    pub fn new(store: Store, storage: Storage, limits: Limits, mib_per_account: Option<i64>) -> Arc<Self> {
        Arc::new(Self { store, storage, limits, mib_per_account })
    }

    /// The most an archive may be.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// A new archive of `account` that waits for its upload.
    pub async fn presign(&self, account: &str) -> Result<Ticket, ApiError> {
        let secret = random();
        let id = self.add(account, Some(hashed(&secret))).await?;
        Ok(Ticket { id, secret, lifetime: TICKET })
    }

    /// Takes the content of an archive from whoever has its ticket's secret. Answers its size.
    pub async fn upload(&self, id: &str, secret: &str, body: impl Body) -> Result<u64, ApiError> {
        let row = self.store.archive(id).await?.ok_or_else(|| not_found(id))?;
        let created = row.created_at;
        let lasts = created.saturating_add(TICKET.as_millis().try_into().unwrap_or(i64::MAX));
        // A hash tells an attacker nothing by the time that comparing it takes.
        if row.ticket.as_deref() != Some(hashed(secret).as_str()) || lasts < now() {
            return Err(ApiError::new(ErrorCode::Forbidden, "this upload URL is not valid, or not any more")
                .hint("POST /sandbox-archives/presign gives another"));
        }
        self.fill(&row.account, id, body).await
    }

    /// Makes an uploaded archive usable. Doing it again changes nothing.
    pub async fn finalize(&self, account: &str, id: &str, name: Option<&str>) -> Result<Archive, ApiError> {
        check_name(name)?;
        let row = self.row(account, id).await?;
        if row.finalized_at.is_none() {
            self.store.finalize_archive(id, name, now()).await?;
        }
        self.get(account, id).await
    }

    /// A new archive of `account` with this content, usable at once.
    pub async fn put(&self, account: &str, name: Option<&str>, body: impl Body) -> Result<Archive, ApiError> {
        check_name(name)?;
        let id = self.add(account, None).await?;
        if let Err(error) = self.fill(account, &id, body).await {
            self.forget(&id).await?;
            return Err(error);
        }
        self.finalize(account, &id, name).await
    }

    /// The account's usable archives, newest first.
    pub async fn list(&self, account: &str) -> Result<Vec<Archive>, ApiError> {
        let rows = self.store.archives(account).await?;
        Ok(rows.into_iter().filter_map(|row| usable(row).map(|(archive, _)| archive)).collect())
    }

    /// One usable archive.
    pub async fn get(&self, account: &str, id: &str) -> Result<Archive, ApiError> {
        self.usable(account, id).await.map(|(archive, _)| archive)
    }

    /// One usable archive, and its bytes as they come.
    pub async fn read(
        &self,
        account: &str,
        id: &str,
    ) -> Result<(Archive, BoxStream<'static, io::Result<Bytes>>), ApiError> {
        let (archive, content) = self.usable(account, id).await?;
        let bytes = self.storage.read(&content.object).await?;
        Ok((archive, bytes))
    }

    /// Forgets an archive, whether it can be used or not.
    pub async fn remove(&self, account: &str, id: &str) -> Result<(), ApiError> {
        self.row(account, id).await?;
        self.forget(id).await
    }

    /// Forgets what nobody finalizes, and removes what was left behind, for as long as the server runs.
    pub async fn tidy_forever(self: Arc<Self>) {
        loop {
            if let Err(error) = self.tidy(UNFINISHED, LEFT_BEHIND).await {
                tracing::warn!(%error, "archives cannot be tidied up now");
            }
            tokio::time::sleep(TIDYING).await;
        }
    }

    /// Forgets archives that waited for longer than `unfinished` or are not used after so long, and removes objects nobody knows that are older than
    /// `left_behind`. Any number of servers may do so at once.
    pub async fn tidy(&self, unfinished: Duration, left_behind: Duration) -> Result<(), ApiError> {
        let before = now().saturating_sub(unfinished.as_millis().try_into().unwrap_or(i64::MAX));
        for id in self.store.unused_archives(before).await? {
            self.forget(&id).await?;
        }
        self.storage.sweep(left_behind).await?;
        let mut objects = self.storage.objects();
        while let Some(object) = objects.try_next().await? {
            let old = object.since.elapsed().is_ok_and(|age| age >= left_behind);
            if old && !self.store.knows_object(&object.name).await? {
                self.storage.delete(&object.name).await?;
            }
        }
        Ok(())
    }

    async fn add(&self, account: &str, ticket: Option<String>) -> Result<String, ApiError> {
        let row = ArchiveRow {
            id: format!("ar-{}", random()),
            account: account.into(),
            name: None,
            ticket,
            created_at: now(),
            finalized_at: None,
            content: None,
        };
        self.store.add_archive(&row).await?;
        Ok(row.id)
    }

    async fn fill(&self, account: &str, id: &str, body: impl Body) -> Result<u64, ApiError> {
        let quota = self.quota(account).await?;
        let Stored { object, hash, size } = self.storage.put(body, self.limits).await?;
        let content = ContentRow { hash, object, size: i64::try_from(size).unwrap_or(i64::MAX) };
        match self.store.fill_archive(account, id, &content, quota).await {
            Ok(free) => {
                for object in free {
                    self.free(&object).await;
                }
                Ok(size)
            }
            Err(error) => {
                self.free(&content.object).await;
                match error {
                    heyvm_store::Error::Full(used) => Err(too_much(used, content.size, quota)),
                    heyvm_store::Error::Gone => self.filled_before(id, &content.hash, size).await,
                    error => Err(error.into()),
                }
            }
        }
    }

    /// How many bytes of archives the account may have.
    async fn quota(&self, account: &str) -> Result<Option<i64>, ApiError> {
        let own = self.store.account(account).await?.and_then(|row| row.quotas.max_archive_mib);
        Ok(own.or(self.mib_per_account).map(|mib| mib.saturating_mul(MIB)))
    }

    /// A finalized archive may be sent again, as a client does that has missed the answer; but no other one.
    async fn filled_before(&self, id: &str, hash: &str, size: u64) -> Result<u64, ApiError> {
        let row = self.store.archive(id).await?.ok_or_else(|| not_found(id))?;
        if row.content.is_some_and(|content| content.hash == hash) {
            return Ok(size);
        }
        Err(ApiError::new(ErrorCode::InvalidState, format!("archive {id} is finalized and has another content"))
            .hint("POST /sandbox-archives/presign begins another archive"))
    }

    async fn forget(&self, id: &str) -> Result<(), ApiError> {
        if let Some(object) = self.store.remove_archive(id).await? {
            self.free(&object).await;
        }
        Ok(())
    }

    /// Nobody knows the object any more: when it cannot be removed now, it is when left-behind objects are.
    async fn free(&self, object: &str) {
        if let Err(error) = self.storage.delete(object).await {
            tracing::warn!(%error, object, "an archive's content stays for now");
        }
    }

    async fn usable(&self, account: &str, id: &str) -> Result<(Archive, ContentRow), ApiError> {
        usable(self.row(account, id).await?).ok_or_else(|| {
            ApiError::new(ErrorCode::InvalidState, format!("archive {id} is not finalized"))
                .hint("PUT its content to upload_url, then POST /sandbox-archives/{id}/finalize")
        })
    }

    async fn row(&self, account: &str, id: &str) -> Result<ArchiveRow, ApiError> {
        let row = self.store.archive(id).await?.ok_or_else(|| not_found(id))?;
        if row.account != account {
            return Err(ApiError::new(ErrorCode::Forbidden, "this archive belongs to another account")
                .hint("GET /sandbox-archives lists your own"));
        }
        Ok(row)
    }
}

/// The bytes of an upload.
pub trait Body: Stream<Item = io::Result<Bytes>> + Send + Unpin + 'static {}
impl<T: Stream<Item = io::Result<Bytes>> + Send + Unpin + 'static> Body for T {}

fn usable(row: ArchiveRow) -> Option<(Archive, ContentRow)> {
    row.finalized_at?;
    let content = row.content?;
    let archive = Archive {
        id: row.id,
        name: row.name,
        size: content.size.try_into().unwrap_or_default(),
        created_at: DateTime::from_timestamp_millis(row.created_at).unwrap_or_default(),
    };
    Some((archive, content))
}

fn check_name(name: Option<&str>) -> Result<(), ApiError> {
    let good = |name: &str| !name.is_empty() && name.len() <= MAX_NAME && !name.chars().any(char::is_control);
    if name.is_none_or(good) {
        return Ok(());
    }
    Err(ApiError::new(ErrorCode::InvalidName, "the archive's name is empty, too long, or has control characters")
        .hint("use 1 to 255 bytes of text, or leave it out"))
}

fn too_much(used: i64, more: i64, most: Option<i64>) -> ApiError {
    let [used, more, most] = [used, more, most.unwrap_or_default()].map(|bytes| bytes as f64 / MIB as f64);
    let message = format!(
        "this account's archives have {used:.1} MiB, and {more:.1} more would be above its limit of {most} MiB"
    );
    ApiError::new(ErrorCode::QuotaExceeded, message)
        .hint("heyvm delete-archive removes one (heyvm list-archives shows them), or ask the operator for more")
}

fn not_found(id: &str) -> ApiError {
    let shown: String = id.chars().filter(|c| !c.is_control()).take(64).collect();
    ApiError::new(ErrorCode::ArchiveNotFound, format!("there is no archive {shown:?}"))
        .hint("GET /sandbox-archives lists yours; those that were not finalized are forgotten after a day")
}

fn random() -> String {
    let mut bytes = [0; 16];
    rand::rng().fill_bytes(&mut bytes);
    hex::encode(bytes)
}

fn hashed(secret: &str) -> String {
    hex::encode(Sha256::digest(secret))
}

fn now() -> i64 {
    Utc::now().timestamp_millis()
}
