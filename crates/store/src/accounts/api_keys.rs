//! API keys, each known by its hash alone.

use sqlx::{AssertSqlSafe, Row, any::AnyRow};

use crate::{Error, Store};

/// One API key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKeyRow {
    /// Its id.
    pub id: String,
    /// Its account.
    pub account_id: String,
    /// Who made it; none where the server's operator did.
    pub user_id: Option<String>,
    /// What its owner calls it.
    pub name: String,
    /// Its first letters, to tell keys apart.
    pub prefix: String,
    /// Its hash.
    pub hash: String,
    /// What it may do.
    pub scope: String,
    /// When it was made.
    pub created_at: i64,
    /// When it ends.
    pub expires_at: Option<i64>,
    /// When it was last used, to the minute.
    pub last_used_at: Option<i64>,
    /// When it was revoked.
    pub revoked_at: Option<i64>,
}

/// An API key and who stands behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKeyOwner {
    /// The key.
    pub key: ApiKeyRow,
    /// E-mail address of who made it.
    pub email: Option<String>,
    /// Since when they are shut out.
    pub disabled_at: Option<i64>,
}

impl Store {
    /// Adds an API key.
    pub async fn add_api_key(&self, row: &ApiKeyRow) -> Result<(), Error> {
        let sql = "INSERT INTO api_keys (id, account_id, user_id, name, prefix, hash, scope, created_at, expires_at, \
                   last_used_at, revoked_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)";
        let query = sqlx::query(sql).bind(&row.id).bind(&row.account_id).bind(&row.user_id).bind(&row.name);
        let query = query.bind(&row.prefix).bind(&row.hash).bind(&row.scope).bind(row.created_at);
        query.bind(row.expires_at).bind(row.last_used_at).bind(row.revoked_at).execute(&self.pool).await?;
        Ok(())
    }

    /// The API key of this hash, and who stands behind it.
    pub async fn api_key_of_hash(&self, hash: &str) -> Result<Option<ApiKeyOwner>, Error> {
        self.api_key_owner("hash", hash).await
    }

    /// The API key of this id, and who stands behind it.
    pub async fn api_key_of_id(&self, id: &str) -> Result<Option<ApiKeyOwner>, Error> {
        self.api_key_owner("id", id).await
    }

    async fn api_key_owner(&self, column: &'static str, value: &str) -> Result<Option<ApiKeyOwner>, Error> {
        let sql = format!(
            "SELECT api_keys.*, users.email AS email, users.disabled_at AS disabled_at \
             FROM api_keys LEFT JOIN users ON users.id = api_keys.user_id WHERE api_keys.{column} = $1"
        );
        let row = sqlx::query(AssertSqlSafe(sql)).bind(value).fetch_optional(&self.pool).await?;
        row.map(|row| {
            let (email, disabled_at) = (row.try_get("email")?, row.try_get("disabled_at")?);
            Ok(ApiKeyOwner { key: api_key(&row)?, email, disabled_at })
        })
        .transpose()
    }

    /// The API keys of one account, or of all, newest first.
    pub async fn api_keys(&self, account_id: Option<&str>) -> Result<Vec<ApiKeyRow>, Error> {
        let sql =
            "SELECT * FROM api_keys WHERE CAST($1 AS TEXT) IS NULL OR account_id = $1 ORDER BY created_at DESC, id";
        let rows = sqlx::query(sql).bind(account_id).fetch_all(&self.pool).await?;
        rows.iter().map(api_key).collect()
    }

    /// Revokes a key; it stays revoked since when it first was. The key as it then is, if there is one.
    pub async fn revoke_api_key(&self, id: &str, now: i64) -> Result<Option<ApiKeyRow>, Error> {
        let sql = "UPDATE api_keys SET revoked_at = COALESCE(revoked_at, $2) WHERE id = $1 RETURNING *";
        let row = sqlx::query(sql).bind(id).bind(now).fetch_optional(&self.pool).await?;
        row.as_ref().map(api_key).transpose()
    }

    /// The API key of this id.
    pub async fn api_key(&self, id: &str) -> Result<Option<ApiKeyRow>, Error> {
        let row = sqlx::query("SELECT * FROM api_keys WHERE id = $1").bind(id).fetch_optional(&self.pool).await?;
        row.as_ref().map(api_key).transpose()
    }

    /// Notes that a key was used.
    pub async fn touch_api_key(&self, id: &str, now: i64) -> Result<(), Error> {
        let sql = "UPDATE api_keys SET last_used_at = $2 WHERE id = $1";
        sqlx::query(sql).bind(id).bind(now).execute(&self.pool).await?;
        Ok(())
    }
}

fn api_key(row: &AnyRow) -> Result<ApiKeyRow, Error> {
    Ok(ApiKeyRow {
        id: row.try_get("id")?,
        account_id: row.try_get("account_id")?,
        user_id: row.try_get("user_id")?,
        name: row.try_get("name")?,
        prefix: row.try_get("prefix")?,
        hash: row.try_get("hash")?,
        scope: row.try_get("scope")?,
        created_at: row.try_get("created_at")?,
        expires_at: row.try_get("expires_at")?,
        last_used_at: row.try_get("last_used_at")?,
        revoked_at: row.try_get("revoked_at")?,
    })
}
