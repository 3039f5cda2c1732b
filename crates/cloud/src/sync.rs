//! What the regions run, written down every few seconds: for lists while a region is cut off, for quotas, for sandboxes
//! that ended by themselves, and for those of which a server that has died did not live to hear.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use chrono::Utc;
use heyvm_api::{
    ApiError,
    client::Page,
    headers,
    sandbox::{SandboxInfo, Status},
};
use heyvm_store::placements::PlacementRow;
use tokio_util::sync::CancellationToken;

use crate::{Cloud, Region, placements};

/// How often a region is asked.
const EVERY: Duration = Duration::from_secs(5);
/// A sandbox that its region has not heard of after this is none.
const UNHEARD: Duration = Duration::from_secs(120);
/// Those that are gone are told of this long.
const REMEMBERED: Duration = Duration::from_secs(24 * 3600);
/// How often those told of for so long are looked for.
const FORGET_EVERY: Duration = Duration::from_secs(600);

/// How often a region is asked for everything, rather than for changes.
const WHOLE_EVERY: Duration = Duration::from_secs(60);
/// A revision that every sandbox is newer than.
const BEGINNING: &str = "00000000-0";

/// What has been seen of a region.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Changes up to here.
    revision: Option<String>,
    /// When everything was last seen.
    whole_at: Option<Instant>,
}

impl Cloud {
    /// Asks every region, and forgets what is over, until the end.
    pub async fn sync_forever(self: Arc<Self>, ending: CancellationToken) {
        let regions = self.regions.iter().map(|region| self.sync_region(region, &ending));
        futures::join!(futures::future::join_all(regions), self.forget_forever(&ending));
    }

    async fn forget_forever(&self, ending: &CancellationToken) {
        loop {
            if let Err(error) = self.forget().await {
                tracing::warn!(%error, "sandboxes that are long gone could not be forgotten");
            }
            tokio::select! {
                () = tokio::time::sleep(FORGET_EVERY) => {}
                () = ending.cancelled() => return,
            }
        }
    }

    async fn sync_region(&self, region: &Region, ending: &CancellationToken) {
        let mut unreachable = false;
        let mut seen = Seen::default();
        loop {
            let outcome = self.sync(region, &mut seen).await;
            match &outcome {
                Ok(()) if unreachable => tracing::info!(region = region.name, "the region answers again"),
                Err(error) if !unreachable => tracing::warn!(region = region.name, %error, "the region is unreachable"),
                Ok(()) | Err(_) => {}
            }
            unreachable = outcome.is_err();
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                () = ending.cancelled() => return,
            }
        }
    }

    /// Asks one region what has changed since it was last asked, page by page, and records it. Once a minute it asks for
    /// everything, so that nothing stays wrong.
    pub(crate) async fn sync(&self, region: &Region, seen: &mut Seen) -> Result<(), ApiError> {
        let began = Instant::now();
        let is_whole = seen.whole_at.is_none_or(|at| began.duration_since(at) >= WHOLE_EVERY);
        // A revision of before: what is asked for first is everything.
        let mut since = seen.revision.clone().filter(|_| !is_whole).unwrap_or_else(|| BEGINNING.into());
        let mut known = HashSet::new();
        loop {
            let path = format!("/sandboxes?filter=all&since={since}");
            let page: Page<SandboxInfo> = region.page(headers::EVERY_ACCOUNT, &path).await?;
            for info in page.entries {
                self.record_change(region, &info).await?;
                known.insert(info.id);
            }
            match (page.next, page.revision) {
                // Progress survives a page that cannot be had.
                (Some(next), _) => since = next,
                (None, revision) => {
                    seen.revision = revision;
                    break;
                }
            }
            if !is_whole {
                seen.revision = Some(since.clone());
            }
        }
        if is_whole {
            self.find_lost(region, &known).await?;
            seen.whole_at = Some(began);
        }
        Ok(())
    }

    async fn record_change(&self, region: &Region, info: &SandboxInfo) -> Result<(), ApiError> {
        let row = self.store.placement(&info.id).await?.filter(|row| !row.gone && row.region == region.name);
        match row {
            Some(row) if differs(&row, info) => self.learned(&row, info).await,
            _ => Ok(()),
        }
    }

    /// Those that the region should know and does not.
    async fn find_lost(&self, region: &Region, known: &HashSet<String>) -> Result<(), ApiError> {
        let before = Utc::now().timestamp_millis() - millis(UNHEARD);
        for id in self.store.placements_unheard(&region.name, before).await? {
            if known.contains(&id) {
                continue;
            }
            if let Some(row) = self.store.placement(&id).await?.filter(|row| !row.gone) {
                self.lost(&row).await?;
            }
        }
        Ok(())
    }

    /// Those that have been gone for long enough.
    async fn forget(&self) -> Result<(), ApiError> {
        let before = Utc::now().timestamp_millis() - millis(REMEMBERED);
        self.store.forget_placements(before).await.map_err(Into::into)
    }

    /// The region does not know it: what it was, and that it is gone.
    async fn lost(&self, row: &PlacementRow) -> Result<(), ApiError> {
        let known = self.last_known(row);
        let message = "its region does not know it any more".to_owned();
        let info = SandboxInfo { status: Status::Removed, urls: Vec::new(), error_message: Some(message), ..known };
        self.learned(row, &info).await
    }
}

/// Whether there is something new in what a region tells.
fn differs(row: &PlacementRow, info: &SandboxInfo) -> bool {
    let next = placements::with(row, info);
    let without_time = |text: &str| {
        let mut value: serde_json::Value = serde_json::from_str(text).unwrap_or_default();
        value["uptime_secs"] = 0.into();
        value
    };
    (row.holds_name, row.running, row.gone) != (next.holds_name, next.running, next.gone)
        || without_time(&row.info) != without_time(&next.info)
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
