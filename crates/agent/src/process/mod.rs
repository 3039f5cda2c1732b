//! Processes: from what the host asks for to a running child with its input and output.
//!
//! ```text
//! ExecStart ──command──▶ Program ──spawn──▶ Child (reaper) + Streams
//!               │ user, lookup
//! ```

pub mod cgroup;
pub mod command;
pub mod ended;
pub mod lookup;
pub mod reaper;
pub mod spawn;
pub mod streams;
pub mod terminal;
pub mod user;

use std::sync::Arc;

pub use cgroup::Cgroups;
pub use command::Command;
pub use ended::Ended;
pub use reaper::{Child, Reaper};
pub use spawn::SpawnError;
pub use streams::Streams;
pub use user::Identity;

/// What every child is started with.
pub struct Spawner {
    /// Who collects it.
    pub reaper: Arc<Reaper>,
    /// Where it gets a cgroup of its own, where the kernel has such a thing.
    pub cgroups: Option<Arc<Cgroups>>,
}

impl Spawner {
    /// Starts a command.
    pub fn start(&self, command: &Command) -> Result<(Child, Streams), SpawnError> {
        let (streams, theirs) = Streams::open(command).map_err(SpawnError::Descriptors)?;
        let descriptors = theirs.descriptors(command.script.as_ref());
        // A sandbox whose root allows no more cgroups still runs commands, in the cgroup of all.
        let own = self.cgroups.as_ref().and_then(|all| all.take().ok());
        let shared = self.cgroups.as_ref().map(|all| all.parent());
        let cgroup = own.as_ref().map(cgroup::Cgroup::dir).or(shared);
        let mut child = self.reaper.adopt(|| spawn::spawn(&command.program, &descriptors, cgroup))?;
        child.cgroup = own;
        Ok((child, streams))
    }
}
