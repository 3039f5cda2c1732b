//! The state that outlives a daemon: SQLite through sqlx.
#![forbid(unsafe_code)]

/// The store.
#[derive(Debug, Clone)]
pub struct Store {}
