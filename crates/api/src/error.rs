//! Errors as the outside sees them: a stable code, a sentence, a hint that says what to do next.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// An error's sentence with those of what is behind it.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

/// Every code an answer can carry. Codes are stable: scripts branch on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// A field, flag or header is malformed; the message names it.
    InvalidArgument,
    /// A field is larger, or has more entries, than allowed; the message names the limit.
    LimitExceeded,
    /// The request's path or framing is none that is served.
    BadRequest,
    /// The request names no host, or two.
    BadHost,
    /// The name does not fit the rules for names.
    InvalidName,
    /// The port is not within 1..=65535.
    InvalidPort,
    /// No such size class.
    UnknownSizeClass,
    /// No such region on this server.
    UnknownRegion,
    /// Nothing has this id, name or slug.
    SandboxNotFound,
    /// A living sandbox, an account or a user has this name, slug or e-mail address already.
    NameTaken,
    /// The same idempotency key came with another request.
    IdempotencyKeyReused,
    /// The sandbox is not in a state that allows this.
    InvalidState,
    /// The port is bound already, or is not bound.
    PortNotBound,
    /// Nothing listens on the port in the sandbox.
    PortNotListening,
    /// No image of this name here, and no registry gave one.
    ImageNotFound,
    /// A registry did not answer or refused.
    RegistryUnavailable,
    /// An image's bytes do not match their digest or are no image.
    ImageInvalid,
    /// The directory to deploy or to mount is missing, empty or no directory.
    InvalidDirectory,
    /// The archive is no archive, leaves its directory, or unpacks to more than allowed.
    ArchiveInvalid,
    /// No such archive.
    ArchiveNotFound,
    /// A setup hook failed; the message carries the last lines of its output.
    SetupHookFailed,
    /// The start command ended before the sandbox was ready.
    StartCommandFailed,
    /// The health check did not pass in time.
    HealthTimeout,
    /// The VM did not boot or could not be restored.
    VmFailed,
    /// The VM ended or its agent does not answer.
    SandboxUnreachable,
    /// No such file in the sandbox.
    FileNotFound,
    /// The file exists already, or is of another kind.
    FileConflict,
    /// No disk space, memory or another resource of the host.
    OutOfResources,
    /// The host lacks something; `heyvm doctor` says what.
    HostNotReady,
    /// What is asked for is not part of this version, or not of this server.
    Unsupported,
    /// No credentials, or wrong ones.
    Unauthorized,
    /// The credentials do not allow this, or nobody may do it.
    Forbidden,
    /// The path does not exist, or nothing of this id is there.
    NotFound,
    /// The account's quota does not allow this.
    QuotaExceeded,
    /// Too many attempts; the answer says when to try again.
    RateLimited,
    /// No region, or not the one that is meant, answers.
    RegionUnavailable,
    /// The body is larger than allowed.
    TooLarge,
    /// The daemon cannot be reached or started.
    DaemonUnavailable,
    /// Where archives are kept does not answer.
    StorageUnavailable,
    /// A deadline passed.
    Timeout,
    /// A bug in heyvm: the log has the details.
    Internal,
}

impl ErrorCode {
    /// The HTTP status an answer with this code has.
    pub fn status(self) -> u16 {
        use ErrorCode::*;
        match self {
            InvalidArgument | LimitExceeded | BadRequest | BadHost | InvalidName | InvalidPort | UnknownSizeClass
            | UnknownRegion | InvalidDirectory => 400,
            Unauthorized => 401,
            QuotaExceeded => 402,
            Forbidden => 403,
            SandboxNotFound | ImageNotFound | ArchiveNotFound | FileNotFound | NotFound | PortNotBound => 404,
            NameTaken | IdempotencyKeyReused | InvalidState | FileConflict => 409,
            TooLarge => 413,
            ArchiveInvalid | ImageInvalid | SetupHookFailed | StartCommandFailed | Unsupported => 422,
            RateLimited => 429,
            Internal | VmFailed => 500,
            RegistryUnavailable | SandboxUnreachable | PortNotListening | StorageUnavailable | RegionUnavailable => 502,
            HostNotReady | DaemonUnavailable => 503,
            HealthTimeout | Timeout => 504,
            OutOfResources => 507,
        }
    }

    /// What to do next, where the place of the error knows nothing better.
    pub fn hint(self) -> &'static str {
        use ErrorCode::*;
        match self {
            InvalidArgument | BadRequest => "`heyvm COMMAND --help` and GET /openapi.json describe what is accepted",
            LimitExceeded => "stay within the limit that the message names",
            BadHost => "use a host name of `urls`, as `heyvm get` prints it",
            InvalidName => "use lower-case letters, digits and dashes",
            InvalidPort => "use a port from 1 to 65535",
            UnknownSizeClass => "use micro, mini, small, medium, large or xlarge",
            UnknownRegion => "leave the region out to use the default one",
            SandboxNotFound => "`heyvm list --all` shows every sandbox",
            NameTaken => "choose another name, or replace the sandbox of this name with --replace",
            IdempotencyKeyReused => "use a new key for a new request",
            InvalidState => "`heyvm get` shows the sandbox's state",
            PortNotBound => "`heyvm get` lists the bound ports; `heyvm bind` binds one",
            PortNotListening => "start the app, or see `heyvm logs` for why it ended",
            ImageNotFound => "`heyvm images list` shows the images at hand; `heyvm pull` fetches one",
            RegistryUnavailable => "try again, or import the image with `heyvm images import`",
            ImageInvalid => "pull or export the image again",
            InvalidDirectory => "name a directory that is there and not empty",
            ArchiveInvalid => "pack the directory again with tar",
            ArchiveNotFound => "`heyvm list-archives` shows the archives at hand",
            SetupHookFailed | StartCommandFailed => {
                "run the command by hand: deploy with --keep-on-failure, then `heyvm exec`"
            }
            HealthTimeout => "see `heyvm logs`; --health-timeout waits longer",
            VmFailed => "try again; `heyvm doctor` checks this host",
            SandboxUnreachable => "`heyvm get` says how the sandbox is; `heyvm restart` starts it afresh",
            FileNotFound => "list the directory with `heyvm exec NAME -- ls`",
            FileConflict => "remove what is there first, or choose another path",
            OutOfResources => "free disk space or memory on the host, or remove sandboxes",
            HostNotReady => "`heyvm doctor` says what the host lacks",
            Unsupported => "leave out what the message names",
            Unauthorized => "log in with `heyvm login`, or send `Authorization: Bearer TOKEN`",
            Forbidden => "use credentials that allow this; `heyvm whoami` shows yours",
            NotFound => "GET /openapi.json lists every path",
            QuotaExceeded => "remove or stop sandboxes, or ask the operator for more",
            RateLimited => "wait as long as the answer says",
            RegionUnavailable | StorageUnavailable => "try again in a moment",
            TooLarge => "send less at a time",
            Timeout => "try again with a longer timeout",
            DaemonUnavailable => "run the command again; `heyvm daemon status` shows the daemon",
            Internal => "the daemon's log (~/.heyo/daemon.log) has the details",
        }
    }

    /// The code as it stands in JSON.
    pub fn as_str(self) -> String {
        match serde_json::to_value(self) {
            Ok(serde_json::Value::String(text)) => text,
            _ => "internal".into(),
        }
    }
}

/// An error as it travels: `{"error":{"code","message","hint",…}}`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Stable code.
    pub code: ErrorCode,
    /// One sentence for a person.
    pub message: String,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The step of a deploy that failed: `archive`, `image`, `vm`, `unpack`, `mount`, `setup_hook`, `start_command`, `bind`, `health`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
    /// Exit status of the setup hook or start command that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// The last lines of the failed step's output.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub log_tail: Vec<String>,
    /// The sandbox that is meant, where there is one (kept with `--keep-on-failure`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox_id: Option<String>,
    /// Seconds to wait before the next attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_seconds: Option<u64>,
}

/// The body of every answer that is an error.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ApiError,
    /// The sentence once more, for clients that look for it here.
    #[serde(default)]
    pub message: String,
}

impl From<ApiError> for ErrorBody {
    fn from(error: ApiError) -> Self {
        Self { message: error.message.clone(), error }
    }
}

impl ApiError {
    /// An error without a hint; add one with [`ApiError::hint`] wherever something can be done.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let message = message.into();
        Self {
            code,
            message,
            hint: None,
            step: None,
            exit_code: None,
            log_tail: Vec::new(),
            sandbox_id: None,
            retry_after_seconds: None,
        }
    }

    /// Says what to do next.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Names the step of a deploy that failed.
    pub fn step(mut self, step: impl Into<String>) -> Self {
        self.step = Some(step.into());
        self
    }

    /// Adds the exit status of what failed.
    pub fn exit_code(mut self, code: i32) -> Self {
        self.exit_code = Some(code);
        self
    }

    /// Adds the last lines of the failed step's output.
    pub fn log_tail(mut self, lines: Vec<String>) -> Self {
        self.log_tail = lines;
        self
    }

    /// Says how long to wait before the next attempt.
    pub fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after_seconds = Some(seconds);
        self
    }

    /// Names the sandbox that is meant.
    pub fn sandbox(mut self, id: impl Into<String>) -> Self {
        self.sandbox_id = Some(id.into());
        self
    }
}
