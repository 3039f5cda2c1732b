//! What was done, by whom: rows are added, and never changed.

use sqlx::Row;

use crate::{Error, Store};

/// One thing that was done, or refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditRow {
    /// Counts up; chosen by the database.
    pub id: i64,
    /// When.
    pub at: i64,
    /// In which account.
    pub account_id: String,
    /// By whom.
    pub actor: String,
    /// What.
    pub action: String,
    /// To what.
    pub target: String,
    /// How it ended, as an HTTP status.
    pub status: i64,
    /// The request's id.
    pub request_id: Option<String>,
    /// From which address.
    pub ip: Option<String>,
}

impl Store {
    /// Adds a row; its id is ignored.
    pub async fn add_audit(&self, row: &AuditRow) -> Result<(), Error> {
        let sql = "INSERT INTO audit_log (at, account_id, actor, action, target, status, request_id, ip) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8)";
        let query = sqlx::query(sql).bind(row.at).bind(&row.account_id).bind(&row.actor).bind(&row.action);
        let query = query.bind(&row.target).bind(row.status).bind(&row.request_id).bind(&row.ip);
        query.execute(&self.pool).await?;
        Ok(())
    }

    /// Forgets rows of before `moment`.
    pub async fn forget_audit(&self, moment: i64) -> Result<(), Error> {
        sqlx::query("DELETE FROM audit_log WHERE at < $1").bind(moment).execute(&self.pool).await?;
        Ok(())
    }

    /// The newest rows of an account first, at most `limit`, with ids below `before`.
    pub async fn audit(&self, account_id: &str, before: i64, limit: u32) -> Result<Vec<AuditRow>, Error> {
        let sql = "SELECT * FROM audit_log WHERE account_id = $1 AND id < $2 ORDER BY id DESC LIMIT $3";
        let query = sqlx::query(sql).bind(account_id).bind(before).bind(i64::from(limit));
        let rows = query.fetch_all(&self.pool).await?;
        rows.iter()
            .map(|row| {
                Ok(AuditRow {
                    id: row.try_get("id")?,
                    at: row.try_get("at")?,
                    account_id: row.try_get("account_id")?,
                    actor: row.try_get("actor")?,
                    action: row.try_get("action")?,
                    target: row.try_get("target")?,
                    status: row.try_get("status")?,
                    request_id: row.try_get("request_id")?,
                    ip: row.try_get("ip")?,
                })
            })
            .collect()
    }
}
