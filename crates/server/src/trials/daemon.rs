//! A daemon that has made no VM yet: its API, and its socket.

use axum::Router;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    config::Config,
    daemon::{open, serve_api},
    home::Home,
    routes::{Api, router},
};

/// The daemon of a home of its own, as long as its test runs.
pub struct Daemon {
    pub home: tempfile::TempDir,
    pub router: Router,
    _lock: Home,
    _ending: DropGuard,
}

impl Daemon {
    pub async fn start() -> Self {
        let home = tempfile::tempdir().unwrap();
        let lock = Home::open(home.path().to_owned()).unwrap();
        let plane = open(home.path(), &Config::default(), 8480).await.unwrap();
        let api = Api::new(home.path().join("run"), watch::channel(Some(Ok(plane))).1);
        let ending = CancellationToken::new();
        serve_api(lock.listen().unwrap(), api.clone(), ending.clone());
        Self { home, router: router(api), _lock: lock, _ending: ending.drop_guard() }
    }
}
