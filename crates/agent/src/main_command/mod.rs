//! The start command: one at a time, independent of any connection.
//!
//! ```text
//!        start            its end, output drained
//! none ────────▶ running ────────────────────────▶ ended(exit) ──start──▶ running …
//!                  │ output
//!                  ▼
//!                 ring ──▶ any number of watchers
//! ```

mod ring;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use heyvm_agent_protocol::{
    CHUNK,
    v1::{Exit, MainEvent, MainLog, main_event},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tonic::Status;

use crate::{
    exec::exit,
    oom::OomKills,
    process::{Child, Streams, streams::Output},
};
use ring::Ring;

/// Output that is kept for those who come late.
const CAPACITY: usize = 1 << 20;
/// How long output may keep coming after the command's own end, before the end is told.
const GRACE: Duration = Duration::from_millis(200);
/// Events that may wait for one watcher.
const QUEUE: usize = 2;

/// The start command of this sandbox.
pub struct MainCommand {
    state: Mutex<State>,
    /// Sees a change whenever there is something new for watchers.
    changed: watch::Sender<()>,
}

struct State {
    phase: Phase,
    /// What its first process is ended with.
    stops_by: Option<StopSignal>,
    output: Ring,
}

/// A process that another signal than SIGTERM ends in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopSignal {
    /// The process.
    pub pid: i32,
    /// The signal.
    pub signal: i32,
}

#[derive(Clone)]
enum Phase {
    None,
    Running,
    Ended(Exit),
}

impl Default for MainCommand {
    fn default() -> Self {
        let state = State { phase: Phase::None, stops_by: None, output: Ring::new(CAPACITY) };
        Self { state: Mutex::new(state), changed: watch::channel(()).0 }
    }
}

impl MainCommand {
    /// Starts it by `spawn` unless it runs, and follows it from then on; its process id.
    pub fn start<E: Into<Status>>(
        self: &Arc<Self>,
        oom_kills: &Arc<OomKills>,
        stop_signal: i32,
        spawn: impl FnOnce() -> Result<(Child, Streams), E>,
    ) -> Result<i32, Status> {
        // The state is not held meanwhile: its program may lie in a mount, and whoever watches must not wait for that.
        let before = {
            let mut state = self.lock();
            if matches!(state.phase, Phase::Running) {
                return Err(Status::already_exists("the start command is running"));
            }
            std::mem::replace(&mut state.phase, Phase::Running)
        };
        let (child, streams) = spawn().map_err(|error| {
            self.lock().phase = before;
            error.into()
        })?;
        let pid = child.pid.as_raw();
        self.lock().stops_by = (stop_signal != 0).then_some(StopSignal { pid, signal: stop_signal });
        tokio::spawn(Arc::clone(self).follow(child, streams, Arc::clone(oom_kills)));
        Ok(pid)
    }

    async fn follow(self: Arc<Self>, mut child: Child, mut streams: Streams, oom_kills: Arc<OomKills>) {
        let readers = [(false, streams.stdout.take()), (true, streams.stderr.take())];
        let readers: Vec<JoinHandle<()>> = readers
            .into_iter()
            .filter_map(|(stderr, output)| Some(tokio::spawn(Arc::clone(&self).keep(stderr, output?))))
            .collect();
        let ended = child.ended().await;
        // The readers go on for whoever still has the pipes: a daemon that the command has left behind.
        let drained = async {
            for reader in readers {
                reader.await.ok();
            }
        };
        tokio::time::timeout(GRACE, drained).await.ok();
        let mut state = self.lock();
        state.phase = Phase::Ended(exit(ended, false, &oom_kills));
        state.stops_by = None;
        drop(state);
        self.changed.send_replace(());
    }

    async fn keep(self: Arc<Self>, stderr: bool, output: Output) {
        while let Some(data) = output.read().await {
            self.lock().output.push(stderr, &data);
            self.changed.send_replace(());
        }
    }

    /// The process that is to be ended in another way than all others.
    pub fn stops_by(&self) -> Option<StopSignal> {
        self.lock().stops_by
    }

    /// What it has printed from `offset` on, then what it prints, then its end.
    pub fn watch(self: &Arc<Self>, offset: u64) -> Result<mpsc::Receiver<Result<MainEvent, Status>>, Status> {
        if matches!(self.lock().phase, Phase::None) {
            return Err(Status::not_found("no start command has been started"));
        }
        let (events, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(Arc::clone(self).tell(offset, events));
        Ok(receiver)
    }

    async fn tell(self: Arc<Self>, mut offset: u64, events: mpsc::Sender<Result<MainEvent, Status>>) {
        let mut changes = self.changed.subscribe();
        loop {
            changes.mark_unchanged();
            let Some(kind) = self.next(&mut offset) else {
                tokio::select! {
                    _ = changes.changed() => continue,
                    () = events.closed() => return,
                }
            };
            let last = matches!(kind, main_event::Kind::Exit(_));
            if events.send(Ok(MainEvent { kind: Some(kind) })).await.is_err() || last {
                return;
            }
        }
    }

    fn next(&self, offset: &mut u64) -> Option<main_event::Kind> {
        let state = self.lock();
        if let Some(piece) = state.output.read(*offset, CHUNK) {
            *offset = piece.offset + piece.data.len() as u64;
            let log = MainLog { offset: piece.offset, stderr: piece.stderr, data: piece.data };
            return Some(main_event::Kind::Log(log));
        }
        match &state.phase {
            Phase::Ended(exit) => Some(main_event::Kind::Exit(exit.clone())),
            Phase::None | Phase::Running => None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
