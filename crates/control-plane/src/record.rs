//! What is known of one sandbox, as it stands in the store, and where it can go from there.
//!
//! ```text
//!              create                      stop             (VM ended in order)
//!  (nothing) ─────────▶ provisioning ─▶ running ─▶ stopping ─────────▶ stopped
//!                         │    ▲           │                             │  │
//!                         │    └── start ──┼──────────── start ──────────┘  │
//!           a step failed │                │ guest panic, out of memory, …  │
//!                         ▼                ▼                                │
//!                      stopping ◀─────  failed ── start ─▶ provisioning     │
//!                    (`removing`) ◀── rm, ttl, replaced: from every state ──┘
//!                         │  VM, disk, URLs given back
//!                         ▼
//!                      removed
//! ```
//! One that is `removing` no longer holds its name. Removed ones are told of for a day, then forgotten.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use heyvm_api::{
    sandbox::{CreateRequest, Endpoint, Mount, Reason, ReasonCode, RestartPolicy, SandboxInfo, SizeClass, Status},
    start_command::StartCommand,
};
use heyvm_mounts::DirectoryIdentity;
use heyvm_store::SandboxRow;
use serde::{Deserialize, Serialize};

use crate::{Account, image_run::ImageRun, restarts};

/// How long removed sandboxes stay in the lists.
const RETENTION: chrono::Duration = chrono::Duration::days(1);

/// One sandbox. Daemons of other versions read it, too: a field that comes later has a default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// A UUID.
    pub id: String,
    /// Whose it is.
    #[serde(default)]
    pub account: Account,
    /// Its name.
    pub name: String,
    /// Its slug.
    pub slug: String,
    /// Where it is in its life.
    pub status: Status,
    /// Built to take another one's place, and does not hold its name yet.
    #[serde(default)]
    pub waiting_to_replace: bool,
    /// On its way out: what it has is being given back, and its name is free again.
    #[serde(default)]
    pub removing: bool,
    /// The image it runs, once that is known.
    pub image: String,
    /// Digest of that image: its name may come to mean another one, but the disk lies over this one.
    pub image_digest: Option<String>,
    /// The image that was asked for, where it is another.
    pub image_requested: Option<String>,
    /// Its region.
    pub region: String,
    /// Its size.
    pub size_class: SizeClass,
    /// Its disk.
    pub disk_gib: u32,
    /// When the copy of its disk was made that it can go back to.
    #[serde(default)]
    pub checkpoint_at: Option<DateTime<Utc>>,
    /// The archive it was made from.
    pub archive_id: Option<String>,
    /// Which directory of it.
    #[serde(default)]
    pub archive_root: Option<String>,
    /// When it was asked for.
    pub created_at: DateTime<Utc>,
    /// When its status last changed.
    pub status_changed_at: DateTime<Utc>,
    /// When its VM was last started.
    pub started_at: Option<DateTime<Utc>>,
    /// Seconds from its creation to its end.
    pub ttl_seconds: Option<i64>,
    /// Environment of every command.
    pub env_vars: BTreeMap<String, String>,
    /// Environment the image brings along.
    pub image_env: Vec<(String, String)>,
    /// What the image says about running it.
    #[serde(default)]
    pub image_run: ImageRun,
    /// What it is there for.
    pub start_command: Option<StartCommand>,
    /// Where commands run.
    pub working_directory: String,
    /// What ran before the start command.
    pub setup_hooks: Vec<String>,
    /// What tells that it is ready.
    pub health_path: Option<String>,
    /// How long that may take, in milliseconds.
    pub health_timeout_ms: u64,
    /// How long its apps may take until the head of an answer; the proxy's own time where it is not said.
    #[serde(default)]
    pub response_timeout_seconds: Option<u32>,
    /// Ports whose readiness counts, in the order asked for.
    pub open_ports: Vec<u16>,
    /// Whether they answer everyone, where that was said.
    #[serde(default)]
    pub ports_are_public: Option<bool>,
    /// What it was asked for with: a repeated request is told from another one.
    #[serde(default)]
    pub fingerprint: String,
    /// Directories of this host in it.
    #[serde(default)]
    pub mounts: Vec<Mount>,
    /// Which directories these were when they were checked, by `sandbox_path`.
    #[serde(default)]
    pub directories: BTreeMap<String, DirectoryIdentity>,
    /// Why it does not run.
    pub reason: Option<Reason>,
    /// What was done otherwise than asked for.
    pub warnings: Vec<String>,
    /// Whether it has been running before: then its disk is kept when a start fails.
    #[serde(default)]
    pub has_run: bool,
    /// How often it was saved: of two copies, the one that was saved more often is the newer one.
    #[serde(default)]
    pub revision: u64,
    /// Whether it is started again when it ended by itself.
    #[serde(default)]
    pub restart: RestartPolicy,
    /// How often it was started again by itself, in all.
    #[serde(default)]
    pub restart_count: u32,
    /// How often since it last ran for a while: each makes the next pause longer.
    #[serde(default)]
    pub restarts_in_a_row: u32,
    /// When it is started again.
    #[serde(default)]
    pub next_start_at: Option<DateTime<Utc>>,
}

impl Record {
    /// Whether it has a VM, or is about to.
    pub fn is_living(&self) -> bool {
        matches!(self.status, Status::Provisioning | Status::Running | Status::Stopping) && !self.removing
    }

    /// Whether it holds its name and slug against others; one that is started again soon does.
    pub fn holds_its_name(&self) -> bool {
        (self.is_living() || self.next_start_at.is_some()) && !self.waiting_to_replace
    }

    /// Whether it runs what the image runs by itself.
    pub fn runs_the_images_command(&self) -> bool {
        self.start_command.is_none() && !self.image_run.command.is_empty()
    }

    /// Whether its making is behind it.
    pub fn started_before(&self) -> bool {
        self.has_run
    }

    /// When it is to be removed.
    pub fn expires_at(&self) -> Option<DateTime<Utc>> {
        let ttl = chrono::Duration::try_seconds(self.ttl_seconds?)?;
        self.created_at.checked_add_signed(ttl)
    }

    /// When something is to be done about it by itself: its removal or its next start, and once it is removed, its end in
    /// the lists.
    pub fn deadline(&self) -> Option<DateTime<Utc>> {
        match self.status {
            Status::Removed => self.status_changed_at.checked_add_signed(RETENTION),
            _ => self.expires_at().into_iter().chain(self.next_start_at).min(),
        }
    }

    /// Drops what clients sent and no one needs once it is removed: it may be large, and holds secrets.
    pub fn drop_content(&mut self) {
        self.env_vars.clear();
        self.image_env.clear();
        self.setup_hooks.clear();
    }

    /// Moves on, with the reason where it no longer runs.
    pub fn enter(&mut self, status: Status, reason: Option<Reason>) {
        let now = Utc::now();
        if status == Status::Provisioning && self.next_start_at.is_some_and(|at| at <= now) {
            self.restart_count = self.restart_count.saturating_add(1);
            self.restarts_in_a_row = self.restarts_in_a_row.saturating_add(1);
        }
        if self.started_at.is_some_and(|at| now - at >= restarts::STEADY) {
            self.restarts_in_a_row = 0;
        }
        self.status = status;
        self.reason = reason;
        self.status_changed_at = now;
        self.next_start_at = restarts::pause(self).map(|pause| now + pause);
        self.has_run |= status == Status::Running;
        if status != Status::Running {
            self.started_at = None;
        }
    }

    /// Runs from now on.
    pub fn run(&mut self) {
        self.enter(Status::Running, None);
        self.started_at = Some(self.status_changed_at);
    }

    /// As the store keeps it.
    pub fn row(&self) -> SandboxRow {
        SandboxRow {
            id: self.id.clone(),
            account: self.account.as_str().to_owned(),
            name: self.name.clone(),
            slug: self.slug.clone(),
            living: self.holds_its_name(),
            removed: self.status == Status::Removed,
            created_at: self.created_at.timestamp_millis(),
            changed_at: self.status_changed_at.timestamp_millis(),
            expires_at: self.expires_at().map(|at| at.timestamp_millis()),
            data: serde_json::to_string(self).unwrap_or_default(),
        }
    }

    /// From the store; another version may have written what this one cannot read.
    pub fn from_row(row: &SandboxRow) -> Result<Self, serde_json::Error> {
        serde_json::from_str(&row.data)
    }

    /// As the API tells of it.
    pub fn info(&self, urls: Vec<Endpoint>) -> SandboxInfo {
        let uptime = self.started_at.map_or(0, |at| (Utc::now() - at).num_seconds().max(0).unsigned_abs());
        SandboxInfo {
            id: self.id.clone(),
            account_id: Some(self.account.as_str()).filter(|id| !id.is_empty()).map(str::to_owned),
            name: self.name.clone(),
            slug: self.slug.clone(),
            status: self.status,
            image: self.image.clone(),
            image_requested: self.image_requested.clone(),
            backend_type: "qemu".into(),
            region: self.region.clone(),
            size_class: self.size_class,
            disk_size_gb: self.disk_gib,
            checkpoint_at: self.checkpoint_at,
            is_deployed: self.archive_id.is_some(),
            archive_id: self.archive_id.clone(),
            created_at: self.created_at,
            status_changed_at: self.status_changed_at,
            uptime_secs: uptime,
            ttl_seconds: self.ttl_seconds,
            expires_at: self.expires_at(),
            env_vars: self.env_vars.clone(),
            start_command: self.start_command.clone(),
            working_directory: self.working_directory.clone(),
            image_command: match self.runs_the_images_command() {
                true => self.image_run.command.clone(),
                false => Vec::new(),
            },
            exposed_ports: self.image_run.exposed_ports.clone(),
            setup_hooks: self.setup_hooks.clone(),
            mounts: self.mounts.clone(),
            response_timeout_seconds: self.response_timeout_seconds,
            error_message: self.reason.as_ref().map(|reason| reason.message.clone()),
            reason: self.reason.clone(),
            urls,
            warnings: self.warnings.clone(),
            agent: None,
            step: None,
            restart: self.restart,
            restart_count: self.restart_count,
            next_start_at: self.next_start_at,
        }
    }
}

/// A reason without anything beside its sentence.
pub fn reason(code: ReasonCode, message: impl Into<String>) -> Reason {
    Reason { code, message: message.into(), exit_code: None, log_tail: Vec::new() }
}

/// The request without what does not make two of them different: for idempotency keys.
pub fn fingerprint(request: &CreateRequest) -> String {
    use sha2::{Digest, Sha256};
    hex::encode(Sha256::digest(serde_json::to_vec(request).unwrap_or_default()))
}
