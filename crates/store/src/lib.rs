//! The state that outlives a process: SQLite or PostgreSQL, through sqlx.
//!
//! - [`Store`] (here): opening, and the two databases' differences. What is left to sqlx's `Any` driver: `$1` and
//!   `BOOLEAN` mean the same in both, but a boolean is read with `CAST(… AS INTEGER)`, as SQLite knows none.
//! - `sandboxes`, `endpoints`, `local_ports`, `idempotency`: what a daemon knows.  `identity`: which store it is.
//! - [`placements`]: where a cloud's sandboxes are.
//! - [`accounts`]: who may use heyvm's servers, and what they did.
//! - `archives`: what the cloud's accounts have uploaded.
//! - [`Error`] (`error`): which rule a row broke, whichever database says so.
//!
//! Every call is one transaction. A sandbox's own content is the control plane's: it comes and goes as JSON.
#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test may block its own thread"))]
#![forbid(unsafe_code)]

pub mod accounts;
mod archives;
mod endpoints;
mod error;
mod idempotency;
mod identity;
mod local_ports;
mod migrations;
pub mod placements;
mod sandboxes;
#[cfg(test)]
mod tests;

use std::{
    fs::File,
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use sqlx::{
    Any, AnyConnection, AnyPool, ConnectOptions, Connection, Executor, Transaction,
    any::{AnyConnectOptions, AnyPoolOptions},
};
use url::Url;

pub use archives::{ArchiveRow, ContentRow};
pub use endpoints::EndpointRow;
pub use error::Error;
pub use idempotency::KeyRow;
pub use sandboxes::SandboxRow;

/// How long a call waits for a connection to a database that is busy, or away.
const ACQUIRE: Duration = Duration::from_secs(15);

/// The store. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    pool: AnyPool,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Sqlite,
    Postgres,
}

impl Store {
    /// Opens what `location` names: a `postgres://` URL, or the path of an SQLite database.
    pub async fn connect(location: &str) -> Result<Self, Error> {
        match location.split_once("://") {
            Some(("postgres" | "postgresql", _)) => {}
            Some(_) => return Err(Error::Location),
            None => return Self::open(Path::new(location)).await,
        }
        // The parser's own error could repeat what it could not read, and a password with it.
        let url = Url::parse(location).map_err(|_| Error::Location)?;
        let pool = AnyPoolOptions::new().max_connections(16);
        Self::ready(pool, url, Kind::Postgres).await
    }

    /// Opens the SQLite database at `path`, readable by its owner alone, and brings its tables up to date.
    pub async fn open(path: &Path) -> Result<Self, Error> {
        // One that is there already is not opened: closing it again would take SQLite's locks from whoever in this
        // process has it open.
        let file = path.to_owned();
        let made = tokio::task::spawn_blocking(move || make_private(&file)).await;
        made.map_err(io::Error::other).flatten().map_err(Error::File)?;
        let url = sqlite_url(path)?;
        let pool = AnyPoolOptions::new().max_connections(4).after_connect(|connection, _| {
            Box::pin(async move {
                // With a write-ahead log, `NORMAL` loses nothing when a process dies, and only the last moments in a
                // power cut.
                connection
                    .execute("PRAGMA busy_timeout = 10000; PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL")
                    .await
                    .map(drop)
            })
        });
        Self::ready(pool, url, Kind::Sqlite).await
    }

    async fn ready(pool: AnyPoolOptions, url: Url, kind: Kind) -> Result<Self, Error> {
        sqlx::any::install_default_drivers();
        let options = AnyConnectOptions::from_url(&url)?;
        // A pool tries again until its time is up, and then has forgotten why.
        AnyConnection::connect_with(&options).await?.close().await?;
        let pool = pool.acquire_timeout(ACQUIRE).connect_with(options).await?;
        let store = Self { pool, kind };
        store.migrate().await?;
        Ok(store)
    }

    /// One at a time, whoever else opens the same database: sqlx has PostgreSQL see to that, but not SQLite.
    async fn migrate(&self) -> Result<(), Error> {
        let migrations = migrations::of(self.kind);
        match self.kind {
            Kind::Postgres => migrations.run(&self.pool).await?,
            Kind::Sqlite => {
                let mut transaction = self.begin().await?;
                migrations.run(&mut *transaction).await?;
                transaction.commit().await?;
            }
        }
        Ok(())
    }

    /// A transaction that will write. SQLite is told at once: one that first reads and then wants to write would be
    /// refused where another wrote meanwhile, rather than wait.
    async fn begin(&self) -> Result<Transaction<'static, Any>, Error> {
        let sql = match self.kind {
            Kind::Sqlite => "BEGIN IMMEDIATE",
            Kind::Postgres => "BEGIN",
        };
        Ok(self.pool.begin_with(sql).await?)
    }

    /// Closes the database in order.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

#[expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]
fn make_private(path: &Path) -> io::Result<()> {
    match File::options().create_new(true).write(true).mode(0o600).open(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// `sqlite:///path`, its letters escaped as in any URL.
fn sqlite_url(path: &Path) -> Result<Url, Error> {
    let path: PathBuf = std::path::absolute(path).map_err(Error::File)?;
    let file = Url::from_file_path(path).map_err(|()| Error::Location)?;
    file.as_str().replacen("file:", "sqlite:", 1).parse().map_err(|_| Error::Location)
}
