//! Commands in a sandbox: the one-answer form and the frames of the streaming form.
//!
//! `GET /sandboxes/{id}/exec` upgrades to a WebSocket. The client's first message is a text frame with an
//! [`ExecRequest`]; then binary frames go both ways, whose first byte is one of the constants below, and text frames
//! carry [`ClientControl`] and [`ServerControl`]. The server's last message is [`ServerControl::Exit`] or `Error`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// First byte of a binary frame: standard input, client to server.
pub const FRAME_STDIN: u8 = 1;
/// First byte of a binary frame: standard output, server to client.
pub const FRAME_STDOUT: u8 = 2;
/// First byte of a binary frame: standard error, server to client.
pub const FRAME_STDERR: u8 = 3;
/// Bytes of standard input that may be under way before [`ServerControl::StdinTaken`] tells of them. A client that
/// sends more may find that its signals wait until the command reads.
pub const STDIN_WINDOW: usize = 256 << 10;

/// A command to run.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ExecRequest {
    /// The program, looked up in PATH; with no `args` (absent, null or empty) it is a script for `sh -c`.
    pub command: String,
    /// Its arguments.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub args: Option<Vec<String>>,
    /// On top of the sandbox's environment.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// The sandbox's working directory when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Name or uid[:gid]; root when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// A named session keeps its directory and exported environment from call to call.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
    /// All that the command began is killed after this many seconds, whatever session it went to; exit code 124.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<f64>,
    /// Streaming form only: whether standard input will be sent (else /dev/null).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub stdin: bool,
    /// Streaming form only: a pseudo-terminal instead of pipes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pty: Option<PtySize>,
    /// One-answer form only: answer as soon as it runs. It goes on without the client, with no input, its output in
    /// /dev/null unless it redirects that itself; `timeout_seconds` holds all the same.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub detach: bool,
}

/// Answer of `POST /sandboxes/{id}/execute` with `detach`, once the command runs.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct DetachedResponse {
    /// Its process id in the sandbox, which is that of its process group as well.
    pub pid: i32,
}

/// Size of a pseudo-terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PtySize {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

/// Answer of `POST /sandboxes/{id}/execute`. Bytes that are not UTF-8 are replaced; `*_base64` then has them whole.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ExecResponse {
    /// As a shell gives it: 128 + signal, 124 after a time-out, 126 or 127 when it could not be started.
    pub exit_code: i32,
    /// Standard output and standard error in the order of arrival.
    pub output: String,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Whether the time-out ended it.
    pub timed_out: bool,
    /// Whether there was more output than is kept: what is here is its beginning.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub truncated: bool,
    /// Standard output, when it is not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdout_base64: Option<String>,
    /// Standard error, when it is not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stderr_base64: Option<String>,
}

/// Text frames from the client.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ClientControl {
    /// Standard input ends.
    StdinClose,
    /// A signal by number for the process group.
    Signal {
        /// For example 2 for SIGINT.
        signal: i32,
    },
    /// The terminal has another size now.
    Resize {
        /// Columns.
        cols: u16,
        /// Rows.
        rows: u16,
    },
}

/// Text frames from the server.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ServerControl {
    /// The command has taken this much more of its standard input.
    StdinTaken {
        /// Since the last one of these.
        bytes: u64,
    },
    /// The command ended; the last frame.
    Exit {
        /// See [`ExecResponse::exit_code`].
        exit_code: i32,
        /// Whether the time-out ended it.
        #[serde(default)]
        timed_out: bool,
        /// Why it could not be started, for exit codes 126 and 127.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        message: Option<String>,
        /// Bytes of standard input that the command has read, of all that were sent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        stdin_read: Option<u64>,
    },
    /// It could not be run at all; the last frame.
    Error {
        /// What went wrong.
        error: crate::ApiError,
    },
}
