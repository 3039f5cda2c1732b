//! Sandboxes: what is asked for, and what is told of one.

use std::collections::BTreeMap;

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::start_command::StartCommand;

/// Memory and processor share of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum SizeClass {
    /// 0.25 processors, 0.5 GiB.
    Micro,
    /// 0.5 processors, 1 GiB.
    Mini,
    /// 1 processor, 2 GiB.
    #[default]
    Small,
    /// 2 processors, 4 GiB.
    Medium,
    /// 4 processors, 8 GiB.
    Large,
    /// 8 processors, 16 GiB.
    Xlarge,
}

impl SizeClass {
    /// All of them, smallest first.
    pub const ALL: [Self; 6] = [Self::Micro, Self::Mini, Self::Small, Self::Medium, Self::Large, Self::Xlarge];

    /// Processor share in thousandths of a processor.
    pub fn cpu_millis(self) -> u32 {
        match self {
            Self::Micro => 250,
            Self::Mini => 500,
            Self::Small => 1000,
            Self::Medium => 2000,
            Self::Large => 4000,
            Self::Xlarge => 8000,
        }
    }

    /// Memory in MiB.
    pub fn memory_mib(self) -> u32 {
        match self {
            Self::Micro => 512,
            Self::Mini => 1024,
            Self::Small => 2048,
            Self::Medium => 4096,
            Self::Large => 8192,
            Self::Xlarge => 16384,
        }
    }

    /// The name in lower case.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Micro => "micro",
            Self::Mini => "mini",
            Self::Small => "small",
            Self::Medium => "medium",
            Self::Large => "large",
            Self::Xlarge => "xlarge",
        }
    }
}

/// Whether a sandbox that ended by itself is started again. One that was stopped by a request never is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// It stays as it ended.
    #[default]
    Never,
    /// After a failure: an exit status other than 0, out of memory, a guest's panic, a lost VM.
    OnFailure,
    /// After any end, and after a restart of the host.
    Always,
}

impl RestartPolicy {
    /// As the API and the command line call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Never => "never",
            Self::OnFailure => "on-failure",
            Self::Always => "always",
        }
    }
}

/// Body of `POST /sandboxes/{id}/restart-policy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestartPolicyRequest {
    /// `never`, `on-failure` or `always`.
    pub restart: RestartPolicy,
}

/// Where a sandbox is in its life. The state machine is drawn in `heyvm-control-plane`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Being made: image, VM, archive, hooks, health.
    Provisioning,
    /// Its VM runs.
    Running,
    /// Its VM is being ended; the disk stays.
    Stopping,
    /// No VM; the disk is kept and `start` goes on from it.
    Stopped,
    /// Ended by itself: the reason says how. The disk is kept; `start` goes on from it.
    Failed,
    /// Gone with its disk and URLs; told of for a day.
    Removed,
}

/// Why a sandbox is no longer running.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reason {
    /// One of the codes below.
    pub code: ReasonCode,
    /// A sentence.
    pub message: String,
    /// Exit status of the start command, where that is what ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// The last lines of the start command or of the guest's console.
    #[serde(default)]
    pub log_tail: Vec<String>,
}

/// Codes of [`Reason`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReasonCode {
    /// `stop` was called.
    Stopped,
    /// `rm` or DELETE was called.
    Removed,
    /// A newer version took its name and URLs.
    Replaced,
    /// Its time-to-live ran out.
    TtlExpired,
    /// The out-of-memory killer ended its start command, or the host the whole VM at its memory limit.
    OutOfMemory,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The guest powered itself off.
    GuestShutdown,
    /// The guest halted its processors without powering off.
    GuestHalted,
    /// The guest's port sends something else than the agent's protocol: its agent was replaced.
    AgentReplaced,
    /// KVM could not run the guest's code any further.
    KvmFailed,
    /// The daemon failed while it looked after the sandbox; its log has the details.
    Internal,
    /// The start command ended.
    StartCommandExited,
    /// The VM's process ended and nobody knows why.
    VmLost,
    /// The host was restarted.
    HostRestarted,
    /// The daemon ended while the sandbox was being made.
    DaemonRestarted,
    /// A step of its making failed.
    FailedStep,
}

/// A port of a sandbox that has a URL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Endpoint {
    /// First label of the host name, for example `abc123`.
    pub subdomain: String,
    /// For example `abc123.localhost`.
    pub hostname: String,
    /// For example `http://abc123.localhost:8480`.
    pub url: String,
    /// The same place for programs on the daemon's host that cannot resolve `*.localhost`; for example
    /// `http://127.0.0.1:20123`, the same as long as the port is bound. Absent in a cloud.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_url: Option<String>,
    /// Port in the sandbox.
    pub port: u16,
    /// Whether it answers without credentials.
    pub is_public: bool,
}

/// A bound port as `POST /sandboxes/{id}/proxy` answers it.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct BoundPort {
    /// The endpoint itself.
    #[serde(flatten)]
    pub endpoint: Endpoint,
    /// The sandbox it leads to.
    pub sandbox_id: String,
}

/// Where a subdomain leads, as `GET /routes/{subdomain}` answers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RouteInfo {
    /// The sandbox it leads to.
    pub sandbox_id: String,
    /// Port in the sandbox.
    pub port: u16,
    /// Whether everyone may use it; else the members of the account.
    pub is_public: bool,
    /// Whose it is; empty: the owner of the daemon's machine.
    pub account_id: String,
    /// How long its app may take until the head of an answer; absent: the proxy's own time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response_timeout_seconds: Option<u32>,
}

/// Body of `POST /sandboxes/{id}/replace-mount`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReplaceMountRequest {
    /// The archive whose content is to be there.
    pub archive_id: String,
    /// Absolute path of a directory in the sandbox; its working directory when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox_path: Option<String>,
    /// Directory of the archive whose content is meant, for archives that name their files from further up: nothing
    /// beside it is unpacked. The whole archive when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub archive_root: Option<String>,
}

/// Body of `POST /sandboxes/{id}/proxy`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BindRequest {
    /// Port in the sandbox, 1 to 65535. Wider than a port, so that 70000 is told of by name.
    pub port: i64,
    /// Whether it answers without credentials; absent: as it is, true for a new one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub is_public: Option<bool>,
}

/// Body of `POST /sandboxes/{id}/ttl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TtlRequest {
    /// Seconds from now until it is destroyed; null: never. Required, so that an empty body removes no time-to-live.
    #[serde(deserialize_with = "Option::deserialize")]
    #[schema(required)]
    pub ttl_seconds: Option<i64>,
}

/// Body of `POST /sandboxes/{id}/resize`: exactly one of the two.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ResizeRequest {
    /// `micro` … `xlarge`. A running sandbox is stopped and started with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_class: Option<String>,
    /// Up to 250, and not less than it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_size_gb: Option<i64>,
}

/// Answer of `GET /sandboxes/{id}/wait`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WaitResponse {
    /// Whether the port was ready before the deadline.
    pub ready: bool,
    /// The port.
    pub port: u16,
}

/// Answer of `GET /sandboxes/{id}/logs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LogsResponse {
    /// What the start command printed on both streams, in the order of arrival.
    pub logs: String,
}

/// One line of the logs as `application/x-ndjson`: a piece of what was printed, not a line of it unless `timestamps` asks
/// for lines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LogPiece {
    /// `stdout` or `stderr`.
    pub stream: String,
    /// The text; bytes that are not UTF-8 are replaced.
    pub text: String,
    /// With `timestamps`: when the line began to come, by the host's clock. Absent from the rest of a very long line, and
    /// from what versions before this field recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<DateTime<Utc>>,
}

/// What stands before a line of logs with timestamps: always as long, so that lines are in columns and sort.
pub fn timestamp(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Micros, true) + " "
}

/// A directory of the host in the sandbox: a file that one changes the other sees, within a second.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Mount {
    /// Absolute path on the host, of a directory that is there; links are resolved.
    pub host_path: String,
    /// Absolute path in the sandbox; made when missing, and what is there is covered.
    pub sandbox_path: String,
    /// Whether the sandbox may not change it; default false.
    #[serde(default)]
    pub read_only: bool,
}

/// Body of `POST /sandboxes`.
///
/// With the header `Idempotency-Key`, a repeated request gives the same sandbox. With `Accept: text/event-stream` the
/// answer is a stream of [`crate::system::ProgressEvent`]s, the last of which is the result or the error.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CreateRequest {
    /// Unique among living sandboxes; made up when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// URL-safe; the slugified name when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slug: Option<String>,
    /// `shell`, `python`, `node` or `full` (compilers): what the image must be able to run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox_type: Option<String>,
    /// Image reference; `ubuntu:24.04` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// `qemu` (the default) is the one there is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend_type: Option<String>,
    /// `US` or `EU`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// Seconds from creation until it is destroyed; absent: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_seconds: Option<i64>,
    /// Run in the working directory, supervised; when it ends, the sandbox ends. A string is a script for `sh -c`, an array
    /// a program and its arguments, which needs no shell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_command: Option<StartCommand>,
    /// The image's own (WORKDIR) when absent, else `/workspace`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub working_directory: Option<String>,
    /// Ports to bind, up to 32.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 32)]
    pub open_ports: Vec<i64>,
    /// Whether the ports are bound without authentication; default true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub is_public: Option<bool>,
    /// Environment of every command; names and values together up to 128 KiB.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env_vars: BTreeMap<String, String>,
    /// Run in order with `sh -c` after the archive is unpacked, before the start command; up to 32 of up to 64 KiB each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 32)]
    pub setup_hooks: Vec<String>,
    /// Directories of the daemon's host that the sandbox sees, live, up to 16.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 16)]
    pub mounts: Vec<Mount>,
    /// `micro` … `xlarge`; `small` when absent. A string, so that an unknown one gets its own error code.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_class: Option<String>,
    /// 1 to 250; 10 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_size_gb: Option<i64>,
    /// Unpacked to the working directory before the hooks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub archive_id: Option<String>,
    /// Directory of the archive whose content is meant, for archives that name their files from further up: nothing
    /// beside it is unpacked. The whole archive when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub archive_root: Option<String>,
    /// HTTP path on the first port that must answer 2xx or 3xx before the sandbox counts as running.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health_path: Option<String>,
    /// How long that may take; 120 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health_timeout_seconds: Option<f64>,
    /// Seconds that the app may take until the head of an answer, 1 to 86400; the proxy's `timeout_seconds` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub response_timeout_seconds: Option<i64>,
    /// Keep the half-made sandbox when a step fails.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub keep_on_failure: bool,
    /// Whether it is started again when it ended by itself: `never` (the default), `on-failure` or `always`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restart: Option<RestartPolicy>,
    /// Take over name and URLs of the living sandbox of this name, once this one is healthy.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub replace: bool,
}

/// One sandbox, as every call tells of it.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct SandboxInfo {
    /// A UUID.
    pub id: String,
    /// Whose it is; absent: of the owner of the daemon's machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account_id: Option<String>,
    /// Unique among an account's living sandboxes.
    pub name: String,
    /// URL-safe.
    pub slug: String,
    /// Where it is in its life.
    pub status: Status,
    /// The image it really runs.
    pub image: String,
    /// The image that was asked for, where another one stands in for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_requested: Option<String>,
    /// `qemu`.
    pub backend_type: String,
    /// `US`, `EU` or the server's own name for where it is.
    pub region: String,
    /// Memory and processor share.
    pub size_class: SizeClass,
    /// Disk in GB.
    pub disk_size_gb: u32,
    /// When the checkpoint was made that `restore` goes back to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_at: Option<DateTime<Utc>>,
    /// Whether it was made from an archive.
    pub is_deployed: bool,
    /// The archive it was made from.
    pub archive_id: Option<String>,
    /// When it was asked for.
    pub created_at: DateTime<Utc>,
    /// When `status` last changed.
    pub status_changed_at: DateTime<Utc>,
    /// Seconds since the VM was started; 0 when it is not running.
    pub uptime_secs: u64,
    /// Time-to-live in seconds from creation.
    pub ttl_seconds: Option<i64>,
    /// When the time-to-live runs out.
    pub expires_at: Option<DateTime<Utc>>,
    /// Environment of every command. Values are `[redacted]` for callers that may not run commands.
    pub env_vars: BTreeMap<String, String>,
    /// The start command.
    pub start_command: Option<StartCommand>,
    /// What the image runs by itself, where there is no start command.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub image_command: Vec<String>,
    /// TCP ports that the image says it listens on. They are bound when that is asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exposed_ports: Vec<u16>,
    /// Default directory of commands.
    pub working_directory: String,
    /// Commands that ran before the start command.
    pub setup_hooks: Vec<String>,
    /// Directories of the host that it sees.
    #[serde(default)]
    pub mounts: Vec<Mount>,
    /// How long its apps may take until the head of an answer, where that was said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response_timeout_seconds: Option<u32>,
    /// The reason's message, for clients that know only this field.
    pub error_message: Option<String>,
    /// Why it is not running.
    pub reason: Option<Reason>,
    /// Bound ports; never null.
    pub urls: Vec<Endpoint>,
    /// What was done otherwise than asked for, and that its disk was full when it was last looked at (at its start, and
    /// when it alone is asked for), in sentences.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// `unresponsive` while its VM runs and its agent does not answer; absent otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<AgentState>,
    /// What is being done while it is `provisioning`, for example `setup_hook: npm ci`; absent otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
    /// Whether it is started again when it ended by itself.
    #[serde(default)]
    pub restart: RestartPolicy,
    /// How often it was started again by itself.
    #[serde(default)]
    pub restart_count: u32,
    /// When it is started again, while it waits for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_start_at: Option<DateTime<Utc>>,
}

/// What is wrong with the agent of a running sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum AgentState {
    /// It does not answer: exec, files and ports wait. It is asked again until it does.
    Unresponsive,
}

/// Stands for the value of an environment variable where the caller may see its name alone.
pub const REDACTED: &str = "[redacted]";

impl SandboxInfo {
    /// With the names of its environment, and [`REDACTED`] for each value.
    pub fn without_values(mut self) -> Self {
        self.env_vars.values_mut().for_each(|value| REDACTED.clone_into(value));
        self
    }
}

/// Query of `GET /sandboxes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ListFilter {
    /// Living ones: provisioning, running, stopping.
    #[default]
    Living,
    /// Stopped and failed ones.
    Stopped,
    /// All, also those removed within the last day.
    All,
}
