//! Archives on their way to a region, and what is made from them.

use std::{path::Path, sync::Arc};

use heyvm_api::{
    ApiError, ErrorCode,
    images::{ImageInfo, PullRequest},
    sandbox::{ReplaceMountRequest, SandboxInfo},
    system::ArchiveInfo,
};

use heyvm_control_plane::ProgressSink;
use heyvm_store::{ArchiveRow, ContentRow};
use tokio_util::io::{StreamReader, SyncIoBridge};

use crate::{Cloud, Region, lifecycle::Operation};

impl Cloud {
    /// Puts an archive's content in place of a directory of a running sandbox.
    pub async fn replace_mount(
        self: &Arc<Self>,
        account: &str,
        who: &str,
        request: ReplaceMountRequest,
    ) -> Result<SandboxInfo, ApiError> {
        let mut place = self.find(account, who).await?;
        let (row, stored) = self.archive(account, &request.archive_id).await?;
        let working_directory = self.last_known(&place.row).working_directory;
        let directory = request.sandbox_path.clone().unwrap_or_else(|| working_directory.clone());
        let archive_root = match request.archive_root {
            None => self.root_in(&row, &stored, &directory).await?,
            asked => asked,
        };
        let archive_id = heyvm_control_plane::archive_id(&stored.hash);
        let request = ReplaceMountRequest { archive_id, archive_root, ..request };
        let operation = || Operation::ReplaceMount(request.clone());
        let replaced = match self.operate(self.place(place.row.clone())?, operation(), None).await {
            Err(error) if error.code == ErrorCode::ArchiveNotFound => {
                self.bring(place.region, account, &stored).await?;
                self.operate(self.place(place.row.clone())?, operation(), None).await
            }
            outcome => outcome,
        }?;
        if directory.trim_end_matches('/') != working_directory {
            return Ok(replaced);
        }
        place.row.archive_id = Some(row.id);
        self.answer(&place, replaced).await
    }

    /// Images that are ready in the default region.
    pub async fn images(&self, account: &str) -> Result<Vec<ImageInfo>, ApiError> {
        self.choose_region(None)?.ask(account, "/images").await
    }

    /// Fetches an image into the default region, before a deploy does.
    pub async fn pull(
        &self,
        account: &str,
        request: PullRequest,
        progress: ProgressSink,
    ) -> Result<ImageInfo, ApiError> {
        let region = self.choose_region(None)?;
        let told = |event| drop(progress.send(event));
        let pulled = region.client(account)?.post_with_progress("/images/pull", &request, None, told).await;
        pulled.map_err(|error| region.explain(error))
    }

    /// An account's archive and its content.
    pub(crate) async fn archive(&self, account: &str, id: &str) -> Result<(ArchiveRow, ContentRow), ApiError> {
        let missing = || {
            ApiError::new(ErrorCode::ArchiveNotFound, format!("there is no archive {id:?}"))
                .hint("heyvm list-archives shows them; heyvm archive-dir DIR makes one")
        };
        let row = self.store.archive(id).await?.ok_or_else(missing)?;
        if row.account != account {
            return Err(ApiError::new(ErrorCode::Forbidden, format!("archive {id} belongs to another account"))
                .hint("heyvm list-archives shows those of yours"));
        }
        let content = row.content.clone().filter(|_| row.finalized_at.is_some()).ok_or_else(missing)?;
        Ok((row, content))
    }

    /// Which directory of an archive is meant for `directory` of a sandbox. Clients that upload to a URL of ours name
    /// their files from the sandbox's root; heyvm itself, which sends them here, from the directory.
    pub(crate) async fn root_in(
        &self,
        row: &ArchiveRow,
        content: &ContentRow,
        directory: &str,
    ) -> Result<Option<String>, ApiError> {
        if row.ticket.is_none() || directory.trim_matches('/').is_empty() {
            return Ok(None);
        }
        let bytes = SyncIoBridge::new(StreamReader::new(self.storage.read(&content.object).await?));
        let directory = directory.to_owned();
        let looked = tokio::task::spawn_blocking(move || {
            heyvm_archives::lies_below(bytes, Path::new(&directory)).map(|below| below.then_some(directory))
        });
        let found = looked.await.map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))?;
        Ok(found?)
    }

    /// Sends a region what it does not have yet.
    pub(crate) async fn bring(&self, region: &Region, account: &str, stored: &ContentRow) -> Result<(), ApiError> {
        let content = self.storage.read(&stored.object).await?;
        let sent: Result<ArchiveInfo, _> = region.client(account)?.put("/archives", "application/gzip", content).await;
        sent.map(drop).map_err(|error| region.explain(error))
    }
}
