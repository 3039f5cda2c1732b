//! Processes: from what the host asks for to a running child with its input and output.
//!
//! ```text
//! ExecStart ──command──▶ Program ──spawn──▶ Child (reaper) + Streams
//!               │ user, lookup
//! ```

pub mod command;
pub mod ended;
pub mod lookup;
pub mod reaper;
pub mod spawn;
pub mod streams;
pub mod terminal;
pub mod user;

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

pub use command::Command;
pub use ended::Ended;
pub use reaper::{Child, Reaper};
pub use spawn::SpawnError;
pub use streams::Streams;

/// What every child is started with.
pub struct Nursery {
    /// Who collects it.
    pub reaper: Arc<Reaper>,
    /// The cgroup it is born in.
    pub cgroup: Option<OwnedFd>,
}

impl Nursery {
    /// Starts a command.
    pub fn start(&self, command: &Command) -> Result<(Child, Streams), SpawnError> {
        let (streams, theirs) = Streams::open(command).map_err(SpawnError::Descriptors)?;
        let descriptors = theirs.descriptors();
        let cgroup = self.cgroup.as_ref().map(AsFd::as_fd);
        let child = self.reaper.adopt(|| spawn::spawn(&command.program, &descriptors, cgroup))?;
        Ok((child, streams))
    }
}
