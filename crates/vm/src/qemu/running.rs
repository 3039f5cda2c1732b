//! A running VM: watches its process, knows why it ended, ends it.
//!
//! ```text
//! guest ends ──▶ QEMU pauses ──▶ console is read ──▶ quit ─┐
//! QEMU ends by itself ─────────────────────────────────────┴▶ exit.json, cgroup and slot given back ──▶ `exited`
//! ```

use std::{
    fs,
    sync::{Arc, OnceLock},
    time::Duration,
};

use async_trait::async_trait;
use heyvm_agent_protocol::v1::{GrowDiskRequest, ShutdownRequest};
use heyvm_jail::{cgroup, process::ProcessId};
use tokio::{io::unix::AsyncFd, sync::watch};
use tonic::Code;

use super::{
    blocking, console, disk,
    qmp::{GuestState, Qmp},
    record::{Place, Record, Slots},
};
use crate::{
    AgentConnection, Error, Exit, ExitCause, Usage, Vm, VmId,
    agent::{told, unreachable_agent},
    clock,
};

/// What the agent needs beyond the grace it was given, to unmount and power off.
const SHUTDOWN_MARGIN: Duration = Duration::from_secs(10);
/// First and longest pause before what could not be found out about a process is looked at again.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A file system grows by writing a few blocks for each 128 MiB.
const GROWING: Duration = Duration::from_secs(60);
/// QEMU ends at once when told to; one that does not is killed.
const QUIT_DEADLINE: Duration = Duration::from_secs(3);

/// One QEMU, started by this daemon or an earlier one, under the name it has now.
pub struct RunningVm {
    id: VmId,
    watched: Arc<Watched>,
    stopping: OnceLock<()>,
}

/// One QEMU that is watched to its end, whoever's it is.
pub struct Watched {
    /// Where its files are.
    pub place: Place,
    /// Its agent.
    pub agent: AgentConnection,
    process: ProcessId,
    qmp: Arc<Qmp>,
    exit: watch::Receiver<Option<Exit>>,
}

/// What is given back when a VM has ended.
pub struct Belongings {
    /// For its slot.
    pub slots: Arc<Slots>,
    /// Its slot and its cgroups.
    pub record: Record,
}

impl Watched {
    /// Watches `process` from now on.
    pub fn new(place: Place, process: ProcessId, qmp: Qmp, belongings: Belongings) -> Arc<Self> {
        let agent = AgentConnection::new(place.clone());
        let (say, exit) = watch::channel(None);
        let qmp = Arc::new(qmp);
        let (watched, watched_place) =
            (Self { place: place.clone(), agent, process, qmp: Arc::clone(&qmp), exit }, place.clone());
        tokio::spawn(async move {
            let mut exit = watch_to_the_end(&watched_place, &qmp, process).await;
            let Belongings { slots, record } = belongings;
            if exit.cause == ExitCause::Lost && cgroup::ran_out_of_memory(&record.cgroups) {
                exit.cause = ExitCause::OutOfMemory;
            }
            slots.give_back(record.slot, &record.cgroup);
            let _ = tokio::task::spawn_blocking(move || cgroup::remove(&record.cgroups)).await;
            // Gone with its directory where it was destroyed.
            let _ = place.dir().write_exit(&exit);
            say.send_replace(Some(exit));
        });
        Arc::new(watched)
    }

    /// Resolves when the process has ended.
    pub async fn exited(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.clone().unwrap_or_else(Exit::lost),
            Err(_) => Exit::lost(),
        }
    }

    /// Ends it at once.
    pub async fn kill(&self) -> Result<(), Error> {
        let (process, path) = (self.process, self.place.dir().path().to_owned());
        blocking(move || process.kill().map_err(Error::io("ending QEMU in", path))).await?;
        self.exited().await;
        Ok(())
    }

    /// Whether its process has not ended.
    pub fn is_alive(&self) -> bool {
        self.exit.borrow().is_none()
    }
}

impl RunningVm {
    /// `watched` under the name `id`; its clock is kept from now on.
    pub fn new(id: VmId, watched: Arc<Watched>) -> Arc<Self> {
        let kept = Arc::clone(&watched);
        tokio::spawn(async move {
            tokio::select! {
                () = clock::keep(kept.agent.clone()) => {}
                _ = kept.exited() => {}
            }
        });
        Arc::new(Self { id, watched, stopping: OnceLock::new() })
    }

    /// Asks the guest to end; whether it did so in time.
    async fn end_in_order(&self, grace: Duration) -> bool {
        let asked = async {
            let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
            let mut client = self.watched.agent.client().await?;
            // The guest may be gone before its answer is through.
            let _ = client.shutdown(ShutdownRequest { grace_ms }).await;
            self.exited().await;
            Ok::<(), Error>(())
        };
        tokio::time::timeout(grace + SHUTDOWN_MARGIN, asked).await.is_ok_and(|ended| ended.is_ok())
    }
}

#[async_trait]
impl Vm for RunningVm {
    fn id(&self) -> &VmId {
        &self.id
    }

    fn agent(&self) -> AgentConnection {
        self.watched.agent.clone()
    }

    async fn exited(&self) -> Exit {
        self.watched.exited().await
    }

    async fn stop(&self, grace: Duration) -> Result<(), Error> {
        // A second caller does not ask again, it waits for the first one's outcome.
        let first = self.stopping.set(()).is_ok();
        if first && !self.end_in_order(grace).await {
            self.watched.kill().await?;
        }
        self.exited().await;
        Ok(())
    }

    async fn grow_disk(&self, gib: u32) -> Result<(), Error> {
        let bytes = u64::from(gib) * disk::GIB;
        self.watched.qmp.grow_disk(bytes).await?;
        let mut client = self.watched.agent.client().await?;
        let grown = tokio::time::timeout(GROWING, client.grow_disk(GrowDiskRequest { bytes })).await;
        let grown = grown.map_err(|_| Error::Unreachable("its file system did not grow in time".into()))?;
        grown.map(drop).map_err(|status| match status.code() {
            // Its kernel did not do it.
            Code::Internal => Error::NotGrown(told(&status)),
            _ => unreachable_agent(&status),
        })
    }

    async fn usage(&self) -> Result<Usage, Error> {
        let pid = self.watched.process.pid;
        let read = |name: &str| {
            let path = format!("/proc/{pid}/{name}");
            fs::read_to_string(&path).map_err(Error::io("reading", path))
        };
        Ok(Usage { private_memory: private_memory(&read("smaps_rollup")?), cpu_ms: cpu_ms(&read("stat")?) })
    }
}

/// Watches a process until it is known to have ended. A lost control connection or a failing system call ends no VM: it is
/// made again, or looked at again.
async fn watch_to_the_end(place: &Place, qmp: &Qmp, process: ProcessId) -> Exit {
    let process_ended = ended(process);
    tokio::pin!(process_ended);
    let (mut renewed, mut pause) = (None, FIRST_PAUSE);
    let exit = loop {
        let guest = tokio::select! {
            () = &mut process_ended => return Exit::lost(),
            guest = guest_ended(renewed.as_ref().unwrap_or(qmp)) => guest,
        };
        if let Some(exit) = guest {
            break exit;
        }
        // QEMU closes the connection as it ends.
        if tokio::time::timeout(pause, &mut process_ended).await.is_ok() {
            return Exit::lost();
        }
        tracing::warn!(pid = process.pid, "the control connection to a VM is lost, and made again");
        pause = (pause * 2).min(LONGEST_PAUSE);
        renewed = Qmp::connect(&place.dir().qmp_socket()).await.ok();
    };
    if tokio::time::timeout(QUIT_DEADLINE, &mut process_ended).await.is_err() {
        let _ = tokio::task::spawn_blocking(move || process.kill()).await;
    }
    exit
}

/// How the guest ended, when QEMU says that it has; `None` when QEMU says nothing any more.
async fn guest_ended(qmp: &Qmp) -> Option<Exit> {
    // The end may have come before the connection did.
    if !qmp.has_ended().await.ok()? && qmp.guest_ended().await == GuestState::Disconnected {
        return None;
    }
    let exit = console::judge(qmp).await;
    let _ = qmp.quit().await;
    Some(exit)
}

/// Resolves when the process is known to have ended.
async fn ended(process: ProcessId) {
    loop {
        let failed = match process.open() {
            Ok(None) => return,
            // SAFETY: the AsyncFd owns the descriptor, which is open until both are dropped together.
            Ok(Some(handle)) => match unsafe { AsyncFd::register(handle.into_fd()) } {
                Ok(ended) => match ended.readable().await {
                    Ok(_) => return,
                    Err(error) => error,
                },
                Err(error) => error.into(),
            },
            Err(error) => error,
        };
        tracing::warn!(error = %failed, pid = process.pid, "a VM's process cannot be watched now");
        tokio::time::sleep(FIRST_PAUSE).await;
    }
}

/// Bytes, from `/proc/PID/smaps_rollup`. What counts is what no file stands behind: a template's memory and QEMU's
/// program are there once for all, even while one VM alone happens to have a page of them mapped.
fn private_memory(rollup: &str) -> u64 {
    let kib = |line: &str| line.split_ascii_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok());
    rollup.lines().find(|line| line.starts_with("Anonymous:")).and_then(kib).unwrap_or(0) * 1024
}

/// Milliseconds, from fields 14 and 15 of `/proc/PID/stat` (in hundredths of a second on every Linux there is).
fn cpu_ms(stat: &str) -> u64 {
    let Some((_, rest)) = stat.rsplit_once(')') else { return 0 };
    rest.split_ascii_whitespace().skip(11).take(2).filter_map(|n| n.parse::<u64>().ok()).sum::<u64>() * 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_are_read() {
        assert_eq!(private_memory("Rss: 9 kB\nPrivate_Dirty: 6 kB\nAnonymous: 5 kB\n"), 5 * 1024);
        assert_eq!(cpu_ms("7 (a b) S 1 1 1 0 -1 0 0 0 0 0 12 30 0 0 20 0"), 420);
    }
}
