//! The daemon itself: health, progress, `doctor`, archives.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Answer of `GET /health`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// `ok`.
    pub status: String,
    /// heyvm's version.
    #[serde(default)]
    pub version: String,
    /// [`COMPATIBILITY`] of the daemon; 0 of one that is too old to say.
    #[serde(default)]
    pub compatibility: u32,
}

/// Programs with the same number understand each other's API, and leave each other's daemon running. Raise it by one in the
/// change that removes or renames what an older client sends or reads, or gives it another meaning; a new call, a new
/// optional field or a new event raises nothing. A program with another number ends the daemon and starts its own.
pub const COMPATIBILITY: u32 = 1;

/// What a long call is doing: an event of a `text/event-stream` answer.
/// `event: progress` carries this; `event: result` the call's normal answer; `event: error` an `ErrorBody`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProgressEvent {
    /// `archive`, `image`, `template`, `vm`, `unpack`, `setup_hook`, `start_command`, `bind`, `health`.
    pub step: String,
    /// A few words for a person.
    pub message: String,
    /// Bytes done, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub done: Option<u64>,
    /// Bytes in all, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
    /// `stdout` or `stderr` where `message` is a line that the step's command printed on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<String>,
}

impl ProgressEvent {
    /// Begins a step, or says what it is doing.
    pub fn new(step: impl Into<String>, message: impl Into<String>) -> Self {
        Self { step: step.into(), message: message.into(), done: None, total: None, stream: None }
    }
}

/// Answer of `PUT /archives` (body: tar.gz).
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ArchiveInfo {
    /// `ar-` and the beginning of the content's hash.
    pub archive_id: String,
    /// Bytes, compressed.
    pub size_bytes: u64,
}

/// How a check of `doctor` came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum CheckStatus {
    /// As it should be.
    Ok,
    /// Works, but not as well as it could.
    Warn,
    /// Sandboxes cannot run until it is mended.
    Fail,
}

/// One check of `doctor`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Check {
    /// For example `kvm`.
    pub name: String,
    /// How it came out.
    pub status: CheckStatus,
    /// What was found.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// Answer of `doctor`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct DoctorReport {
    /// Whether sandboxes can run.
    pub ok: bool,
    /// `kvm` or `tcg`.
    pub acceleration: String,
    /// heyvm's version.
    pub version: String,
    /// Every check.
    pub checks: Vec<Check>,
}
