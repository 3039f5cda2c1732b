//! What the regions run, written down every few seconds: for lists while a region is cut off, for quotas, for sandboxes
//! that ended by themselves, and for those of which a server that has died did not live to hear.

use std::{sync::Arc, time::Duration};

use chrono::Utc;
use heyvm_api::{
    ApiError, headers,
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
        let mut cut_off = false;
        loop {
            let outcome = self.sync(region).await;
            match &outcome {
                Ok(()) if cut_off => tracing::info!(region = region.name, "the region answers again"),
                Err(error) if !cut_off => tracing::warn!(region = region.name, %error, "the region is cut off"),
                Ok(()) | Err(_) => {}
            }
            cut_off = outcome.is_err();
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                () = ending.cancelled() => return,
            }
        }
    }

    /// Asks one region what it runs, and writes down what has changed.
    pub async fn sync(&self, region: &Region) -> Result<(), ApiError> {
        let found: Vec<SandboxInfo> = region.ask(headers::EVERY_ACCOUNT, "/sandboxes?filter=all").await?;
        for row in self.store.placements_in(&region.name).await? {
            match found.iter().find(|info| info.id == row.id) {
                Some(info) if differs(&row, info) => self.learned(&row, info).await?,
                None if age(&row) > UNHEARD => self.lost(&row).await?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Those that have been gone for long enough.
    async fn forget(&self) -> Result<(), ApiError> {
        let before = Utc::now().timestamp_millis() - i64::try_from(REMEMBERED.as_millis()).unwrap_or(i64::MAX);
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

fn age(row: &PlacementRow) -> Duration {
    let millis = Utc::now().timestamp_millis().saturating_sub(row.created_at.max(row.changed_at));
    Duration::from_millis(u64::try_from(millis).unwrap_or_default())
}
