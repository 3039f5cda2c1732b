//! Running VMs: the [`Driver`] trait that the control plane knows, and the QEMU driver behind it.
//!
//! A VM is known by its [`VmId`] (the sandbox's id). Its disk outlives its process: `create` makes a disk and a
//! process, `stop` ends the process, `start` makes a new one on the kept disk, `destroy` removes both.
//! Nothing here knows of names, HTTP or the store.

#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test may block its own thread"))]

pub mod agent;
mod agent_channel;
mod clock;
mod ports;
pub mod qemu;
mod rehearsal;

use std::{io, path::PathBuf, sync::Arc, time::SystemTime};

use async_trait::async_trait;
use heyvm_images::{Image, Kernel};
use serde::{Deserialize, Serialize};

pub use agent::AgentConnection;
pub use agent_channel::AgentChannel;
pub use rehearsal::Rehearsal;

/// A sandbox's id: lower-case letters, digits and `-`, at most 64 bytes; safe as a file name.
pub type VmId = String;

/// What a VM is made from and how large it is.
#[derive(Debug, Clone)]
pub struct VmSpec {
    /// Guest kernel and initramfs.
    pub kernel: Kernel,
    /// Root file system and image configuration.
    pub image: Image,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Processor share in thousandths of a processor; the number of virtual processors is this rounded up.
    pub cpu_millis: u32,
    /// Disk in GiB.
    pub disk_gib: u32,
    /// Host name in the guest.
    pub hostname: String,
    /// Environment of every command: the image's, then the sandbox's.
    pub env: Vec<(String, String)>,
    /// Default directory of commands; made when missing.
    pub working_dir: String,
    /// Certificate authorities for its programs, in PEM.
    pub certificates: String,
    /// Whose commands are, where they do not say: `name` or `uid`, and a group behind a colon; empty for root.
    pub user: String,
    /// What it will run first, where that is known.
    pub rehearsal: Option<Rehearsal>,
}

/// Tells what a long step is doing: words, and bytes done and in all where known.
pub type Progress = Arc<dyn Fn(&str, Option<u64>, Option<u64>) + Send + Sync>;

/// Makes, finds and removes VMs on some machine. The VM need not be on the caller's machine.
#[async_trait]
pub trait Driver: Send + Sync {
    /// Makes the template for such VMs unless it is there, telling of it; creates are fast afterwards.
    async fn prepare(&self, spec: &VmSpec, progress: Progress) -> Result<(), Error>;

    /// Makes the disk and starts the VM; its agent answers when this returns. On an error nothing is left behind.
    async fn create(&self, id: &VmId, spec: &VmSpec) -> Result<Arc<dyn Vm>, Error>;

    /// Starts a stopped VM again on its kept disk.
    async fn start(&self, id: &VmId, spec: &VmSpec) -> Result<Arc<dyn Vm>, Error>;

    /// Finds a VM that an earlier daemon started; `None` when it is known to run no longer, an error when that cannot be
    /// found out now. Ends none, also where its agent does not answer.
    async fn adopt(&self, id: &VmId) -> Result<Option<Arc<dyn Vm>>, Error>;

    /// Ends a VM at once, if it runs, also one that `adopt` cannot reach; its disk is kept.
    async fn kill(&self, id: &VmId) -> Result<(), Error>;

    /// Why a VM that no longer runs ended, as far as its remains tell.
    async fn post_mortem(&self, id: &VmId) -> Exit;

    /// Keeps a copy of the disk as it is now, in place of the one that was kept before. Where the VM runs, its agent holds
    /// the disk still meanwhile. On an error the copy from before is still there.
    async fn checkpoint(&self, id: &VmId, running: Option<AgentConnection>) -> Result<(), Error>;

    /// Makes the kept copy the disk. The VM must not run; the copy stays. On an error the disk is as it was.
    async fn restore(&self, id: &VmId) -> Result<(), Error>;

    /// Ends the VM, if it runs, and removes its disk and everything else of it. Succeeds when nothing is there.
    async fn destroy(&self, id: &VmId) -> Result<(), Error>;

    /// Everything this driver has anything of: running or not, whole or partial.
    async fn list(&self) -> Result<Vec<VmId>, Error>;

    /// Whether an id is one of the warm pool's, whose VMs hold nothing of a sandbox.
    fn is_of_the_pool(&self, id: &str) -> bool;

    /// Keeps a note of the caller's beside the VM's disk, in place of the one before. A VM without a directory keeps none.
    async fn keep_note(&self, id: &VmId, note: Vec<u8>) -> Result<(), Error>;

    /// What is there of a VM, whether or not it runs; `None` where there is nothing.
    async fn remains(&self, id: &VmId) -> Result<Option<Remains>, Error>;

    /// Terminates the VMs of the warm pool; a daemon calls it as it ends.
    async fn empty_pool(&self) {}

    /// Checks of the host, for `doctor`. With a guest kernel, how guests run here is tried.
    async fn doctor(&self, kernel: Option<&heyvm_images::Kernel>) -> Vec<HostCheck>;
}

/// A running VM.
#[async_trait]
pub trait Vm: Send + Sync {
    /// Its id.
    fn id(&self) -> &VmId;

    /// A connection to its agent; reconnects by itself after a break. Cheap to clone.
    fn agent(&self) -> AgentConnection;

    /// Its sandbox is ready: from about now on its processor quota counts. Its start is not throttled.
    fn live(&self) {}

    /// Resolves when the VM's process has ended, however that came.
    async fn exited(&self) -> Exit;

    /// Ends the VM in order: processes get `grace` to end, the disk is unmounted; then the process is killed if need be.
    async fn stop(&self, grace: std::time::Duration) -> Result<(), Error>;

    /// Makes the disk larger, and the file system on it. A stopped VM's grows at its next start.
    async fn grow_disk(&self, gib: u32) -> Result<(), Error>;

    /// The host's view of its cost.
    async fn usage(&self) -> Result<Usage, Error>;
}

/// What is there of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remains {
    /// Whether its process runs.
    pub running: bool,
    /// What its files take on this host, in bytes.
    pub size_bytes: u64,
    /// Size of its disk in GiB; 0 where it has none.
    pub disk_gib: u32,
    /// When its disk was last written to.
    pub changed_at: SystemTime,
    /// The note that was kept beside it.
    pub note: Option<Vec<u8>>,
}

/// Why a VM's process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// As far as is known.
    pub cause: ExitCause,
    /// The last lines of the guest's console.
    pub console_tail: Vec<String>,
}

impl Exit {
    /// One of which nothing is known.
    pub fn lost() -> Self {
        Self { cause: ExitCause::Lost, console_tail: Vec::new() }
    }
}

/// Cause of an [`Exit`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitCause {
    /// The guest powered itself off.
    GuestShutdown,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The guest halted its processors without powering off.
    GuestHalted,
    /// The guest's port sends something else than the agent's protocol.
    AgentReplaced,
    /// QEMU could not run the guest's code any further.
    Unrunnable,
    /// The host ended the process at its memory limit.
    OutOfMemory,
    /// The host ran since another boot.
    HostRestarted,
    /// The process was ended from outside, or crashed.
    Lost,
}

/// What a VM costs the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Memory no other process shares, in bytes.
    pub private_memory: u64,
    /// Processor time used so far, in milliseconds.
    pub cpu_ms: u64,
}

/// One finding about the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostCheck {
    /// For example `kvm`.
    pub name: &'static str,
    /// How it came out.
    pub status: CheckStatus,
    /// What was found.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// How a [`HostCheck`] came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckStatus {
    /// As it should be.
    Ok,
    /// Works, but not as well as it could.
    Warn,
    /// VMs cannot run until it is mended.
    Fail,
}

/// What can go wrong with a VM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host lacks a program, a device or a permission.
    #[error("{what}")]
    HostNotReady {
        /// What is missing.
        what: String,
        /// What to do about it.
        hint: String,
    },
    /// No space, memory or other resource.
    #[error("the host is out of {what}")]
    OutOfResources {
        /// For example `disk space`.
        what: String,
    },
    /// The guest did not get as far as it should.
    #[error("the VM {what}")]
    Boot {
        /// What it did instead.
        what: String,
        /// The last lines of its console.
        console_tail: Vec<String>,
    },
    /// QEMU does not resume from the template.
    #[error("the VM could not be resumed from its template: {message}")]
    NotResumed {
        /// QEMU's words.
        message: String,
        /// The last lines of its log.
        console_tail: Vec<String>,
    },
    /// Nothing was kept that could be gone back to.
    #[error("there is no checkpoint")]
    NoCheckpoint,
    /// The disk could not be copied in the time in which it may be held still.
    #[error("the disk could not be copied within {0} seconds")]
    TooSlow(u64),
    /// The guest's kernel did not make the file system on the disk larger.
    #[error("the file system stays as large as it is: {0}")]
    NotGrown(String),
    /// The guest's kernel counts time with something that loses time.
    #[error("the guest's kernel fell back to the clock {0:?}, which loses time")]
    GuestClock(String),
    /// The VM's agent does not answer.
    #[error("the sandbox's agent does not answer: {0}")]
    Unreachable(String),
    /// A system call or file operation failed.
    #[error("{doing} ({path})", path = path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// QEMU's control socket said no.
    #[error("QEMU refused {command}: {message}")]
    Qmp {
        /// The command.
        command: &'static str,
        /// QEMU's words.
        message: String,
    },
}

impl Error {
    pub(crate) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::OutOfResources { what: "disk space".into() }
            }
            io::ErrorKind::OutOfMemory => Self::OutOfResources { what: "memory".into() },
            _ => Self::Io { doing, path, source },
        }
    }
}

impl From<heyvm_jail::Error> for Error {
    fn from(error: heyvm_jail::Error) -> Self {
        match error {
            heyvm_jail::Error::Io { doing, path, source } => Self::io(doing, path)(source),
            heyvm_jail::Error::Program { program, problem } => Self::HostNotReady {
                what: format!("{program} {problem}"),
                hint: "run ./quickstart, or install QEMU for x86, and see `heyvm doctor`".into(),
            },
            heyvm_jail::Error::Egress(failure) => {
                Self::HostNotReady { what: failure.to_string(), hint: failure.hint() }
            }
            heyvm_jail::Error::Refused(what) => Self::HostNotReady { what, hint: "`heyvm doctor` says more".into() },
        }
    }
}
