//! The state that outlives a daemon: SQLite through sqlx.
//!
//! Every call is one transaction. The rows' own content is the control plane's: it comes and goes as JSON.
#![forbid(unsafe_code)]

use std::{fs::File, io, os::unix::fs::OpenOptionsExt, path::Path, time::Duration};

use sqlx::{
    Row, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow, SqliteSynchronous},
};

/// The store. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    pool: SqlitePool,
}

/// One sandbox's row. Times are milliseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxRow {
    /// Its id.
    pub id: String,
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

/// One bound port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointRow {
    /// First label of the host name.
    pub subdomain: String,
    /// The sandbox it leads to.
    pub sandbox_id: String,
    /// Port in the sandbox.
    pub port: u16,
}

/// What an idempotency key stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRow {
    /// Hash of the request it came with.
    pub request: String,
    /// The sandbox it gave.
    pub sandbox_id: String,
}

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A living sandbox has the name.
    #[error("the name is taken")]
    NameTaken,
    /// A living sandbox has the slug.
    #[error("the slug is taken")]
    SlugTaken,
    /// The key, the subdomain or the port is there already.
    #[error("it is there already")]
    Exists,
    /// The database's file could not be made.
    #[error("opening the store's file")]
    File(#[source] io::Error),
    /// The database refused.
    #[error("the store failed")]
    Database(#[source] sqlx::Error),
    /// The tables could not be brought up to date.
    #[error("bringing the store up to date")]
    Migration(#[from] sqlx::migrate::MigrateError),
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        match &error {
            sqlx::Error::Database(database) if database.is_unique_violation() => {
                let text = database.message();
                match text {
                    _ if text.contains("sandboxes.name") => Self::NameTaken,
                    _ if text.contains("sandboxes.slug") => Self::SlugTaken,
                    _ => Self::Exists,
                }
            }
            _ => Self::Database(error),
        }
    }
}

impl Store {
    /// Opens the database at `path`, readable by its owner alone, and brings its tables up to date.
    pub async fn open(path: &Path) -> Result<Self, Error> {
        File::options().create(true).append(true).mode(0o600).open(path).map_err(Error::File)?;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .journal_mode(SqliteJournalMode::Wal)
            // With a write-ahead log this loses nothing when a process dies, and only the last moments in a power cut.
            .synchronous(SqliteSynchronous::Normal)
            .busy_timeout(Duration::from_secs(10))
            .foreign_keys(true);
        let pool = SqlitePoolOptions::new().max_connections(4).connect_with(options).await?;
        sqlx::migrate!().run(&pool).await?;
        Ok(Self { pool })
    }

    /// Adds a sandbox.
    pub async fn insert(&self, row: &SandboxRow) -> Result<(), Error> {
        let sql = "INSERT INTO sandboxes (id, name, slug, living, removed, created_at, changed_at, expires_at, data) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)";
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
        let sql = "SELECT 1 FROM sandboxes WHERE living AND name = $1 AND id <> $2";
        let same_name = sqlx::query(sql).bind(&row.name).bind(&row.id).fetch_optional(&self.pool).await?;
        Err(if same_name.is_some() { Error::NameTaken } else { Error::SlugTaken })
    }

    /// In one step: `old` gives its name up, `new` takes it, and `moved` subdomains lead to the new one.
    pub async fn replace(&self, old: &SandboxRow, new: &SandboxRow, moved: &[EndpointRow]) -> Result<(), Error> {
        let mut transaction = self.pool.begin().await?;
        update(old).execute(&mut *transaction).await?;
        sqlx::query("DELETE FROM endpoints WHERE sandbox_id = $1").bind(&old.id).execute(&mut *transaction).await?;
        for endpoint in moved {
            let sql = "DELETE FROM endpoints WHERE sandbox_id = $1 AND port = $2";
            sqlx::query(sql).bind(&new.id).bind(i64::from(endpoint.port)).execute(&mut *transaction).await?;
            let sql = "INSERT INTO endpoints (subdomain, sandbox_id, port, created_at) VALUES ($1, $2, $3, $4)";
            let query = sqlx::query(sql).bind(&endpoint.subdomain).bind(&new.id).bind(i64::from(endpoint.port));
            query.bind(new.changed_at).execute(&mut *transaction).await?;
        }
        update(new).execute(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(())
    }

    /// Every sandbox, newest first.
    pub async fn sandboxes(&self) -> Result<Vec<SandboxRow>, Error> {
        let rows = sqlx::query("SELECT * FROM sandboxes ORDER BY created_at DESC, id").fetch_all(&self.pool).await?;
        rows.iter().map(sandbox).collect()
    }

    /// Forgets a sandbox with its subdomains and keys.
    pub async fn forget(&self, id: &str) -> Result<(), Error> {
        let mut transaction = self.pool.begin().await?;
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

    /// Binds a port.
    pub async fn add_endpoint(&self, endpoint: &EndpointRow, now: i64) -> Result<(), Error> {
        let sql = "INSERT INTO endpoints (subdomain, sandbox_id, port, created_at) VALUES ($1, $2, $3, $4)";
        let query = sqlx::query(sql).bind(&endpoint.subdomain).bind(&endpoint.sandbox_id);
        query.bind(i64::from(endpoint.port)).bind(now).execute(&self.pool).await?;
        Ok(())
    }

    /// Unbinds a port; whether it was bound.
    pub async fn remove_endpoint(&self, sandbox_id: &str, port: u16) -> Result<bool, Error> {
        let sql = "DELETE FROM endpoints WHERE sandbox_id = $1 AND port = $2";
        let done = sqlx::query(sql).bind(sandbox_id).bind(i64::from(port)).execute(&self.pool).await?;
        Ok(done.rows_affected() > 0)
    }

    /// Unbinds all ports of a sandbox.
    pub async fn remove_endpoints(&self, sandbox_id: &str) -> Result<(), Error> {
        sqlx::query("DELETE FROM endpoints WHERE sandbox_id = $1").bind(sandbox_id).execute(&self.pool).await?;
        Ok(())
    }

    /// Every bound port, in the order of binding.
    pub async fn endpoints(&self) -> Result<Vec<EndpointRow>, Error> {
        let rows = sqlx::query("SELECT * FROM endpoints ORDER BY created_at, rowid").fetch_all(&self.pool).await?;
        rows.iter()
            .map(|row| {
                let port: i64 = row.try_get("port")?;
                Ok(EndpointRow {
                    subdomain: row.try_get("subdomain")?,
                    sandbox_id: row.try_get("sandbox_id")?,
                    port: u16::try_from(port).unwrap_or_default(),
                })
            })
            .collect()
    }

    /// What a key stands for.
    pub async fn key(&self, key: &str) -> Result<Option<KeyRow>, Error> {
        let row =
            sqlx::query("SELECT * FROM idempotency_keys WHERE key = $1").bind(key).fetch_optional(&self.pool).await?;
        row.map(|row| Ok(KeyRow { request: row.try_get("request")?, sandbox_id: row.try_get("sandbox_id")? }))
            .transpose()
    }

    /// Has a key stand for a sandbox.
    pub async fn add_key(&self, key: &str, row: &KeyRow, now: i64) -> Result<(), Error> {
        let sql = "INSERT INTO idempotency_keys (key, request, sandbox_id, created_at) VALUES ($1, $2, $3, $4)";
        sqlx::query(sql).bind(key).bind(&row.request).bind(&row.sandbox_id).bind(now).execute(&self.pool).await?;
        Ok(())
    }

    /// Forgets the keys of a sandbox that failed or is gone.
    pub async fn remove_keys(&self, sandbox_id: &str) -> Result<(), Error> {
        sqlx::query("DELETE FROM idempotency_keys WHERE sandbox_id = $1").bind(sandbox_id).execute(&self.pool).await?;
        Ok(())
    }

    /// Closes the database in order.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

type Query<'q> = sqlx::query::Query<'q, sqlx::Sqlite, sqlx::sqlite::SqliteArguments>;

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
}

fn update(row: &SandboxRow) -> Query<'_> {
    let sql = "UPDATE sandboxes SET name = $2, slug = $3, living = $4, removed = $5, created_at = $6, changed_at = $7, \
               expires_at = $8, data = $9 WHERE id = $1";
    bind(sqlx::query(sql), row)
}

fn sandbox(row: &SqliteRow) -> Result<SandboxRow, Error> {
    Ok(SandboxRow {
        id: row.try_get("id")?,
        name: row.try_get("name")?,
        slug: row.try_get("slug")?,
        living: row.try_get("living")?,
        removed: row.try_get("removed")?,
        created_at: row.try_get("created_at")?,
        changed_at: row.try_get("changed_at")?,
        expires_at: row.try_get("expires_at")?,
        data: row.try_get("data")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: &str, name: &str) -> SandboxRow {
        SandboxRow {
            id: id.into(),
            name: name.into(),
            slug: name.into(),
            living: true,
            removed: false,
            created_at: 1,
            changed_at: 1,
            expires_at: None,
            data: "{}".into(),
        }
    }

    async fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("heyvm.db")).await.unwrap();
        (dir, store)
    }

    #[tokio::test]
    async fn a_name_is_taken_only_by_a_living_sandbox() {
        let (_dir, store) = store().await;
        store.insert(&row("a", "web")).await.unwrap();
        assert!(matches!(store.insert(&row("b", "web")).await, Err(Error::NameTaken)));
        let same_slug = SandboxRow { slug: "web".into(), ..row("c", "other") };
        assert!(matches!(store.insert(&same_slug).await, Err(Error::SlugTaken)));
        store.update(&SandboxRow { living: false, ..row("a", "web") }).await.unwrap();
        store.insert(&row("b", "web")).await.unwrap();
        assert_eq!(store.sandboxes().await.unwrap().len(), 2);
    }

    #[tokio::test]
    async fn of_many_at_once_one_gets_the_name() {
        let (_dir, store) = store().await;
        let tries = (0..20).map(|n| {
            let store = store.clone();
            tokio::spawn(async move { store.insert(&row(&n.to_string(), "web")).await.is_ok() })
        });
        let mut won = 0;
        for each in tries.collect::<Vec<_>>() {
            won += usize::from(each.await.unwrap());
        }
        assert_eq!(won, 1);
    }

    #[tokio::test]
    async fn a_replacement_takes_name_and_subdomains_at_once() {
        let (dir, store) = store().await;
        let endpoint = EndpointRow { subdomain: "abc".into(), sandbox_id: "a".into(), port: 80 };
        store.insert(&row("a", "web")).await.unwrap();
        store.add_endpoint(&endpoint, 1).await.unwrap();
        store.insert(&SandboxRow { living: false, ..row("b", "web") }).await.unwrap();
        let old = SandboxRow { living: false, removed: true, ..row("a", "web") };
        store.replace(&old, &row("b", "web"), std::slice::from_ref(&endpoint)).await.unwrap();
        let moved = EndpointRow { sandbox_id: "b".into(), ..endpoint };
        assert_eq!(store.endpoints().await.unwrap(), [moved]);
        store.close().await;
        let again = Store::open(&dir.path().join("heyvm.db")).await.unwrap();
        assert_eq!(again.sandboxes().await.unwrap().iter().filter(|row| row.living).count(), 1);
    }

    #[tokio::test]
    async fn the_file_is_its_owners_alone() {
        use std::os::unix::fs::PermissionsExt;
        let (dir, _store) = store().await;
        let mode = std::fs::metadata(dir.path().join("heyvm.db")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
