//! A running VM: watches its process, knows why it ended, ends it.
//!
//! ```text
//! guest ends ──▶ QEMU pauses ─┬▶ console is read ──▶ quit ─┐
//! guest stands still ─────────┘                            │
//! QEMU ends by itself ─────────────────────────────────────┴▶ exit.json, cgroup and slot given back ──▶ `exited`
//! ```

use std::{
    fs,
    panic::AssertUnwindSafe,
    sync::{Arc, OnceLock},
    time::Duration,
};

use async_trait::async_trait;
use futures::FutureExt;
use heyvm_agent_protocol::v1::{GrowDiskRequest, ShutdownRequest};
use heyvm_jail::{cgroup, process::ProcessId};
use tokio::{
    io::unix::AsyncFd,
    sync::{Notify, watch},
};
use tonic::Code;

use super::{
    blocking, console, disk,
    launch::end,
    qmp::{Ended, Qmp},
    record::{Place, Record, Slots},
    template::Template,
    vitals,
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
/// A sandbox that is live has this long for its first commands, which often load what later ones find loaded.
const UNTHROTTLED: Duration = Duration::from_secs(2);
/// A sandbox whose hooks take longer than this goes on with its quota.
const LONGEST_START: Duration = Duration::from_secs(60);
/// A file system grows by writing a few blocks for each 128 MiB.
const GROWING: Duration = Duration::from_secs(60);
/// A QEMU that did not answer is asked again after this.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// QEMU ends at once when told to; one that does not is killed.
const QUIT_DEADLINE: Duration = Duration::from_secs(3);

/// One QEMU, started by this daemon or an earlier one, under the name it has now.
pub struct RunningVm {
    id: VmId,
    watched: Arc<Watched>,
    stopping: OnceLock<()>,
    live: Arc<Notify>,
}

/// One QEMU that is watched to its end, whoever's it is.
pub struct Watched {
    /// Where its files are.
    pub place: Place,
    /// Its agent.
    pub agent: AgentConnection,
    process: ProcessId,
    qmp: Arc<Qmp>,
    record: Record,
    exit: watch::Receiver<Option<Exit>>,
}

/// What is given back when a VM has ended.
pub struct Belongings {
    /// For its slot.
    pub slots: Arc<Slots>,
    /// Its slot and its cgroups.
    pub record: Record,
    /// The template whose memory it runs on, where this daemon has that.
    pub template: Option<Template>,
}

impl Watched {
    /// Watches `process` from now on.
    pub fn new(place: Place, process: ProcessId, qmp: Qmp, belongings: Belongings) -> Arc<Self> {
        let agent = AgentConnection::new(place.clone());
        let (say, exit) = watch::channel(None);
        let qmp = Arc::new(qmp);
        let (watched, watched_place) = (
            Self {
                place: place.clone(),
                agent: agent.clone(),
                process,
                qmp: Arc::clone(&qmp),
                record: belongings.record.clone(),
                exit,
            },
            place.clone(),
        );
        tokio::spawn(async move {
            let exit = watch_to_the_end(&watched_place, &qmp, &agent, process).await;
            let Belongings { slots, record, template } = belongings;
            let given_back = blocking(move || {
                slots.give_back(record.slot, &record.cgroup);
                drop(template);
                Ok(place.dir().note_end(&record, exit))
            });
            let exit = given_back.await.unwrap_or_else(|_| Exit::lost());
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

    /// Halts the guest's processors: it costs memory alone until [`Self::unpause`].
    pub async fn pause(&self) -> Result<(), Error> {
        self.qmp.stop().await
    }

    /// Lets the guest go on.
    pub async fn unpause(&self) -> Result<(), Error> {
        self.qmp.cont().await
    }

    /// From now on its processor quota counts.
    async fn limit_processor(&self) {
        let Record { cgroups, cpu_millis, .. } = self.record.clone();
        if cpu_millis == 0 || !self.is_alive() {
            return;
        }
        if let Err(error) = blocking(move || Ok(cgroup::limit_processor(&cgroups, cpu_millis)?)).await {
            tracing::error!(%error, "a VM's processor quota could not be set");
        }
    }

    /// Ends it at once.
    pub async fn kill(&self) -> Result<(), Error> {
        let (process, dir) = (self.process, self.place.dir());
        blocking(move || end(process, &dir)).await?;
        self.exited().await;
        Ok(())
    }

    /// Its slot of the network addresses.
    pub fn slot(&self) -> u32 {
        self.record.slot
    }

    /// Whether its process has not ended.
    pub fn is_alive(&self) -> bool {
        self.exit.borrow().is_none()
    }
}

impl RunningVm {
    /// One that another daemon has started: it is live.
    pub fn adopted(id: VmId, watched: Arc<Watched>) -> Arc<Self> {
        let vm = Arc::clone(&watched);
        tokio::spawn(async move { vm.limit_processor().await });
        Self::new(id, watched)
    }

    /// One that has just been started. Its processor quota counts a moment after it is live, or is late to be.
    pub fn started(id: VmId, watched: Arc<Watched>) -> Arc<Self> {
        let (started, vm) = (Self::new(id, Arc::clone(&watched)), watched);
        let live = Arc::clone(&started.live);
        tokio::spawn(async move {
            if tokio::time::timeout(LONGEST_START, live.notified()).await.is_ok() {
                tokio::time::sleep(UNTHROTTLED).await;
            }
            vm.limit_processor().await;
        });
        started
    }

    /// `watched` under the name `id`; its clock is kept from now on.
    fn new(id: VmId, watched: Arc<Watched>) -> Arc<Self> {
        let kept = Arc::clone(&watched);
        tokio::spawn(async move {
            tokio::select! {
                () = clock::keep(kept.agent.clone()) => {}
                _ = kept.exited() => {}
            }
        });
        Arc::new(Self { id, watched, stopping: OnceLock::new(), live: Arc::default() })
    }

    /// Asks the guest to end. In a task of its own: whatever becomes of the call, it holds up nobody.
    fn ask_to_end(&self, grace: Duration) {
        let agent = self.watched.agent.clone();
        let asked = async move {
            let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
            if let Ok(mut client) = agent.client().await {
                // The guest may be gone before its answer is through.
                client.shutdown(ShutdownRequest { grace_ms }).await.ok();
            }
        };
        tokio::spawn(tokio::time::timeout(grace + SHUTDOWN_MARGIN, asked));
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

    fn live(&self) {
        self.live.notify_one();
    }

    async fn exited(&self) -> Exit {
        self.watched.exited().await
    }

    async fn stop(&self, grace: Duration) -> Result<(), Error> {
        // A second caller does not ask again.
        if self.stopping.set(()).is_ok() {
            self.ask_to_end(grace);
        }
        match tokio::time::timeout(grace + SHUTDOWN_MARGIN, self.exited()).await {
            Ok(_) => Ok(()),
            Err(_) => self.watched.kill().await,
        }
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
        blocking(move || usage(pid)).await
    }
}

/// Blocks: the kernel walks through all of the process's memory.
#[expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]
fn usage(pid: i32) -> Result<Usage, Error> {
    let read = |name: &str| {
        let path = format!("/proc/{pid}/{name}");
        fs::read_to_string(&path).map_err(Error::io("reading", path))
    };
    Ok(Usage { private_memory: private_memory(&read("smaps_rollup")?), cpu_ms: cpu_ms(&read("stat")?) })
}

/// Follows the process to its end. A panic on the way ends it, too: an unwatched VM would be nobody's.
async fn watch_to_the_end(place: &Place, qmp: &Qmp, agent: &AgentConnection, process: ProcessId) -> Exit {
    let watched = AssertUnwindSafe(watch(place, qmp, agent, process)).catch_unwind().await;
    if let Ok(exit) = watched {
        return exit;
    }
    tracing::error!("the watch over a VM panicked; the VM is terminated");
    end_by_force(process, place).await;
    Exit::lost()
}

/// Watches a process until it is known to have ended. A lost control connection or a failing system call ends no VM: it is
/// made again, or looked at again.
async fn watch(place: &Place, qmp: &Qmp, agent: &AgentConnection, process: ProcessId) -> Exit {
    let process_ended = process_has_ended(process);
    tokio::pin!(process_ended);
    let (mut renewed, mut pause) = (None, FIRST_PAUSE);
    let exit = loop {
        let guest = tokio::select! {
            () = &mut process_ended => return Exit::lost(),
            guest = guest_exit(renewed.as_ref().unwrap_or(qmp), agent) => guest,
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
    // From here on the reason is known: that the process ends now adds nothing to it.
    tokio::time::timeout(QUIT_DEADLINE, renewed.as_ref().unwrap_or(qmp).quit()).await.ok();
    if tokio::time::timeout(QUIT_DEADLINE, &mut process_ended).await.is_err() {
        end_by_force(process, place).await;
    }
    exit
}

async fn end_by_force(process: ProcessId, place: &Place) {
    let dir = place.dir();
    if let Err(error) = blocking(move || end(process, &dir)).await {
        tracing::error!(%error, "a VM's process could not be ended");
    }
}

/// Resolves when the process is known to have ended.
async fn process_has_ended(process: ProcessId) {
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

/// Why a guest whose QEMU still runs is at its end; `None` when QEMU has gone.
async fn guest_exit(qmp: &Qmp, agent: &AgentConnection) -> Option<Exit> {
    let ended = match ended_before_us(qmp).await? {
        Some(ended) => ended,
        None => tokio::select! {
            ended = qmp.guest_ended() => ended?,
            ended = vitals::stands_still(qmp, agent) => ended,
            () = agent.speaks_garbage() => {
                return Some(Exit { cause: ExitCause::AgentReplaced, console_tail: console::tail(qmp).await });
            }
        },
    };
    Some(console::judge(qmp, ended).await)
}

/// How the guest ended before the connection was made, if it did; `None` when QEMU has gone. A QEMU that only answers late
/// is asked again: its guest runs.
async fn ended_before_us(qmp: &Qmp) -> Option<Option<Ended>> {
    loop {
        match qmp.ended().await {
            Ok(ended) => return Some(ended),
            Err(_) if qmp.is_closed() => return None,
            Err(error) => tracing::warn!(%error, "QEMU does not say whether its guest runs"),
        }
        tokio::time::sleep(ASK_AGAIN).await;
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

    use std::{path::Path, process::Stdio};

    use heyvm_agent_protocol::v1::{MetricsRequest, WatchMainRequest};
    use heyvm_jail::cgroup::Cgroups;
    use heyvm_test_services::hostile_agent::{self, MISBEHAVIOURS, Misbehaviour};

    use super::super::record::VmDir;

    /// A QEMU without a guest, whose agent misbehaves.
    async fn possessed(home: &Path, how: Misbehaviour) -> (tokio::process::Child, Arc<RunningVm>) {
        let id = format!("{how:?}");
        let dir = VmDir::new(home, &id);
        dir.make(false).unwrap();
        let mut qemu = tokio::process::Command::new("qemu-system-x86_64");
        qemu.args(["-M", "none", "-nodefaults", "-nographic", "-chardev", "ringbuf,id=console", "-qmp"]);
        qemu.arg(format!("unix:{},server=on,wait=off", dir.qmp_socket().display()));
        let qemu = qemu.stdin(Stdio::null()).kill_on_drop(true).spawn().unwrap();
        let process = ProcessId::of(qemu.id().unwrap() as i32).unwrap();
        let qmp = loop {
            match Qmp::connect(&dir.qmp_socket()).await {
                Ok(qmp) => break qmp,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        let (socket, bound) = (dir.agent_socket(), dir.agent_socket());
        tokio::spawn(async move { hostile_agent::serve(&socket, how).await });
        while !bound.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let belongings = Belongings {
            slots: Arc::default(),
            record: Record::new(0, &id, &Cgroups::default(), 0).unwrap(),
            template: None,
        };
        (qemu, RunningVm::adopted(id, Watched::new(Place::new(dir), process, qmp, belongings)))
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn stop_ends_a_vm_whatever_its_agent_does() {
        let home = tempfile::tempdir().unwrap();
        let stopping = MISBEHAVIOURS.map(async |how| {
            let (mut qemu, vm) = possessed(home.path(), how).await;
            // Twice at the same time: neither waits for the other without end.
            let (first, second) = tokio::join!(vm.stop(Duration::ZERO), vm.stop(Duration::ZERO));
            assert!(first.is_ok() && second.is_ok(), "{how:?}");
            qemu.wait().await.unwrap();
        });
        futures::future::join_all(stopping).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn hostile_status_is_an_error_and_no_panic() {
        let home = tempfile::tempdir().unwrap();
        for how in [Misbehaviour::InvalidDetails, Misbehaviour::InvalidDetailsInTrailers] {
            let (_qemu, vm) = possessed(home.path(), how).await;
            let mut client = vm.agent().client().await.unwrap();
            let status = client.metrics(MetricsRequest {}).await.unwrap_err();
            assert_eq!((status.code(), status.message()), (Code::Internal, "no"), "{how:?}");
            let events = client.watch_main(WatchMainRequest::default()).await;
            let ended = match events {
                Ok(events) => events.into_inner().message().await.map(drop),
                Err(status) => Err(status),
            };
            assert_eq!(ended.unwrap_err().code(), Code::Internal, "{how:?}");
            assert!(vm.watched.is_alive());
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn endless_garbage_ends_the_vm_with_its_reason() {
        let home = tempfile::tempdir().unwrap();
        let (mut qemu, vm) = possessed(home.path(), Misbehaviour::Garbage).await;
        let mut client = vm.agent().client().await.unwrap();
        let exit = tokio::select! {
            exit = vm.exited() => exit,
            () = async { loop { assert!(client.metrics(MetricsRequest {}).await.is_err()) } } => unreachable!(),
        };
        assert_eq!(exit.cause, ExitCause::AgentReplaced);
        qemu.wait().await.unwrap();
    }

    #[test]
    fn costs_are_read() {
        assert_eq!(private_memory("Rss: 9 kB\nPrivate_Dirty: 6 kB\nAnonymous: 5 kB\n"), 5 * 1024);
        assert_eq!(cpu_ms("7 (a b) S 1 1 1 0 -1 0 0 0 0 0 12 30 0 0 20 0"), 420);
    }
}
