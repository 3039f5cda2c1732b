//! Collects ended processes: the agent's own children, whose end somebody waits for, and, as process 1, every orphan.
//!
//! One owner of `waitpid`: a child is entered in the table before its end can be seen, and taken out when it is
//! collected, so that a process id in the table is never another process.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use nix::{errno::Errno, unistd::Pid};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

use super::{
    cgroup::Cgroup,
    ended::{self, Ended},
};

type Children = HashMap<i32, oneshot::Sender<Ended>>;

/// The table of living children.
///
/// A birth may take long, on another thread, when the child's program lies in a mount that this very agent serves: it
/// holds up other births, but neither the table nor the collector, which comes again after it.
pub struct Reaper {
    children: Mutex<Children>,
    births: Mutex<()>,
    /// Whether something has ended that is not collected yet.
    due: AtomicBool,
    orphans: bool,
}

/// A child that is a process group, too.
pub struct Child {
    /// Its process id and the id of its group.
    pub pid: Pid,
    /// Where all that it begins runs.
    pub cgroup: Option<Cgroup>,
    reaper: Arc<Reaper>,
    end: oneshot::Receiver<Ended>,
}

impl Reaper {
    /// A reaper of our own children and, with `orphans`, of whatever is inherited.
    pub fn new(orphans: bool) -> Arc<Self> {
        Arc::new(Self { children: Mutex::default(), births: Mutex::default(), due: AtomicBool::new(false), orphans })
    }

    /// Collects for as long as the runtime lives.
    pub async fn run(self: Arc<Self>) -> io::Result<()> {
        let mut signals = signal(SignalKind::child())?;
        loop {
            self.collect();
            if signals.recv().await.is_none() {
                return Ok(());
            }
        }
    }

    /// Starts a child by `spawn`; its end cannot be missed.
    pub fn adopt<E>(self: &Arc<Self>, spawn: impl FnOnce() -> Result<Pid, E>) -> Result<Child, E> {
        let birth = self.births.lock().unwrap_or_else(PoisonError::into_inner);
        let born = spawn().map(|pid| {
            let (say, end) = oneshot::channel();
            self.lock().insert(pid.as_raw(), say);
            Child { pid, cgroup: None, reaper: Arc::clone(self), end }
        });
        drop(birth);
        if self.due.load(Ordering::SeqCst) {
            self.collect();
        }
        born
    }

    /// Collects everything that has ended; after a birth, where one is under way.
    pub fn collect(&self) {
        self.due.store(true, Ordering::SeqCst);
        let Ok(_no_birth) = self.births.try_lock() else { return };
        self.due.store(false, Ordering::SeqCst);
        let mut children = self.lock();
        if self.orphans {
            while let Some((pid, end)) = ended::next(-1) {
                tell(&mut children, pid, end);
            }
            return;
        }
        let known: Vec<i32> = children.keys().copied().collect();
        for pid in known {
            if let Some((pid, end)) = ended::next(pid) {
                tell(&mut children, pid, end);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Children> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn tell(children: &mut Children, pid: i32, end: Ended) {
    if let Some(waiting) = children.remove(&pid) {
        // Nobody may be waiting any more.
        waiting.send(end).ok();
    }
}

impl Child {
    /// Resolves when it has ended.
    pub async fn ended(&mut self) -> Ended {
        // The table's end is dropped without a word only when the agent itself ends.
        (&mut self.end).await.unwrap_or(Ended::Killed(9))
    }

    /// Sends a signal to its whole group, unless the child itself has been collected.
    pub fn signal_group(&self, signal: i32) -> nix::Result<()> {
        let children = self.reaper.lock();
        if !children.contains_key(&self.pid.as_raw()) {
            return Err(Errno::ESRCH);
        }
        ended::kill(-self.pid.as_raw(), signal)
    }
    /// Kills it and all that it has begun; without a cgroup of its own, its process group.
    pub fn kill_all(&self) -> io::Result<()> {
        if self.cgroup.as_ref().is_some_and(|cgroup| cgroup.kill().is_ok()) {
            return Ok(());
        }
        match self.signal_group(nix::libc::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}
