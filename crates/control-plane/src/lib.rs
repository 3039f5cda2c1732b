//! What a request means: sandboxes and their state machine, names, ports, time-to-live, archives, logs.
//! Knows no HTTP and no QEMU: `heyvm-server` calls it, it calls a [`heyvm_vm::Driver`], the store and the images.
//!
//! - [`record`]: one sandbox and its state machine, drawn.  [`validate`]: what may be asked for.  [`who`]: by whom.
//! - [`create`]: the steps of a deploy.  [`replace`]: a new version takes an old one's place.  [`replace_mount`]: a new
//!   archive within one.
//! - [`lifecycle`]: stop, start, remove, and what happens by itself.  [`restarts`]: what is started again.
//!   [`adoption`]: what a new daemon finds.
//! - [`list`]: lists and their pages.  [`changes`]: what has changed since.  [`deadlines`]: what is due by itself.
//! - [`orphans`]: VMs that no row names.  [`agent_watch`]: whether an adopted VM's agent answers.
//! - [`mounts`]: directories of this host in a sandbox.
//! - [`resize`]: another size class, a larger disk.  [`checkpoint`]: a disk to go back to.  [`disk_space`]: a full one.
//! - [`main_command`]: the start command and its log.  [`ready`]: when a sandbox counts as running.
//! - [`image_run`]: what an image runs by itself.  [`pulls`]: limits on images.
//! - [`hooks`]: setup hooks and their output.  [`guest_command`]: other commands in a guest.  [`cut`]: what cuts a create
//!   or start short.  [`endpoints`], [`archives`], [`logs`] ([`log_lines`]), [`images`]: what their names say.  [`errors`]: codes and hints.
//! - [`supervised`]: panics that end one sandbox alone.  [`blocking`]: what waits for a disk.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test may block its own thread"))]

mod adoption;
mod agent_watch;
mod archives;
mod blocking;
mod changes;
mod checkpoint;
mod create;
mod cut;
mod deadlines;
mod disk_space;
mod endpoints;
mod errors;
mod guest_command;
mod hooks;
mod image_run;
mod images;
mod lifecycle;
mod list;
mod local_ports;
mod log_lines;
mod logs;
mod main_command;
mod mounts;
mod orphans;
mod pulls;
mod ready;
mod record;
mod replace;
mod replace_mount;
mod resize;
mod resolver;
mod restarts;
mod supervised;
mod validate;
mod who;

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use heyvm_api::{ApiError, ErrorCode, names, sandbox::*, system::*};
use heyvm_mounts::HandleBudget;
use heyvm_store::Store;
use heyvm_vm::{AgentConnection, Driver, Vm};
use tokio::sync::watch;

pub use archives::id_of as archive_id;
pub use changes::Revision;
pub use create::Asked;
pub use endpoints::ConnectError;
pub use errors::agent as agent_error;
pub use list::{ListQuery, Listing};
pub use local_ports::{LocalPorts, WantedPort};
pub use logs::{LogChunk, LogQuery};
pub use pulls::ImageLimits;
use pulls::Pulls;
use record::Record;
pub use record::fingerprint;
pub use validate::{DEFAULT_WORKING_DIRECTORY, check, made_up_name};
pub use who::{Account, Who};

/// What the control plane is told at its start.
#[derive(Debug, Clone)]
pub struct Config {
    /// `~/.heyo` or its stand-in.
    pub home: PathBuf,
    /// `localhost`, or the public base domain.
    pub base_domain: String,
    /// `http` or `https`.
    pub url_scheme: String,
    /// Port in URLs; left out where it is the scheme's own.
    pub url_port: u16,
    /// Regions this server serves; the first is the default.
    pub regions: Vec<String>,
    /// Image of sandboxes that ask for none.
    pub default_image: String,
    /// Limits on images.
    pub images: ImageLimits,
    /// What every sandbox takes over from the host.
    pub guest: GuestDefaults,
}

/// What every sandbox takes over from the host.
#[derive(Debug, Clone, Default)]
pub struct GuestDefaults {
    /// Certificate authorities, in PEM.
    pub certificates: String,
    /// Environment of every command; the image's and the sandbox's own come on top.
    pub env: Vec<(String, String)>,
    /// What of the host's set-up does not work in sandboxes, in sentences.
    pub problems: Vec<String>,
}

/// A VM's end is known this long after its agent's, at most.
const LAST_WORD: Duration = Duration::from_secs(2);

/// Takes progress events of a long call. Sending never blocks.
pub type ProgressSink = tokio::sync::mpsc::UnboundedSender<ProgressEvent>;

/// The one owner of every sandbox's state.
pub struct ControlPlane {
    config: Config,
    store: Store,
    driver: Arc<dyn Driver>,
    images: Arc<heyvm_images::ImageStore>,
    sandboxes: RwLock<HashMap<String, Arc<Sandbox>>>,
    endpoints: RwLock<endpoints::Endpoints>,
    listeners: OnceLock<Arc<dyn LocalPorts>>,
    /// Ports on loopback by subdomain.
    local_ports: RwLock<HashMap<String, u16>>,
    keys: tokio::sync::Mutex<()>,
    /// Held while ports are bound or unbound.
    binding: tokio::sync::Mutex<()>,
    book: Arc<Book>,
    /// Held while an image begins to be used, or goes because it is not.
    image_use: tokio::sync::Mutex<()>,
    pulls: Pulls,
    /// Images that were named and replaced by another, which has been reported.
    substitutions: Mutex<HashSet<String>>,
    /// Ids of rows that cannot be read: what they need is not known.
    unread: HashSet<String>,
    /// The store's id, which the note beside each disk names.
    store_id: String,
}

/// What is noted of every change of a sandbox: lists of changes and what is due by itself are made from it.
#[derive(Default)]
struct Book {
    changes: changes::Changes,
    deadlines: deadlines::Deadlines,
}

impl Book {
    /// Puts what the store has into memory, for everyone who looks or waits.
    fn publish(&self, sandbox: &Sandbox, record: Record) {
        *sandbox.record() = record;
        self.noted(sandbox);
        sandbox.changed.send_replace(());
    }

    /// Notes a change of a sandbox.
    fn noted(&self, sandbox: &Sandbox) {
        let (id, deadline) = {
            let record = sandbox.record();
            (record.id.clone(), record.deadline())
        };
        self.deadlines.set(&id, deadline);
        self.changes.stamp(&sandbox.changed_at);
    }
}

/// One sandbox: its record, its VM while it has one, and the lock that makes its transitions one at a time.
struct Sandbox {
    record: Mutex<Record>,
    vm: Mutex<Option<Arc<dyn Vm>>>,
    transition: tokio::sync::Mutex<()>,
    /// Held while the record changes in the store and in memory.
    saving: Arc<tokio::sync::Mutex<()>>,
    /// Rings at every change, for those who wait for an end.
    changed: watch::Sender<()>,
    /// Its last change, in the order of all.
    changed_at: AtomicU64,
    /// What it is to be instead of what it is becoming: the caller waits for the lock.
    cut: watch::Sender<Option<cut::Cut>>,
    /// What its create or start is doing.
    step: Mutex<Option<String>>,
    /// Whether its removal at the end of its time is under way.
    expiring: AtomicBool,
    /// What became of its making, for those who ask again.
    failure: OnceLock<ApiError>,
    /// What its mounts may have open, all together.
    mount_handles: Arc<HandleBudget>,
    /// How much of what this run of the start command has printed is in the log.
    log_offset: AtomicU64,
    /// Held while its log is written to: what comes later stands later, although nobody waits for the earlier any more.
    log_turn: Arc<tokio::sync::Mutex<()>>,
    /// Whether its VM runs and the agent in it does not answer.
    agent_is_silent: AtomicBool,
    /// Whether its next start by itself is under way.
    is_starting_again: AtomicBool,
    /// Whether its disk was full when it was last looked at.
    disk: disk_space::DiskSpace,
}

impl Sandbox {
    fn new(record: Record) -> Arc<Self> {
        Arc::new(Self {
            record: Mutex::new(record),
            vm: Mutex::default(),
            transition: tokio::sync::Mutex::default(),
            saving: Arc::default(),
            changed: watch::channel(()).0,
            changed_at: AtomicU64::new(0),
            cut: watch::channel(None).0,
            step: Mutex::default(),
            expiring: AtomicBool::new(false),
            failure: OnceLock::new(),
            mount_handles: HandleBudget::of_this_process(),
            log_offset: AtomicU64::new(0),
            log_turn: Arc::default(),
            agent_is_silent: AtomicBool::new(false),
            is_starting_again: AtomicBool::new(false),
            disk: disk_space::DiskSpace::default(),
        })
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Whether it runs, and its agent answers as far as is known.
    fn is_reachable(&self) -> bool {
        self.record().status == Status::Running && !self.agent_is_silent.load(Ordering::Relaxed)
    }

    fn snapshot(&self) -> Record {
        self.record().clone()
    }

    fn vm(&self) -> Option<Arc<dyn Vm>> {
        self.vm.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    fn set_vm(&self, vm: Option<Arc<dyn Vm>>) {
        *self.vm.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = vm;
    }
}

impl ControlPlane {
    /// One sandbox; also one removed within the last day.
    pub async fn get(&self, who: &Who) -> Result<SandboxInfo, ApiError> {
        let sandbox = self.find(who)?;
        self.look_at_disk_again(&sandbox).await;
        Ok(self.info(&sandbox.snapshot()))
    }

    /// Whether a sandbox sees directories of the host; false where there is no such sandbox.
    pub fn has_mounts(&self, who: &Who) -> bool {
        self.find(who).is_ok_and(|sandbox| !sandbox.record().mounts.is_empty())
    }

    /// The agent of a running sandbox, for exec and files.
    pub async fn agent(&self, who: &Who) -> Result<AgentConnection, ApiError> {
        let sandbox = self.find(who)?;
        let record = sandbox.snapshot();
        match sandbox.vm().filter(|_| record.status != Status::Stopping) {
            Some(vm) => Ok(vm.agent()),
            None => Err(not_running(&record)),
        }
    }

    /// `error`, or why the sandbox ended where that is what is behind it: its end is known a moment after its agent's. One
    /// that was ended on purpose is not in the state for it; one that ended by itself is unreachable.
    pub async fn explain(&self, who: &Who, error: ApiError) -> ApiError {
        let Ok(sandbox) = self.find(who) else { return error };
        let mut changes = sandbox.changed.subscribe();
        let ended = changes.wait_for(|()| !sandbox.record().is_living());
        if error.code != ErrorCode::SandboxUnreachable || tokio::time::timeout(LAST_WORD, ended).await.is_err() {
            return error;
        }
        let record = sandbox.snapshot();
        let why = not_running(&record);
        let on_purpose = [ReasonCode::Stopped, ReasonCode::Removed, ReasonCode::Replaced, ReasonCode::TtlExpired];
        let code = match record.reason.is_some_and(|reason| on_purpose.contains(&reason.code)) {
            true => why.code,
            false => error.code,
        };
        ApiError { code, message: format!("the sandbox ended meanwhile: {}", why.message), ..why }
    }

    /// Ends every VM at once, for a home that is gone: nothing could find them again.
    pub async fn abandon(&self) {
        for sandbox in self.all() {
            if let Some(vm) = sandbox.vm()
                && let Err(error) = vm.stop(Duration::ZERO).await
            {
                tracing::error!(%error, "a VM could not be ended");
            }
        }
    }

    /// Ends background work; VMs keep running.
    pub async fn shutdown(&self) {
        self.driver.empty_pool().await;
        self.store.close().await;
    }

    fn all(&self) -> Vec<Arc<Sandbox>> {
        self.sandboxes.read().unwrap_or_else(|poisoned| poisoned.into_inner()).values().cloned().collect()
    }

    fn add(&self, sandbox: &Arc<Sandbox>) {
        let id = sandbox.record().id.clone();
        self.sandboxes.write().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(id, Arc::clone(sandbox));
        self.book.noted(sandbox);
    }

    fn drop_from_memory(&self, id: &str) {
        self.sandboxes.write().unwrap_or_else(|poisoned| poisoned.into_inner()).remove(id);
    }

    fn with_id(&self, id: &str) -> Option<Arc<Sandbox>> {
        self.sandboxes.read().unwrap_or_else(|poisoned| poisoned.into_inner()).get(id).cloned()
    }

    /// By id, else the living one of that name or slug, else the newest, else by the beginning of its id. Another account's
    /// id yields `forbidden`.
    fn find(&self, who: &Who) -> Result<Arc<Sandbox>, ApiError> {
        if let Some(found) = self.with_id(&who.sandbox) {
            let is_theirs = found.record().account == who.account;
            return if is_theirs { Ok(found) } else { Err(not_theirs(who)) };
        }
        let mut named: Vec<_> = self
            .all()
            .into_iter()
            .filter(|sandbox| {
                let record = sandbox.record();
                let is_called_so = record.name == who.sandbox || record.slug == who.sandbox;
                is_called_so && record.account == who.account && !record.waiting_to_replace
            })
            .collect();
        named.sort_by_key(|sandbox| {
            let record = sandbox.record();
            (record.is_living(), record.status != Status::Removed, record.created_at)
        });
        if let Some(newest) = named.pop() {
            return Ok(newest);
        }
        let theirs = self.all().into_iter().map(|sandbox| sandbox.snapshot()).filter(|one| one.account == who.account);
        let short = names::only_one_with(&who.sandbox, theirs.map(|record| record.id))?;
        short.and_then(|id| self.with_id(&id)).ok_or_else(|| {
            ApiError::new(ErrorCode::SandboxNotFound, format!("there is no sandbox {:?}", who.sandbox))
                .hint("heyvm list --all shows them all, also those removed within a day")
        })
    }

    fn info(&self, record: &Record) -> SandboxInfo {
        let mut info = record.info(self.urls_of(&record.id));
        if record.status != Status::Removed {
            info.warnings.extend(self.with_id(&record.id).and_then(|sandbox| sandbox.disk.note(&record.name)));
        }
        let provisioning = Some(record).filter(|record| record.status == Status::Provisioning);
        let step = provisioning.and_then(|record| self.with_id(&record.id)).and_then(|sandbox| sandbox.step());
        // One whose VM could not be found yet is as unresponsive as one whose agent is silent.
        let silent = self
            .with_id(&record.id)
            .is_some_and(|sandbox| sandbox.agent_is_silent.load(Ordering::Relaxed) || sandbox.vm().is_none());
        let agent = (silent && record.status == Status::Running).then_some(AgentState::Unresponsive);
        SandboxInfo { agent, step, ..info }
    }

    /// Changes a record in the store and in memory as one act: dropping the caller's future between the two, or a second
    /// change at the same time, never makes them differ.
    async fn save(&self, sandbox: &Arc<Sandbox>, change: impl FnOnce(&mut Record)) -> Result<Record, ApiError> {
        let saving = Arc::clone(&sandbox.saving).lock_owned().await;
        let mut next = sandbox.snapshot();
        change(&mut next);
        next.revision += 1;
        let (store, sandbox, book) = (self.store.clone(), Arc::clone(sandbox), Arc::clone(&self.book));
        let (driver, store_id) = (Arc::clone(&self.driver), self.store_id.clone());
        spawn_detached(async move {
            let _saving = saving;
            store.update(&next.row()).await.map_err(errors::store)?;
            book.publish(&sandbox, next.clone());
            orphans::keep_note(driver.as_ref(), &store_id, &next).await;
            Ok(next)
        })
        .await
    }

    /// Notes a change that is not in the record.
    fn touch(&self, id: &str) {
        if let Some(sandbox) = self.with_id(id) {
            self.book.changes.stamp(&sandbox.changed_at);
        }
    }
}

/// Runs work in a task of its own, to its end: dropping the caller's future does not stop it half-way.
async fn spawn_detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::spawn(work).await.map_err(|error| errors::internal(&error))?
}

fn not_theirs(who: &Who) -> ApiError {
    ApiError::new(ErrorCode::Forbidden, format!("sandbox {who} is another account's"))
        .hint("heyvm list --all shows those of yours; is this the account you meant?")
}

fn not_running(record: &Record) -> ApiError {
    let status =
        serde_json::to_value(record.status).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default();
    let why = record.reason.as_ref().map(|reason| format!(": {}", reason.message)).unwrap_or_default();
    let hint = match record.status {
        Status::Stopped | Status::Failed => format!("heyvm start {} brings it back", record.name),
        Status::Removed => "deploy it again".to_owned(),
        _ => "wait a moment: heyvm get tells its status".to_owned(),
    };
    ApiError::new(ErrorCode::InvalidState, format!("sandbox {} is {status}{why}", record.name))
        .hint(hint)
        .sandbox(&record.id)
}

/// Tells what a step is doing.
fn tell(progress: &ProgressSink, step: &str, message: &str) {
    progress.send(ProgressEvent::new(step, message)).ok();
}

/// Begins a step of a sandbox's create or start: told to the caller, and named in `get` and `list` meanwhile.
fn begin_step(sandbox: &Sandbox, progress: &ProgressSink, step: &str, message: &str) {
    let named: String = message.chars().filter(|c| !c.is_control()).take(80).collect();
    sandbox.enter_step(format!("{step}: {named}"));
    tell(progress, step, message);
}
