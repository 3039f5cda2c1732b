//! What can go wrong, and which rule a row broke.

use std::io;

use heyvm_api::{ApiError, ErrorCode, error::with_causes};

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A living sandbox has the name.
    #[error("the name is taken")]
    NameTaken,
    /// A living sandbox has the slug.
    #[error("the slug is taken")]
    SlugTaken,
    /// The key, the subdomain, the port or the e-mail address is there already.
    #[error("it is there already")]
    Exists,
    /// More than the account may have: it has this many bytes already.
    #[error("it would be more than the account may have")]
    Full(i64),
    /// The row is gone, or no longer what it was.
    #[error("it is gone")]
    Gone,
    /// The database's place is neither a path nor a `postgres://` URL. The place itself is not told: it may hold a
    /// password.
    #[error("the store's place is neither a path nor postgres://USER:PASSWORD@HOST/DATABASE")]
    Location,
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

impl Error {
    /// Whether the database is away or too busy, and the same call may do later.
    pub fn is_passing(&self) -> bool {
        use sqlx::Error::{Io, PoolTimedOut, Tls, WorkerCrashed};
        matches!(self, Self::Database(Io(_) | PoolTimedOut | Tls(_) | WorkerCrashed))
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        match &error {
            sqlx::Error::Database(database) if database.is_unique_violation() => {
                // PostgreSQL names the index, SQLite the column.
                match (database.constraint(), database.message()) {
                    (Some("living_names" | "placement_names"), _) => Self::NameTaken,
                    (Some("living_slugs" | "placement_slugs"), _) => Self::SlugTaken,
                    (None, text) if text.contains("sandboxes.name") || text.contains("placements.name") => {
                        Self::NameTaken
                    }
                    (None, text) if text.contains("sandboxes.slug") || text.contains("placements.slug") => {
                        Self::SlugTaken
                    }
                    _ => Self::Exists,
                }
            }
            _ => Self::Database(error),
        }
    }
}

/// What a server's clients are told: the log has why, they have no use for it.
impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        tracing::error!(error = with_causes(&error), "the store failed");
        let (code, message) = match error.is_passing() {
            true => (ErrorCode::DaemonUnavailable, "the server's database does not answer"),
            false => (ErrorCode::Internal, "the server's store failed"),
        };
        Self::new(code, message).hint("try again; the server's log has the details")
    }
}
