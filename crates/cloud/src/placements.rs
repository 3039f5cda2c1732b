//! Whose sandbox is where, as the store knows.

use std::collections::BTreeMap;

use chrono::Utc;
use heyvm_api::{
    ApiError, ErrorCode,
    client::Page,
    names,
    sandbox::{ListFilter, SandboxInfo, Status},
};
use heyvm_store::placements::PlacementRow;

use crate::{Cloud, regions::Region};

/// A sandbox of an account and the region it is in.
pub struct Place<'a> {
    /// Its id.
    pub id: String,
    /// Whose it is.
    pub account: String,
    /// Where it is.
    pub region: &'a Region,
    pub(crate) row: PlacementRow,
}

/// How many sandboxes are looked at at a time.
const BATCH: i64 = 500;

/// Ids in one question to a region: a request's head is limited.
const IDS: usize = 200;

/// Which sandboxes of an account are asked for.
#[derive(Debug, Clone, Default)]
pub struct ListQuery {
    /// In which states.
    pub filter: ListFilter,
    /// Also those that are removed.
    pub with_removed: bool,
    /// Only those with exactly this name.
    pub name: Option<String>,
    /// Only those behind this place of the list.
    pub after: Option<String>,
}

impl Cloud {
    /// By id, else the account's living one of that name or slug, else its newest, else by the beginning of its id.
    /// Another account's id is `forbidden`.
    pub async fn find(&self, account: &str, who: &str) -> Result<Place<'_>, ApiError> {
        let by_id = self.store.placement(who).await?;
        if by_id.as_ref().is_some_and(|row| row.account_id != account) {
            return Err(ApiError::new(ErrorCode::Forbidden, format!("sandbox {who} belongs to another account"))
                .hint("heyvm whoami tells which account you are; heyvm list shows its sandboxes"));
        }
        let row = match by_id {
            Some(row) => Some(row),
            None => match self.store.placement_named(account, who).await? {
                Some(named) => Some(named),
                None => self.with_short_id(account, who).await?,
            },
        };
        let row = row.ok_or_else(|| {
            ApiError::new(ErrorCode::SandboxNotFound, format!("there is no sandbox {who:?}"))
                .hint("heyvm list --all shows them all, also those removed within a day")
        })?;
        self.place(row)
    }

    async fn with_short_id(&self, account: &str, who: &str) -> Result<Option<PlacementRow>, ApiError> {
        if !names::is_short_id(who) {
            return Ok(None);
        }
        let mut rows = self.store.placements_with_prefix(account, who, 2).await?;
        let found = names::only_one_with(who, rows.iter().map(|row| row.id.clone()))?;
        rows.retain(|row| found.as_ref() == Some(&row.id));
        Ok(rows.pop())
    }

    pub(crate) fn place(&self, row: PlacementRow) -> Result<Place<'_>, ApiError> {
        let region = self.region_of(&row.region)?;
        Ok(Place { id: row.id.clone(), account: row.account_id.clone(), region, row })
    }

    /// The account's sandboxes, newest first, each with the cursor of what comes behind it: up to one more than `size`, so
    /// that it shows whether there are more. Those of a region that is unreachable are listed as they were last seen.
    pub async fn list(
        &self,
        account: &str,
        query: &ListQuery,
        size: usize,
    ) -> Result<Vec<(String, SandboxInfo)>, ApiError> {
        let mut after = query.after.as_deref().map(parse_cursor).transpose()?;
        let mut found = Vec::new();
        while found.len() <= size {
            let behind = after.as_ref().map(|(at, id)| (*at, id.as_str()));
            let mut rows = self.store.placements_of(account, query.with_removed, behind, BATCH).await?;
            let Some(last) = rows.last() else { break };
            after = Some((last.created_at, last.id.clone()));
            let is_last = i64::try_from(rows.len()).is_ok_and(|count| count < BATCH);
            rows.retain(|row| query.name.as_ref().is_none_or(|name| row.name == *name));
            let infos = self.as_seen(account, &rows).await;
            let entries = rows.iter().map(|row| format!("{}.{}", row.created_at, row.id)).zip(infos);
            found.extend(entries.filter(|(_, info)| match query.filter {
                ListFilter::Living => matches!(info.status, Status::Provisioning | Status::Running | Status::Stopping),
                ListFilter::Stopped => matches!(info.status, Status::Stopped | Status::Failed),
                ListFilter::All => query.with_removed || info.status != Status::Removed,
            }));
            if is_last {
                break;
            }
        }
        found.truncate(size + 1);
        Ok(found)
    }

    /// What their regions say of them now.
    async fn as_seen(&self, account: &str, rows: &[PlacementRow]) -> Vec<SandboxInfo> {
        let mut ids = BTreeMap::<&str, Vec<&str>>::new();
        for row in rows.iter().filter(|row| !row.gone) {
            ids.entry(&row.region).or_default().push(&row.id);
        }
        let asked =
            ids.into_iter().map(|(name, ids)| async move { (name, self.region_states(account, name, &ids).await) });
        let answers: BTreeMap<_, _> = futures::future::join_all(asked).await.into_iter().collect();
        let seen = |row: &PlacementRow| match answers.get(row.region.as_str()) {
            Some(Err(error)) if !row.gone => {
                SandboxInfo { error_message: Some(error.message.clone()), ..self.last_known(row) }
            }
            Some(Ok(found)) => match found.get(&row.id) {
                Some(info) => self.told(row, info.clone()),
                None => self.last_known(row),
            },
            Some(Err(_)) | None => self.last_known(row),
        };
        rows.iter().map(seen).collect()
    }

    async fn region_states(
        &self,
        account: &str,
        region: &str,
        ids: &[&str],
    ) -> Result<BTreeMap<String, SandboxInfo>, ApiError> {
        let region = self.region_of(region)?;
        let mut found = BTreeMap::new();
        for ids in ids.chunks(IDS) {
            let path = format!("/sandboxes?filter=all&ids={}", ids.join(","));
            let mut next = Some(path.clone());
            while let Some(path_of_page) = next {
                let page: Page<SandboxInfo> = region.page(account, &path_of_page).await?;
                found.extend(page.entries.into_iter().map(|info| (info.id.clone(), info)));
                next = page.next.map(|cursor| format!("{path}&cursor={cursor}"));
            }
        }
        Ok(found)
    }

    /// One sandbox; also one that was removed within the last day.
    pub async fn get(&self, account: &str, who: &str) -> Result<SandboxInfo, ApiError> {
        let place = self.find(account, who).await?;
        self.ask(&place).await
    }

    /// What the region says of it now; what is written down where the region does not know it (yet, or any more).
    pub(crate) async fn ask(&self, place: &Place<'_>) -> Result<SandboxInfo, ApiError> {
        match place.region.ask(&place.account, &place.path("")).await {
            Ok(info) => Ok(self.told(&place.row, info)),
            Err(error) if error.code == ErrorCode::SandboxNotFound => Ok(self.last_known(&place.row)),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn last_known(&self, row: &PlacementRow) -> SandboxInfo {
        // Written by this program, of whatever version: fields that are not known are left out.
        let info: SandboxInfo = serde_json::from_str(&row.info).unwrap_or_else(|error| {
            tracing::error!(%error, id = row.id, "a placement cannot be read");
            unknown(row)
        });
        SandboxInfo { uptime_secs: 0, ..self.told(row, info) }
    }

    /// Writes down what a region has just told of a sandbox.
    pub(crate) async fn learned(&self, row: &PlacementRow, info: &SandboxInfo) -> Result<(), ApiError> {
        let next = with(row, info);
        let subdomains: Vec<_> = info.urls.iter().map(|endpoint| endpoint.subdomain.clone()).collect();
        self.store.update_placement(&next).await?;
        self.store.set_subdomains(&next.id, &subdomains).await.map_err(Into::into)
    }
}

impl Place<'_> {
    /// A client of its region that asks for its account.
    pub fn client(&self) -> Result<heyvm_api::client::Client, ApiError> {
        self.region.client(&self.account)
    }

    /// The path of the region's API for it, and what follows.
    pub fn path(&self, rest: &str) -> String {
        format!("/sandboxes/{}{rest}", self.id)
    }
}

/// Creation in milliseconds, and id.
fn parse_cursor(text: &str) -> Result<(i64, String), ApiError> {
    let parsed = text.split_once('.').and_then(|(at, id)| {
        let id = uuid::Uuid::parse_str(id).ok()?;
        Some((at.parse().ok()?, id.to_string()))
    });
    parsed.ok_or_else(|| {
        ApiError::new(ErrorCode::InvalidArgument, "the cursor is not one of a list")
            .hint("send the heyvm-next-cursor of the last page, or none")
    })
}

/// The row of a sandbox of which this is known.
pub(crate) fn with(row: &PlacementRow, info: &SandboxInfo) -> PlacementRow {
    let living = matches!(info.status, Status::Provisioning | Status::Running | Status::Stopping);
    PlacementRow {
        name: info.name.clone(),
        slug: info.slug.clone(),
        holds_name: living,
        running: living,
        gone: info.status == Status::Removed,
        changed_at: Utc::now().timestamp_millis(),
        vcpu_millis: info.size_class.cpu_millis().into(),
        memory_mib: info.size_class.memory_mib().into(),
        disk_gb: info.disk_size_gb.into(),
        // Secrets stay with the region: what the store has, has names alone.
        info: serde_json::to_string(&info.clone().without_values()).unwrap_or_default(),
        ..row.clone()
    }
}

fn unknown(row: &PlacementRow) -> SandboxInfo {
    let request = heyvm_api::sandbox::CreateRequest { name: Some(row.name.clone()), ..Default::default() };
    crate::create::provisional(row, &request)
}
