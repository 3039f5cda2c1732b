//! Sessions and their refresh tokens, which are known by their hashes alone.

use sqlx::{Any, Row, Transaction};

use crate::{Error, Store};

/// One session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionRow {
    /// Its id.
    pub id: String,
    /// Its account.
    pub account_id: String,
    /// Who logged in, or who made the API key.
    pub user_id: Option<String>,
    /// The API key that was exchanged.
    pub api_key_id: Option<String>,
    /// What it may do.
    pub scope: String,
    /// When it began.
    pub created_at: i64,
    /// When it ends, unless a token is refreshed before.
    pub expires_at: i64,
    /// When it was ended.
    pub ended_at: Option<i64>,
}

/// A session and who stands behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionOwner {
    /// The session.
    pub session: SessionRow,
    /// The user's e-mail address.
    pub email: Option<String>,
    /// Since when the user is shut out.
    pub disabled_at: Option<i64>,
    /// When its API key was revoked.
    pub key_revoked_at: Option<i64>,
    /// When its API key ends.
    pub key_expires_at: Option<i64>,
}

/// What became of a refresh token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refreshed {
    /// It is used up, and another stands in its place for the session of this id.
    Session(String),
    /// It had been used before, and the session of this id is ended: one of the two is not who they say.
    Reused(String),
    /// It is none.
    Unknown,
}

impl Store {
    /// Begins a session with its first refresh token.
    pub async fn begin_session(&self, row: &SessionRow, token_hash: &str) -> Result<(), Error> {
        let mut transaction = self.begin().await?;
        let sql = "INSERT INTO sessions (id, account_id, user_id, api_key_id, scope, created_at, expires_at, ended_at) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8)";
        let query = sqlx::query(sql).bind(&row.id).bind(&row.account_id).bind(&row.user_id).bind(&row.api_key_id);
        let query = query.bind(&row.scope).bind(row.created_at).bind(row.expires_at).bind(row.ended_at);
        query.execute(&mut *transaction).await?;
        add_token(&mut transaction, token_hash, &row.id, row.created_at).await?;
        transaction.commit().await?;
        Ok(())
    }

    /// The session of this id, and who stands behind it.
    pub async fn session(&self, id: &str) -> Result<Option<SessionOwner>, Error> {
        let sql = "SELECT sessions.*, users.email AS email, users.disabled_at AS disabled_at, \
                   api_keys.revoked_at AS key_revoked_at, api_keys.expires_at AS key_expires_at FROM sessions \
                   LEFT JOIN users ON users.id = sessions.user_id \
                   LEFT JOIN api_keys ON api_keys.id = sessions.api_key_id WHERE sessions.id = $1";
        let row = sqlx::query(sql).bind(id).fetch_optional(&self.pool).await?;
        row.map(|row| {
            let session = SessionRow {
                id: row.try_get("id")?,
                account_id: row.try_get("account_id")?,
                user_id: row.try_get("user_id")?,
                api_key_id: row.try_get("api_key_id")?,
                scope: row.try_get("scope")?,
                created_at: row.try_get("created_at")?,
                expires_at: row.try_get("expires_at")?,
                ended_at: row.try_get("ended_at")?,
            };
            Ok(SessionOwner {
                session,
                email: row.try_get("email")?,
                disabled_at: row.try_get("disabled_at")?,
                key_revoked_at: row.try_get("key_revoked_at")?,
                key_expires_at: row.try_get("key_expires_at")?,
            })
        })
        .transpose()
    }

    /// The session that a refresh token is of, be it used.
    pub async fn session_of_token(&self, token_hash: &str) -> Result<Option<String>, Error> {
        let sql = "SELECT session_id FROM refresh_tokens WHERE hash = $1";
        Ok(sqlx::query_scalar(sql).bind(token_hash).fetch_optional(&self.pool).await?)
    }

    /// Uses a refresh token up: `next` stands in its place, and the session goes on until `expires_at`. Of several at
    /// once, one has it.
    pub async fn use_token(&self, hash: &str, next: &str, now: i64, expires_at: i64) -> Result<Refreshed, Error> {
        let mut transaction = self.begin().await?;
        let sql = "UPDATE refresh_tokens SET used_at = $2 WHERE hash = $1 AND used_at IS NULL RETURNING session_id";
        let used: Option<String> =
            sqlx::query_scalar(sql).bind(hash).bind(now).fetch_optional(&mut *transaction).await?;
        let outcome = match used {
            Some(id) => {
                let sql = "UPDATE sessions SET expires_at = $2 WHERE id = $1";
                sqlx::query(sql).bind(&id).bind(expires_at).execute(&mut *transaction).await?;
                add_token(&mut transaction, next, &id, now).await?;
                Refreshed::Session(id)
            }
            None => {
                let sql = "UPDATE sessions SET ended_at = COALESCE(ended_at, $2) \
                           WHERE id = (SELECT session_id FROM refresh_tokens WHERE hash = $1) RETURNING id";
                let ended = sqlx::query_scalar(sql).bind(hash).bind(now).fetch_optional(&mut *transaction).await?;
                ended.map_or(Refreshed::Unknown, Refreshed::Reused)
            }
        };
        transaction.commit().await?;
        Ok(outcome)
    }

    /// Ends a session; whether it was there and had not ended.
    pub async fn end_session(&self, id: &str, now: i64) -> Result<bool, Error> {
        let sql = "UPDATE sessions SET ended_at = $2 WHERE id = $1 AND ended_at IS NULL";
        Ok(sqlx::query(sql).bind(id).bind(now).execute(&self.pool).await?.rows_affected() > 0)
    }

    /// Forgets sessions that ended before `moment`.
    pub async fn forget_sessions(&self, moment: i64) -> Result<(), Error> {
        let mut transaction = self.begin().await?;
        let sql = "DELETE FROM refresh_tokens WHERE session_id IN \
                   (SELECT id FROM sessions WHERE expires_at < $1 OR ended_at < $1)";
        sqlx::query(sql).bind(moment).execute(&mut *transaction).await?;
        let sql = "DELETE FROM sessions WHERE (expires_at < $1 OR ended_at < $1) \
                   AND id NOT IN (SELECT session_id FROM refresh_tokens)";
        sqlx::query(sql).bind(moment).execute(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(())
    }
}

async fn add_token(
    transaction: &mut Transaction<'static, Any>,
    hash: &str,
    session_id: &str,
    now: i64,
) -> Result<(), Error> {
    let sql = "INSERT INTO refresh_tokens (hash, session_id, created_at) VALUES ($1, $2, $3)";
    sqlx::query(sql).bind(hash).bind(session_id).bind(now).execute(&mut **transaction).await?;
    Ok(())
}
