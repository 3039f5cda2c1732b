//! Users: people with a password, each of one account.

use sqlx::{Row, any::AnyRow};

use super::AccountRow;
use crate::{Error, Store};

/// One user. It has no debug form: the password's hash is nobody's to read.
#[derive(Clone, PartialEq, Eq)]
pub struct UserRow {
    /// Their id.
    pub id: String,
    /// Their account.
    pub account_id: String,
    /// Their e-mail address, in lower case; no other user has it.
    pub email: String,
    /// Hash of their password, as a PHC string.
    pub password_hash: String,
    /// What they may do.
    pub scope: String,
    /// When they were added.
    pub created_at: i64,
    /// Since when they may not log in.
    pub disabled_at: Option<i64>,
}

impl Store {
    /// Adds a user, and their account where it is a new one; [`Error::Exists`] where the e-mail address or the account's
    /// name is taken.
    pub async fn add_user(&self, row: &UserRow, account: Option<&AccountRow>) -> Result<(), Error> {
        let mut transaction = self.begin().await?;
        if let Some(account) = account {
            super::insert(account).execute(&mut *transaction).await?;
        }
        let sql = "INSERT INTO users (id, account_id, email, password_hash, scope, created_at, disabled_at) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7)";
        let query = sqlx::query(sql).bind(&row.id).bind(&row.account_id).bind(&row.email).bind(&row.password_hash);
        query.bind(&row.scope).bind(row.created_at).bind(row.disabled_at).execute(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(())
    }

    /// The user of this e-mail address.
    pub async fn user_of_email(&self, email: &str) -> Result<Option<UserRow>, Error> {
        let row = sqlx::query("SELECT * FROM users WHERE email = $1").bind(email).fetch_optional(&self.pool).await?;
        row.as_ref().map(user).transpose()
    }

    /// Every user, oldest first.
    pub async fn users(&self) -> Result<Vec<UserRow>, Error> {
        let rows = sqlx::query("SELECT * FROM users ORDER BY created_at, email").fetch_all(&self.pool).await?;
        rows.iter().map(user).collect()
    }

    /// Gives a user another password and ends their sessions; whether there is such a user.
    pub async fn set_password(&self, id: &str, password_hash: &str, now: i64) -> Result<bool, Error> {
        let sql = "UPDATE users SET password_hash = $2 WHERE id = $1";
        self.change_user(sqlx::query(sql).bind(id).bind(password_hash), id, now).await
    }

    /// Shuts a user out and ends their sessions; whether there is such a user.
    pub async fn disable_user(&self, id: &str, now: i64) -> Result<bool, Error> {
        let sql = "UPDATE users SET disabled_at = COALESCE(disabled_at, $2) WHERE id = $1";
        self.change_user(sqlx::query(sql).bind(id).bind(now), id, now).await
    }

    /// Lets a user in again; whether there is such a user.
    pub async fn enable_user(&self, id: &str) -> Result<bool, Error> {
        let sql = "UPDATE users SET disabled_at = NULL WHERE id = $1";
        Ok(sqlx::query(sql).bind(id).execute(&self.pool).await?.rows_affected() > 0)
    }

    async fn change_user(&self, change: super::Query<'_>, id: &str, now: i64) -> Result<bool, Error> {
        let mut transaction = self.begin().await?;
        let changed = change.execute(&mut *transaction).await?.rows_affected() > 0;
        let sql = "UPDATE sessions SET ended_at = $2 WHERE user_id = $1 AND ended_at IS NULL";
        sqlx::query(sql).bind(id).bind(now).execute(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(changed)
    }
}

fn user(row: &AnyRow) -> Result<UserRow, Error> {
    Ok(UserRow {
        id: row.try_get("id")?,
        account_id: row.try_get("account_id")?,
        email: row.try_get("email")?,
        password_hash: row.try_get("password_hash")?,
        scope: row.try_get("scope")?,
        created_at: row.try_get("created_at")?,
        disabled_at: row.try_get("disabled_at")?,
    })
}
