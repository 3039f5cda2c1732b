//! Who may use heyvm's servers: accounts with their quotas (here), `users`, `api_keys`, `sessions`, `signing_keys`,
//! and what they did (`audit`). Rules are the accounts crate's; times are milliseconds since 1970.

mod api_keys;
mod audit;
mod sessions;
mod signing_keys;
mod users;

use sqlx::{Row, any::AnyRow};

pub use api_keys::{ApiKeyOwner, ApiKeyRow};
pub use audit::AuditRow;
pub use sessions::{Refreshed, SessionOwner, SessionRow};
pub use signing_keys::SigningKeyRow;
pub use users::UserRow;

use crate::{Error, Store};

/// One account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccountRow {
    /// Its id.
    pub id: String,
    /// Its name, which no other account has.
    pub name: String,
    /// When it was made.
    pub created_at: i64,
    /// What it may use.
    pub quotas: Quotas,
}

/// What an account may use; where nothing is said, the server's default counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Quotas {
    /// Sandboxes running at a time.
    pub max_running: Option<i64>,
    /// Thousandths of a processor, of all that run.
    pub max_vcpu_millis: Option<i64>,
    /// Memory of all that run, in MiB.
    pub max_memory_mib: Option<i64>,
    /// Disk of all, in GB.
    pub max_disk_gb: Option<i64>,
    /// Archives together, in MiB; the same content counts once.
    pub max_archive_mib: Option<i64>,
    /// Longest time-to-live, in seconds.
    pub max_ttl_seconds: Option<i64>,
}

impl Store {
    /// Adds an account; [`Error::Exists`] where its name is taken.
    pub async fn add_account(&self, row: &AccountRow) -> Result<(), Error> {
        insert(row).execute(&self.pool).await?;
        Ok(())
    }

    /// The account of this id.
    pub async fn account(&self, id: &str) -> Result<Option<AccountRow>, Error> {
        let row = sqlx::query("SELECT * FROM accounts WHERE id = $1").bind(id).fetch_optional(&self.pool).await?;
        row.as_ref().map(account).transpose()
    }

    /// The account of this name.
    pub async fn account_named(&self, name: &str) -> Result<Option<AccountRow>, Error> {
        let row = sqlx::query("SELECT * FROM accounts WHERE name = $1").bind(name).fetch_optional(&self.pool).await?;
        row.as_ref().map(account).transpose()
    }

    /// Every account, oldest first.
    pub async fn accounts(&self) -> Result<Vec<AccountRow>, Error> {
        let rows = sqlx::query("SELECT * FROM accounts ORDER BY created_at, id").fetch_all(&self.pool).await?;
        rows.iter().map(account).collect()
    }

    /// Sets what an account may use; whether there is such an account.
    pub async fn set_quotas(&self, id: &str, quotas: &Quotas) -> Result<bool, Error> {
        let sql = "UPDATE accounts SET max_running = $2, max_vcpu_millis = $3, max_memory_mib = $4, max_disk_gb = $5, \
                   max_archive_mib = $6, max_ttl_seconds = $7 WHERE id = $1";
        let done = bind_quotas(sqlx::query(sql).bind(id), quotas).execute(&self.pool).await?;
        Ok(done.rows_affected() > 0)
    }
}

type Query<'q> = sqlx::query::Query<'q, sqlx::Any, sqlx::any::AnyArguments>;

fn insert(row: &AccountRow) -> Query<'_> {
    let sql = "INSERT INTO accounts (id, name, created_at, max_running, max_vcpu_millis, max_memory_mib, max_disk_gb, \
               max_archive_mib, max_ttl_seconds) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)";
    bind_quotas(sqlx::query(sql).bind(&row.id).bind(&row.name).bind(row.created_at), &row.quotas)
}

fn bind_quotas<'q>(query: Query<'q>, quotas: &Quotas) -> Query<'q> {
    query
        .bind(quotas.max_running)
        .bind(quotas.max_vcpu_millis)
        .bind(quotas.max_memory_mib)
        .bind(quotas.max_disk_gb)
        .bind(quotas.max_archive_mib)
        .bind(quotas.max_ttl_seconds)
}

fn account(row: &AnyRow) -> Result<AccountRow, Error> {
    Ok(AccountRow {
        id: row.try_get("id")?,
        name: row.try_get("name")?,
        created_at: row.try_get("created_at")?,
        quotas: Quotas {
            max_running: row.try_get("max_running")?,
            max_vcpu_millis: row.try_get("max_vcpu_millis")?,
            max_memory_mib: row.try_get("max_memory_mib")?,
            max_disk_gb: row.try_get("max_disk_gb")?,
            max_archive_mib: row.try_get("max_archive_mib")?,
            max_ttl_seconds: row.try_get("max_ttl_seconds")?,
        },
    })
}
