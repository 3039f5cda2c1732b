//! The daemon and its HTTP API: routes to the control plane, start and shutdown of everything behind it, and the
//! foreground listener that forwards to the daemon.

use std::{net::SocketAddr, path::PathBuf};

/// What ends the daemon or the API listener.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

/// Runs the daemon of `home` until SIGTERM or SIGINT; VMs keep running after it.
pub async fn run_daemon(home: PathBuf) -> Result<(), Error> {
    let _ = home;
    todo!()
}

/// Listens at `listen` and forwards every request to the daemon of `home`, until SIGTERM or SIGINT. With a secret every
/// call but `/health` needs credentials; without one it listens on loopback alone, unless `allow_remote`.
pub async fn run_api(
    home: PathBuf,
    listen: SocketAddr,
    secret: Option<String>,
    allow_remote: bool,
) -> Result<(), Error> {
    let _ = (home, listen, secret, allow_remote);
    todo!()
}
