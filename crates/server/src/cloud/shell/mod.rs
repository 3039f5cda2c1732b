//! A shell in a sandbox that outlives its connection: `GET /deployed-sandboxes/{id}/shell-stream`.
//!
//! ```text
//! client ═WebSocket═ connection ──▶ session ═exec's WebSocket═ daemon of the sandbox's region
//!        ═WebSocket═ (next one)         └ output that no client has acknowledged
//! ```
//! - `frames`: what goes over the wire.  `connection`: one client's WebSocket, from its first frame to its last.
//! - `session`: the terminal and its output, until the shell ends or nobody has come back in time.
//! - [`Shells`] (here): who has which session.
//!
//! A session lives in the server that began it: where several stand behind one name, a client must be led back to the same
//! one, or is told that its session has expired.

mod connection;
mod frames;
mod session;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use axum::{
    extract::{FromRef, State, WebSocketUpgrade, ws::rejection::WebSocketUpgradeRejection},
    response::Response,
};
use heyvm_accounts::Accounts;
use heyvm_api::{
    ApiError, ErrorCode,
    accounts::Scope,
    client::Client,
    sandbox::{SandboxInfo, Status},
};
use heyvm_cloud::Cloud;
use http::StatusCode;
use utoipa_axum::{router::OpenApiRouter, routes};

use self::{
    frames::{Fault, Init},
    session::{Handle, Session},
};
use super::identity::{Caller, Named};
use crate::problem::Problem;

/// Largest frame of a client, in bytes.
const MAX_FRAME: usize = 1 << 20;
/// Sessions an account may have at a time.
const SESSIONS_OF_ACCOUNT: usize = 32;

/// The way to the daemon that runs a sandbox.
#[async_trait]
pub trait Regions: Send + Sync {
    /// The id of a sandbox of `account` (by id, name or slug), and a client of the daemon that runs it.
    ///
    /// # Errors
    /// `sandbox_not_found`, `forbidden`, `region_unavailable`.
    async fn daemon_of(&self, account: &str, who: &str) -> Result<(String, Client), ApiError>;
}

#[async_trait]
impl Regions for Cloud {
    async fn daemon_of(&self, account: &str, who: &str) -> Result<(String, Client), ApiError> {
        let place = self.find(account, who).await?;
        Ok((place.id.clone(), place.client()?))
    }
}

/// Every session of this server.
pub struct Shells {
    regions: Arc<dyn Regions>,
    sessions: Mutex<HashMap<String, Entry>>,
}

/// Whose a session is.
#[derive(Clone, PartialEq, Eq)]
struct Owner {
    account: String,
    sandbox: String,
}

struct Entry {
    owner: Owner,
    handle: Handle,
}

impl Shells {
    /// None yet.
    pub fn new(regions: Arc<dyn Regions>) -> Arc<Self> {
        Arc::new(Self { regions, sessions: Mutex::default() })
    }

    /// The session that a client's first frame asks for: a new one, or the one it had.
    async fn session(self: &Arc<Self>, init: Init, owner: &Owner, daemon: &Client) -> Result<Handle, Fault> {
        if let Some(id) = &init.session_id {
            let sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
            // Somebody else's session is none, to whoever guesses.
            let found = sessions.get(id).filter(|entry| entry.owner == *owner);
            return found.map(|entry| entry.handle.clone()).ok_or_else(Fault::expired);
        }
        self.check_room(&owner.account)?;
        let size = init.size()?;
        let shell = session::open(daemon, &owner.sandbox, init, size).await?;
        let id = session::new_id();
        let (handle, session) = Session::new(id.clone(), shell);
        let entry = Entry { owner: owner.clone(), handle: handle.clone() };
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone(), entry);
        let shells = Arc::clone(self);
        tokio::spawn(async move {
            session.run().await;
            shells.sessions.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        });
        Ok(handle)
    }

    fn check_room(&self, account: &str) -> Result<(), Fault> {
        let sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        let of_account = sessions.values().filter(|entry| entry.owner.account == account);
        if of_account.filter(|entry| !entry.handle.has_ended()).count() < SESSIONS_OF_ACCOUNT {
            return Ok(());
        }
        let message = format!("this account has {SESSIONS_OF_ACCOUNT} shells already: close one");
        Err(Fault::new("too_many_sessions", message))
    }
}

/// The route of this module, over any state that has the shells and credentials' check.
pub fn routes<S>() -> OpenApiRouter<S>
where
    S: Clone + Send + Sync + 'static,
    Arc<Shells>: FromRef<S>,
    Arc<Accounts>: FromRef<S>,
{
    OpenApiRouter::new().routes(routes!(stream))
}

/// A shell in a terminal, as a WebSocket. Needs scope `exec`.
///
/// The client's first frame is JSON, `{"type":"init","cols","rows","env"?,"cwd"?,"sessionId"?}`; the server answers
/// `{"type":"ready","sessionId","lastSeq"}` when the shell prompts. Then input is binary, a byte 1 and the bytes; output is binary, a byte 2, a
/// sequence number (64 bits, big-endian) and the bytes. JSON from the client: `resize {cols, rows}`, `ack {seq}`, `close`;
/// from the server: `exit {code}`, `error {code, message}`, after which it closes. When the credentials are revoked, or
/// their session ends, the shell ends with the error `unauthorized`. Who loses the connection connects again
/// within 60 seconds with `sessionId`, and gets what it has not acknowledged once more, under the same numbers. Output that
/// nobody acknowledges is kept up to 4 MiB; then the command waits.
#[utoipa::path(get, path = "/deployed-sandboxes/{id}/shell-stream", operation_id = "shell_stream", tag = "cloud",
    params(("id" = String, Path, description = "Id, name or slug")),
    responses((status = 101, description = "A WebSocket")))]
async fn stream(
    State(shells): State<Arc<Shells>>,
    State(accounts): State<Arc<Accounts>>,
    caller: Caller,
    Named(who): Named,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Problem> {
    let caller = caller.require(Scope::Exec)?;
    let (id, daemon) = shells.regions.daemon_of(&caller.account_id, &who).await?;
    let info: SandboxInfo = daemon.get(&format!("/sandboxes/{id}")).await?;
    if info.status != Status::Running {
        let message = format!("sandbox {} does not run", info.name);
        return Err(ApiError::new(ErrorCode::InvalidState, message).hint("start it first").into());
    }
    let upgrade = upgrade.map_err(|rejection| {
        let message = format!("this is no WebSocket handshake: {}", rejection.body_text());
        Problem::invalid(message, "connect with a WebSocket client, or use POST /sandbox/{id}/exec")
            .with_status(StatusCode::UPGRADE_REQUIRED)
    })?;
    let owner = Owner { account: caller.account_id.clone(), sandbox: info.id };
    let upgrade = upgrade.max_message_size(MAX_FRAME).max_frame_size(MAX_FRAME);
    Ok(upgrade.on_upgrade(move |socket| async move {
        let lapsed = accounts.lapsed(&caller);
        connection::serve(socket, shells, owner, daemon, lapsed).await;
    }))
}

#[cfg(test)]
mod tests;
