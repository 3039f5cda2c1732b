//! Confinement of one process, and the one way out to the internet that confined guests have.
//!
//! - [`root`]: the directory that becomes the root of every jail: QEMU, its libraries, its firmware, nothing else.
//! - [`launcher`]: `heyvm jail`, a short-lived program that enters namespaces, drops its identity and becomes QEMU.
//! - [`cgroup`]: memory, processor and process limits where the host grants them (v2, v1, hybrid, none).
//! - [`egress`]: `heyvm egress`, the network namespace that routes and filters what guests send.
//! - [`channel`]: messages with descriptors between the daemon and these two programs.
//! - [`environment`]: what helper processes get of ours.  [`signals`]: what is inherited and must not be passed on.
//! - [`process`]: knowing, waiting for and ending a process that is not our child.
//!
//! A jail is handed descriptors, not paths: disks, sockets and the network device are opened by the daemon.
//! Synchronous: whoever calls it from asynchronous code does so on a thread that may wait (clippy-async.toml).

pub mod cgroup;
pub mod channel;
pub mod egress;
pub mod environment;
pub mod launcher;
pub mod process;
pub mod root;
pub mod signals;

use std::{io, path::PathBuf};

pub use egress::main_egress;
pub use launcher::main_jail;

/// What can go wrong with a jail.
#[derive(Debug, thiserror::Error)]
pub enum Error {
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
    /// A program is missing or does not work.
    #[error("{program} {problem}")]
    Program {
        /// Its name.
        program: &'static str,
        /// For example `is not installed`.
        problem: String,
    },
    /// The launcher or the egress holder reported a failure.
    #[error("{0}")]
    Refused(String),
    /// Sandboxes can have no network here.
    #[error(transparent)]
    Egress(egress::Failure),
}

impl Error {
    pub(crate) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }
}
