//! Sandboxes: what is looked for stands in columns, the rest is the control plane's JSON.

use sqlx::{Any, AssertSqlSafe, Row, any::AnyRow};

use crate::{EndpointRow, Error, Store, endpoints::add_endpoint};

/// One sandbox's row. Times are milliseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxRow {
    /// Its id.
    pub id: String,
    /// Whose it is; empty: the owner of the daemon's machine.
    pub account: String,
    /// Its name.
    pub name: String,
    /// Its slug.
    pub slug: String,
    /// Whether it holds its name and slug against others.
    pub living: bool,
    /// Whether it is gone and only told of.
    pub removed: bool,
    /// When it was asked for.
    pub created_at: i64,
    /// When it last changed.
    pub changed_at: i64,
    /// When its time-to-live runs out.
    pub expires_at: Option<i64>,
    /// Everything else, as JSON.
    pub data: String,
}

impl Store {
    /// Adds a sandbox.
    pub async fn insert(&self, row: &SandboxRow) -> Result<(), Error> {
        let sql = "INSERT INTO sandboxes (id, name, slug, living, removed, created_at, changed_at, expires_at, data, account) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)";
        let done = bind(sqlx::query(sql), row).execute(&self.pool).await;
        self.told_apart(done.map(drop), row).await
    }

    /// Writes a sandbox anew.
    pub async fn update(&self, row: &SandboxRow) -> Result<(), Error> {
        let done = update(row).execute(&self.pool).await;
        self.told_apart(done.map(drop), row).await
    }

    /// Where both are taken, the name counts: SQLite tells of either.
    async fn told_apart(&self, done: Result<(), sqlx::Error>, row: &SandboxRow) -> Result<(), Error> {
        match done.map_err(Error::from) {
            Err(Error::SlugTaken) => {}
            other => return other,
        }
        let sql = "SELECT 1 FROM sandboxes WHERE living AND name = $1 AND id <> $2 AND account = $3";
        let same_name =
            sqlx::query(sql).bind(&row.name).bind(&row.id).bind(&row.account).fetch_optional(&self.pool).await?;
        Err(if same_name.is_some() { Error::NameTaken } else { Error::SlugTaken })
    }

    /// In one step: `old` gives its name up, `new` takes it, and `moved` subdomains lead to the new one.
    pub async fn replace(&self, old: &SandboxRow, new: &SandboxRow, moved: &[EndpointRow]) -> Result<(), Error> {
        let mut transaction = self.begin().await?;
        update(old).execute(&mut *transaction).await?;
        sqlx::query("DELETE FROM endpoints WHERE sandbox_id = $1").bind(&old.id).execute(&mut *transaction).await?;
        for endpoint in moved {
            let sql = "DELETE FROM endpoints WHERE sandbox_id = $1 AND port = $2";
            sqlx::query(sql).bind(&new.id).bind(i64::from(endpoint.port)).execute(&mut *transaction).await?;
            let endpoint = EndpointRow { sandbox_id: new.id.clone(), ..endpoint.clone() };
            add_endpoint(&endpoint, new.changed_at).execute(&mut *transaction).await?;
        }
        update(new).execute(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(())
    }

    /// Every sandbox, newest first.
    pub async fn sandboxes(&self) -> Result<Vec<SandboxRow>, Error> {
        let sql = format!("SELECT {COLUMNS} FROM sandboxes ORDER BY created_at DESC, id");
        let rows = sqlx::query(AssertSqlSafe(sql)).fetch_all(&self.pool).await?;
        rows.iter().map(sandbox).collect()
    }

    /// Forgets a sandbox with its subdomains and keys.
    pub async fn forget(&self, id: &str) -> Result<(), Error> {
        let mut transaction = self.begin().await?;
        for sql in [
            "DELETE FROM endpoints WHERE sandbox_id = $1",
            "DELETE FROM idempotency_keys WHERE sandbox_id = $1",
            "DELETE FROM sandboxes WHERE id = $1",
        ] {
            sqlx::query(sql).bind(id).execute(&mut *transaction).await?;
        }
        transaction.commit().await?;
        Ok(())
    }
}

const COLUMNS: &str = "id, name, slug, CAST(living AS INTEGER) AS living, CAST(removed AS INTEGER) AS removed, \
                       created_at, changed_at, expires_at, data, account";

pub(crate) type Query<'q> = sqlx::query::Query<'q, Any, sqlx::any::AnyArguments>;

fn bind<'q>(query: Query<'q>, row: &'q SandboxRow) -> Query<'q> {
    query
        .bind(&row.id)
        .bind(&row.name)
        .bind(&row.slug)
        .bind(row.living)
        .bind(row.removed)
        .bind(row.created_at)
        .bind(row.changed_at)
        .bind(row.expires_at)
        .bind(&row.data)
        .bind(&row.account)
}

fn update(row: &SandboxRow) -> Query<'_> {
    let sql = "UPDATE sandboxes SET name = $2, slug = $3, living = $4, removed = $5, created_at = $6, changed_at = $7, \
               expires_at = $8, data = $9, account = $10 WHERE id = $1";
    bind(sqlx::query(sql), row)
}

fn sandbox(row: &AnyRow) -> Result<SandboxRow, Error> {
    Ok(SandboxRow {
        id: row.try_get("id")?,
        account: row.try_get("account")?,
        name: row.try_get("name")?,
        slug: row.try_get("slug")?,
        living: row.try_get::<i32, _>("living")? != 0,
        removed: row.try_get::<i32, _>("removed")? != 0,
        created_at: row.try_get("created_at")?,
        changed_at: row.try_get("changed_at")?,
        expires_at: row.try_get("expires_at")?,
        data: row.try_get("data")?,
    })
}
