//! Lists of sandboxes, page by page.

use std::{
    collections::HashSet,
    sync::{Arc, atomic::Ordering},
};

use chrono::{DateTime, Utc};
use heyvm_api::{
    ApiError, ErrorCode,
    sandbox::{ListFilter, SandboxInfo, Status},
};

use crate::{Account, ControlPlane, Sandbox, changes::Revision, record::Record};

/// Which sandboxes are asked for.
#[derive(Debug, Clone, Default)]
pub struct ListQuery {
    /// In which states.
    pub filter: ListFilter,
    /// Whose; all where absent.
    pub account: Option<Account>,
    /// Only those with exactly this name.
    pub name: Option<String>,
    /// Only these.
    pub ids: Option<Vec<String>>,
    /// Only those behind this place of the list.
    pub after: Option<String>,
    /// Only those that have changed since, in the order of their changes.
    pub since: Option<Revision>,
}

/// Sandboxes one by one, each with its place in the list, so that a page can end behind any of them.
pub struct Listing {
    entries: Vec<(Place, Arc<Sandbox>)>,
    /// Where the order of changes had come to before the list was made: nothing that is missing here is older.
    pub revision: Revision,
}

/// A sandbox's place in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// By creation, newest first, then by id.
    Created(DateTime<Utc>, String),
    /// By change, oldest first.
    Changed(Revision),
}

impl Place {
    fn cursor(&self) -> String {
        match self {
            Self::Created(at, id) => format!("{}.{id}", at.timestamp_micros()),
            Self::Changed(revision) => revision.to_string(),
        }
    }
}

impl ControlPlane {
    /// The sandboxes that are asked for: newest first, or the longest unchanged first where changes are asked for.
    pub fn list_pages(&self, query: &ListQuery) -> Result<Listing, ApiError> {
        let revision = self.book.changes.now();
        let after = query.after.as_deref().map(parse_cursor).transpose()?;
        let since = query.since.map(|since| self.book.changes.number(Some(since)).unwrap_or_default());
        let mut entries: Vec<(Place, u64, Arc<Sandbox>)> = Vec::new();
        let candidates: Vec<_> = match &query.ids {
            Some(ids) => ids.iter().collect::<HashSet<_>>().into_iter().filter_map(|id| self.with_id(id)).collect(),
            None => self.all(),
        };
        for sandbox in candidates {
            let changed = sandbox.changed_at.load(Ordering::Relaxed);
            let created = {
                let record = sandbox.record();
                if !is_asked_for(&record, query) {
                    continue;
                }
                (record.created_at, record.id.clone())
            };
            let is_behind = |(at, id): &(i64, String)| (-created.0.timestamp_micros(), &created.1) > (-*at, id);
            if after.as_ref().is_some_and(|after| !is_behind(after)) || since.is_some_and(|since| changed <= since) {
                continue;
            }
            let place = match since {
                Some(_) => Place::Changed(self.book.changes.at(changed)),
                None => Place::Created(created.0, created.1),
            };
            entries.push((place, changed, sandbox));
        }
        match since {
            Some(_) => entries.sort_by_key(|(_, changed, _)| *changed),
            None => entries.sort_by(|(a, ..), (b, ..)| match (a, b) {
                (Place::Created(a, id), Place::Created(b, other)) => {
                    (b.timestamp_micros(), id).cmp(&(a.timestamp_micros(), other))
                }
                _ => std::cmp::Ordering::Equal,
            }),
        }
        Ok(Listing { entries: entries.into_iter().map(|(place, _, sandbox)| (place, sandbox)).collect(), revision })
    }

    /// Sandboxes of one account, or of all; newest first.
    pub async fn list(&self, filter: ListFilter, of: Option<&Account>) -> Result<Vec<SandboxInfo>, ApiError> {
        let listing = self.list_pages(&ListQuery { filter, account: of.cloned(), ..ListQuery::default() })?;
        Ok(listing.sandboxes(self).map(|(_, info)| info).collect())
    }
}

impl Listing {
    /// Each sandbox as it is now, with the cursor of what comes behind it.
    pub fn sandboxes<'a>(&'a self, plane: &'a ControlPlane) -> impl Iterator<Item = (String, SandboxInfo)> + 'a {
        self.entries.iter().map(|(place, sandbox)| (place.cursor(), plane.info(&sandbox.snapshot())))
    }
}

fn is_asked_for(record: &Record, query: &ListQuery) -> bool {
    let is_state = match query.filter {
        ListFilter::Living => record.holds_its_name(),
        ListFilter::Stopped => matches!(record.status, Status::Stopped | Status::Failed),
        ListFilter::All => !record.waiting_to_replace,
    };
    is_state
        && query.account.as_ref().is_none_or(|account| record.account == *account)
        && query.name.as_ref().is_none_or(|name| record.name == *name)
}

/// Creation in microseconds, and id.
fn parse_cursor(text: &str) -> Result<(i64, String), ApiError> {
    let parsed = text.split_once('.').and_then(|(at, id)| Some((at.parse().ok()?, id.to_owned())));
    parsed.ok_or_else(|| {
        ApiError::new(ErrorCode::InvalidArgument, "the cursor is not one of a list")
            .hint("send the heyvm-next-cursor of the last page, or none")
    })
}
