//! The audit log: what was done to an account, by whom, from where.

use std::net::IpAddr;

use heyvm_api::{
    ApiError,
    accounts::{AuditEntry, AuditPage},
};
use heyvm_store::accounts::AuditRow;

use crate::{Accounts, time};

/// Longest text of an entry, in bytes: what a client sends is cut, so that it cannot fill the store.
const LONGEST: usize = 256;
/// Entries of a page, unless fewer or more are asked for.
pub const DEFAULT_PAGE: u32 = 100;
const LARGEST_PAGE: u32 = 1000;

impl Accounts {
    /// Adds an entry.
    ///
    /// # Errors
    /// Where the store does not answer.
    pub async fn audit(&self, entry: &AuditEntry) -> Result<(), ApiError> {
        let row = AuditRow {
            id: 0,
            at: entry.at.timestamp_millis(),
            account_id: entry.account_id.clone(),
            actor: cut(&entry.actor),
            action: cut(&entry.action),
            target: cut(&entry.target),
            status: entry.status.into(),
            request_id: entry.request_id.as_deref().map(cut),
            ip: entry.ip.as_deref().map(cut),
        };
        self.store.add_audit(&row).await.map_err(Into::into)
    }

    /// The newest entries of an account first, at most `limit` (and at most 1000), older than the cursor `before` that
    /// the last page gave.
    ///
    /// # Errors
    /// Where the store does not answer.
    pub async fn audit_log(&self, account_id: &str, before: Option<i64>, limit: u32) -> Result<AuditPage, ApiError> {
        let limit = limit.clamp(1, LARGEST_PAGE);
        let mut rows = self.store.audit(account_id, before.unwrap_or(i64::MAX), limit + 1).await?;
        let more = rows.len() > limit as usize;
        rows.truncate(limit as usize);
        let next = rows.last().filter(|_| more).map(|row| row.id);
        Ok(AuditPage { entries: rows.into_iter().map(entry).collect(), next })
    }

    /// Adds an entry for what is done here. That it cannot be written undoes nothing, but is told in the server's log.
    pub(crate) async fn note(
        &self,
        account_id: &str,
        actor: &str,
        action: &str,
        target: &str,
        status: u16,
        from: Option<IpAddr>,
    ) {
        let entry = AuditEntry {
            at: time(self.now()),
            account_id: account_id.to_owned(),
            actor: actor.to_owned(),
            action: action.to_owned(),
            target: target.to_owned(),
            status,
            request_id: None,
            ip: from.map(|address| address.to_canonical().to_string()),
        };
        if self.audit(&entry).await.is_err() {
            tracing::error!(account_id, actor, action, target, status, "not in the audit log");
        }
    }
}

/// The text, or as much of its beginning as an entry holds, with `…` behind it.
fn cut(text: &str) -> String {
    if text.len() <= LONGEST {
        return text.to_owned();
    }
    let end = text.floor_char_boundary(LONGEST);
    format!("{}…", &text[..end])
}

fn entry(row: AuditRow) -> AuditEntry {
    AuditEntry {
        at: time(row.at),
        account_id: row.account_id,
        actor: row.actor,
        action: row.action,
        target: row.target,
        status: u16::try_from(row.status).unwrap_or_default(),
        request_id: row.request_id,
        ip: row.ip,
    }
}
