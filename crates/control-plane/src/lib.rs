//! What a request means: sandboxes and their state machine, names, ports, time-to-live, archives, logs.
//! Knows no HTTP and no QEMU: `heyvm-server` calls it, it calls a [`heyvm_vm::Driver`], the store and the images.
#![forbid(unsafe_code)]
#![allow(unused_variables)]

use std::{path::PathBuf, sync::Arc};

use bytes::Bytes;
use futures::stream::BoxStream;
use heyvm_api::{ApiError, images::*, sandbox::*, system::*};
use heyvm_store::Store;
use heyvm_vm::{AgentConnection, Driver, agent::PortStream};

/// What the control plane is told at its start.
#[derive(Debug, Clone)]
pub struct Config {
    /// `~/.heyo` or its stand-in.
    pub home: PathBuf,
    /// `localhost`, or the public base domain.
    pub base_domain: String,
    /// What stands before and behind a host name in a URL, for example (`http`, 8480).
    pub url_scheme: String,
    /// Port in URLs; left out where it is the scheme's own.
    pub url_port: u16,
    /// Regions this server serves; the first is the default.
    pub regions: Vec<String>,
    /// Image of sandboxes that ask for none.
    pub default_image: String,
}

/// Takes progress events of a long call. Sending never blocks.
pub type ProgressSink = tokio::sync::mpsc::UnboundedSender<ProgressEvent>;

/// A piece of what a start command printed.
#[derive(Debug, Clone)]
pub struct LogChunk {
    /// Whether it came on standard error.
    pub stderr: bool,
    /// The bytes.
    pub data: Bytes,
}

/// Why a port could not be reached through its URL.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No endpoint has this subdomain.
    #[error("no sandbox has this address")]
    UnknownSubdomain,
    /// The sandbox is there, but its VM is not running.
    #[error("the sandbox is {0}")]
    NotRunning(String),
    /// Nothing listens on the port.
    #[error("nothing listens on port {0} in the sandbox")]
    NothingListens(u16),
    /// The agent does not answer.
    #[error("the sandbox does not answer: {0}")]
    Unreachable(String),
}

/// The one owner of every sandbox's state. `who` below is an id, a name or a slug: the living one, else the newest.
pub struct ControlPlane {}

impl ControlPlane {
    /// Opens the state: adopts running VMs, cleans up half-made ones, removes what has expired, starts the timers.
    pub async fn open(config: Config, store: Store, driver: Arc<dyn Driver>, images: Arc<heyvm_images::ImageStore>) -> Result<Arc<Self>, ApiError> { todo!() }

    /// Makes a sandbox and returns when it is running (or healthy, where that was asked for).
    /// Dropping the future without an idempotency key undoes it; with a key it goes on.
    pub async fn create(self: &Arc<Self>, request: CreateRequest, idempotency_key: Option<String>, progress: ProgressSink) -> Result<SandboxInfo, ApiError> { todo!() }
    /// Sandboxes, newest first.
    pub async fn list(&self, filter: ListFilter) -> Result<Vec<SandboxInfo>, ApiError> { todo!() }
    /// One sandbox; also one removed within the last day.
    pub async fn get(&self, who: &str) -> Result<SandboxInfo, ApiError> { todo!() }
    /// Ends the VM, keeps the disk. Stopping a stopped one succeeds.
    pub async fn stop(self: &Arc<Self>, who: &str) -> Result<SandboxInfo, ApiError> { todo!() }
    /// Goes on from the disk and runs the start command again. Starting a running one succeeds.
    pub async fn start(self: &Arc<Self>, who: &str, progress: ProgressSink) -> Result<SandboxInfo, ApiError> { todo!() }
    /// Stop, then start.
    pub async fn restart(self: &Arc<Self>, who: &str, progress: ProgressSink) -> Result<SandboxInfo, ApiError> { todo!() }
    /// Destroys it with disk and URLs; told of for a day. Removing a removed one succeeds.
    pub async fn remove(self: &Arc<Self>, who: &str) -> Result<SandboxInfo, ApiError> { todo!() }

    /// Gives a port a URL. Binding a bound port gives the same URL.
    pub async fn bind(&self, who: &str, request: BindRequest) -> Result<BoundPort, ApiError> { todo!() }
    /// Takes a port's URL away.
    pub async fn unbind(&self, who: &str, port: i64) -> Result<(), ApiError> { todo!() }
    /// The bound ports.
    pub async fn endpoints(&self, who: &str) -> Result<Vec<BoundPort>, ApiError> { todo!() }
    /// A byte stream to the port behind a subdomain: the edge proxy's way in.
    pub async fn connect(&self, subdomain: &str) -> Result<Box<dyn PortStream>, ConnectError> { todo!() }

    /// The agent of a running sandbox, for exec and files.
    pub async fn agent(&self, who: &str) -> Result<AgentConnection, ApiError> { todo!() }
    /// Waits until something listens on the port in the sandbox, and answers 2xx or 3xx on `path` where given. `false` at the deadline.
    pub async fn wait_for_port(&self, who: &str, port: i64, path: Option<&str>, timeout: std::time::Duration) -> Result<bool, ApiError> { todo!() }
    /// What the start command printed, kept until a day after the end of the sandbox; with `follow` until it ends.
    pub async fn logs(&self, who: &str, follow: bool) -> Result<BoxStream<'static, std::io::Result<LogChunk>>, ApiError> { todo!() }

    /// Takes a tar.gz: checks it (paths, kinds, unpacked size), stores it by content hash.
    pub async fn put_archive(&self, body: BoxStream<'static, std::io::Result<Bytes>>) -> Result<ArchiveInfo, ApiError> { todo!() }

    /// Images here.
    pub async fn images(&self) -> Result<Vec<ImageInfo>, ApiError> { todo!() }
    /// Fetches an image from its registry.
    pub async fn pull_image(&self, request: PullRequest, progress: ProgressSink) -> Result<ImageInfo, ApiError> { todo!() }
    /// Takes an image from a file on this machine.
    pub async fn import_image(&self, request: ImportRequest, progress: ProgressSink) -> Result<ImageInfo, ApiError> { todo!() }
    /// Removes an image that no sandbox runs.
    pub async fn remove_image(&self, name: &str) -> Result<(), ApiError> { todo!() }

    /// Checks of the host.
    pub async fn doctor(&self) -> Result<DoctorReport, ApiError> { todo!() }
    /// Ends background work; VMs keep running.
    pub async fn shutdown(&self) { todo!() }
}
