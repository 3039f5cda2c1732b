//! Idempotency keys: a request that comes again gives what it gave.

use sqlx::Row;

use crate::{Error, Store, sandboxes::Query};

/// What an idempotency key stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRow {
    /// Hash of the request it came with.
    pub request: String,
    /// The sandbox it gave.
    pub sandbox_id: String,
}

impl Store {
    /// What a key stands for.
    pub async fn key(&self, key: &str) -> Result<Option<KeyRow>, Error> {
        let row =
            sqlx::query("SELECT * FROM idempotency_keys WHERE key = $1").bind(key).fetch_optional(&self.pool).await?;
        row.map(|row| Ok(KeyRow { request: row.try_get("request")?, sandbox_id: row.try_get("sandbox_id")? }))
            .transpose()
    }

    /// Has a key stand for a sandbox.
    pub async fn add_key(&self, key: &str, row: &KeyRow, now: i64) -> Result<(), Error> {
        add_key(key, row, now).execute(&self.pool).await?;
        Ok(())
    }

    /// Forgets the keys of a sandbox that failed or is gone.
    pub async fn remove_keys(&self, sandbox_id: &str) -> Result<(), Error> {
        sqlx::query("DELETE FROM idempotency_keys WHERE sandbox_id = $1").bind(sandbox_id).execute(&self.pool).await?;
        Ok(())
    }
}

pub(crate) fn add_key<'q>(key: &'q str, row: &'q KeyRow, now: i64) -> Query<'q> {
    let sql = "INSERT INTO idempotency_keys (key, request, sandbox_id, created_at) VALUES ($1, $2, $3, $4)";
    sqlx::query(sql).bind(key).bind(&row.request).bind(&row.sandbox_id).bind(now)
}
