//! The daemon and its HTTP API: routes to the control plane, start and shutdown of everything behind it, and the
//! foreground listener that forwards to the daemon.
//!
//! - [`run_daemon`] (`daemon`): lock, socket, store, driver, control plane, edge proxy; their end in order.
//!   `config`: what the user may decide.  `home`: the directory all of it lives in.  `outbound`: what sandboxes take over from the host.  `proxy`: the edge's way in.
//! - `routes`: one module per noun; the OpenAPI document is made from them.  `extract`, `problem`: what comes in and
//!   every way it can be wrong.  `answer`: progress, and answers too large for memory.  `listing`: lists page by page.
//!   `output`: what commands have printed, within a budget.  `linger`: bodies nobody reads.
//!   `internet`: what doctor finds when it looks.  `docs`: the document as a page.
//! - `region`: the same routes over TLS, for the servers of a cloud that ask for accounts.
//! - [`cloud`]: what `heyvm server` has beside that.
//! - [`run_api`] (`gate`): `heyvm --api`, which checks who asks and forwards to the daemon's socket.
//! - [`listening`]: where both listen.
//! - [`pages`]: routers behind the edge's connections, which hostile requests do not get past.
//!
//! ```text
//! heyvm ────────────▶ run/daemon.sock ─▶ routes ─▶ control plane
//! curl ─▶ gate :3000 ─┘                               ▲
//! server ─mTLS─▶ region ──────────────▶ routes ────────┤
//! browser ─▶ :8480 edge ──────────────── proxy ───────┘
//! ```
#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test may block its own thread"))]
#![forbid(unsafe_code)]

mod answer;
pub mod cloud;
pub mod config;
mod daemon;
mod docs;
mod extract;
mod gate;
mod home;
mod internet;
mod linger;
pub mod listening;
mod listing;
mod local_ports;
mod outbound;
mod output;
pub mod pages;
mod problem;
mod proxy;
mod region;
mod relay;
mod routes;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod settings_page;
#[cfg(test)]
mod trials;

pub use daemon::run_daemon;
pub use gate::run_api;
pub use routes::{Api, router};

/// What ends the daemon or the API listener.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `config.toml` is not as it should be; names the key.
    #[error("{path}: {problem}")]
    Config {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Another daemon of the same home runs.
    #[error("a daemon with this home runs already (process {0})")]
    AlreadyRunning(String),
    /// A file or socket operation failed.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done.
        doing: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// There is no certificate to serve with.
    #[error("{0}")]
    Tls(String),
    /// The listener would be open to others.
    #[error("{0}")]
    Exposed(String),
    /// What stands behind the API could not be opened.
    #[error("{0}")]
    NotReady(heyvm_api::ApiError),
}

impl Error {
    fn io(doing: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }
}
