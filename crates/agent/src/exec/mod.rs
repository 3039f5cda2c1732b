//! One command at the host's call: its input, its output and its end, over one stream.
//!
//! ```text
//! host ──ExecInput──▶ Run ──pipes──▶ process group, in a cgroup of its own
//!      ◀─ExecOutput──     (waits while the host does not take what is there)
//! ```
//! When the host lets go of the stream, or its time is up, everything in the cgroup is killed. A [`detached`] command
//! belongs to no stream.

pub mod session;

use std::{io, sync::Arc, time::Duration};

use heyvm_agent_protocol::v1::{ExecInput, ExecOutput, ExecStarted, Exit, exec_input, exec_output};
use tokio::{sync::mpsc, time::Instant};
use tonic::{Status, Streaming};

use crate::{
    console,
    oom::OomKills,
    process::{
        Child, Ended, Streams,
        streams::{Input, Output, Unread},
        terminal,
    },
};
use session::Session;

/// Messages that may wait for the host.
pub const QUEUE: usize = 2;
/// What a process leaves in its pipes, or a grandchild still writes, is waited for this long after its end.
const GRACE: Duration = Duration::from_millis(100);
/// And no more than this is taken then.
const MAX_AFTERMATH: usize = 1 << 20;
/// Input that the process has not read yet; beyond it the host has to wait. A host that goes by `stdin_taken` stays
/// within it, so that what it says besides is always heard.
const MAX_INPUT: usize = 256 << 10;
/// The host hears of input that was taken once it is this much.
const WORTH_TELLING: u64 = 64 << 10;
/// Control-D: what ends the input of a terminal.
const END_OF_TRANSMISSION: u8 = 4;

/// A message to the host.
pub type Reply = Result<ExecOutput, Status>;

/// A command that runs.
pub struct Run {
    /// The process.
    pub child: Child,
    /// Its pipes.
    pub streams: Streams,
    /// To the host.
    pub replies: mpsc::Sender<Reply>,
    /// From the host.
    pub requests: Streaming<ExecInput>,
    /// When it is killed.
    pub deadline: Option<Instant>,
    /// To tell whether the kernel ran out of memory.
    pub oom_kills: Arc<OomKills>,
}

/// What the host's side of a run has come to.
#[derive(Default)]
struct Host {
    /// Output on its way.
    outgoing: Option<exec_output::Kind>,
    /// Input on its way.
    incoming: Vec<u8>,
    /// Bytes of input that have come and of which `stdin_taken` has not told.
    untold: u64,
    /// No more requests will come.
    silent: bool,
    /// Its input ends once `incoming` is through.
    closing: bool,
    /// Bytes of input that were written to the process.
    written: u64,
    /// Where its input was closed: what is left in the pipe.
    closed: Option<Unread>,
    /// Where the process closed its input: what was left in the pipe.
    lost: u64,
}

impl Host {
    /// How much input has been taken, where that is worth telling.
    fn taken(&mut self) -> Option<u64> {
        let taken = self.untold.saturating_sub(self.incoming.len() as u64);
        if taken < WORTH_TELLING {
            return None;
        }
        self.untold -= taken;
        Some(taken)
    }

    /// Bytes of input that the process has read.
    fn read(&self, input: Option<&Input>) -> u64 {
        let closed = self.closed.as_ref().map_or(0, Unread::bytes);
        self.written.saturating_sub(self.lost + closed + input.map_or(0, Input::unread))
    }
}

/// How a run came to its end.
enum Finish {
    Ended(Ended),
    TimedOut,
    HostGone,
}

impl Run {
    /// Runs to the end and says so to the host; what a session's shell has reported goes to `keep` before.
    pub async fn finish(mut self, keep: impl FnOnce(Session)) {
        let mut report = self.streams.report.take().map(|pipe| tokio::spawn(collect(pipe)));
        let mut host = Host::default();
        self.reply(exec_output::Kind::Started(ExecStarted { pid: self.child.pid.as_raw() })).await;
        let (ended, timed_out) = match self.attend(&mut host).await {
            Finish::Ended(ended) => (ended, false),
            Finish::TimedOut => {
                self.kill();
                (self.child.ended().await, true)
            }
            Finish::HostGone => {
                self.kill();
                return;
            }
        };
        if let Some(kind) = host.outgoing.take() {
            self.reply(kind).await;
        }
        self.aftermath().await;
        if let Some(report) = &mut report
            && let Ok(Ok(Some(session))) = tokio::time::timeout(GRACE, report).await
        {
            keep(session);
        }
        let stdin_read = host.read(self.streams.input.as_ref());
        let exit = Exit { stdin_read, ..exit(ended, timed_out, &self.oom_kills) };
        self.reply(exec_output::Kind::Exit(exit)).await;
    }

    /// Carries bytes both ways until the process ends, its time is up or the host is gone.
    async fn attend(&mut self, host: &mut Host) -> Finish {
        let expiry = at(self.deadline);
        tokio::pin!(expiry);
        let Self { child, streams, replies, requests, .. } = self;
        loop {
            if host.outgoing.is_none() {
                host.outgoing = host.taken().map(exec_output::Kind::StdinTaken);
            }
            let room = host.outgoing.is_none();
            let (stdout, stderr) = (streams.stdout.as_ref().filter(|_| room), streams.stderr.as_ref().filter(|_| room));
            let input = streams.input.as_ref().filter(|_| !host.incoming.is_empty());
            let listening = !host.silent && host.incoming.len() <= MAX_INPUT;
            // What must not wait behind a flood of output comes first.
            tokio::select! {
                biased;
                () = replies.closed() => return Finish::HostGone,
                () = &mut expiry => return Finish::TimedOut,
                request = requests.message(), if listening => match request {
                    Ok(Some(ExecInput { kind: Some(kind) })) => obey(kind, child, streams, host),
                    Ok(Some(ExecInput { kind: None })) => {}
                    Ok(None) | Err(_) => (host.silent, host.closing) = (true, true),
                },
                ended = child.ended() => return Finish::Ended(ended),
                permit = replies.reserve(), if !room => match (permit, host.outgoing.take()) {
                    (Ok(permit), Some(kind)) => permit.send(Ok(ExecOutput { kind: Some(kind) })),
                    _ => return Finish::HostGone,
                },
                data = read(stdout) => match data {
                    Some(data) => host.outgoing = Some(exec_output::Kind::Stdout(data)),
                    None => streams.stdout = None,
                },
                data = read(stderr) => match data {
                    Some(data) => host.outgoing = Some(exec_output::Kind::Stderr(data)),
                    None => streams.stderr = None,
                },
                written = write(input, &host.incoming) => match written {
                    Ok(length) => {
                        host.written += length as u64;
                        host.incoming.drain(..length);
                    }
                    Err(_) => host.lost = streams.input.take().map_or(0, |input| input.unread()),
                },
            }
            if streams.input.is_none() {
                host.incoming.clear();
            } else if host.closing && host.incoming.is_empty() {
                close_input(streams, host);
            }
        }
    }

    /// Delivers what is left in the pipes, but does not wait for a grandchild that keeps them open.
    async fn aftermath(&mut self) {
        let give_up = Instant::now() + GRACE;
        let mut taken = 0;
        let (mut stdout, mut stderr) = (self.streams.stdout.take(), self.streams.stderr.take());
        while taken < MAX_AFTERMATH && (stdout.is_some() || stderr.is_some()) {
            let kind = tokio::select! {
                biased;
                data = read(stdout.as_ref()) => match data {
                    Some(data) => { taken += data.len(); exec_output::Kind::Stdout(data) }
                    None => { stdout = None; continue }
                },
                data = read(stderr.as_ref()) => match data {
                    Some(data) => { taken += data.len(); exec_output::Kind::Stderr(data) }
                    None => { stderr = None; continue }
                },
                () = tokio::time::sleep_until(give_up) => break,
            };
            self.reply(kind).await;
        }
        // Somebody in the background still has it: he is not to die of a broken pipe.
        for pipe in [stdout, stderr].into_iter().flatten() {
            tokio::spawn(async move { while pipe.read().await.is_some() {} });
        }
    }

    async fn reply(&self, kind: exec_output::Kind) {
        // A host that is gone is noticed where the process is attended to.
        self.replies.send(Ok(ExecOutput { kind: Some(kind) })).await.ok();
    }

    fn kill(&self) {
        end_all(&self.child);
    }
}

fn end_all(child: &Child) {
    if let Err(error) = child.kill_all() {
        console::say(format_args!("could not kill command {}: {error}", child.pid));
    }
}

/// Waits for a command that no host attends to; its time-out holds all the same.
pub async fn detached(mut child: Child, deadline: Option<Instant>) {
    tokio::select! {
        _ = child.ended() => return,
        () = at(deadline) => {}
    }
    end_all(&child);
    child.ended().await;
}

/// The last message about a process.
pub fn exit(ended: Ended, timed_out: bool, oom_kills: &OomKills) -> Exit {
    // A shell tells of a killed command in its own exit code.
    let killed = ended.code() == 128 + nix::libc::SIGKILL;
    Exit {
        code: if timed_out { 124 } else { ended.code() },
        signal: ended.signal(),
        timed_out,
        oom_killed: killed && !timed_out && oom_kills.grew(),
        error: String::new(),
        stdin_read: 0,
    }
}

/// Does what a request asks.
fn obey(kind: exec_input::Kind, child: &Child, streams: &Streams, host: &mut Host) {
    match kind {
        exec_input::Kind::Stdin(data) => {
            host.untold += data.len() as u64;
            if streams.input.is_some() && !host.closing {
                host.incoming.extend_from_slice(&data);
            }
        }
        exec_input::Kind::StdinClose(_) => host.closing = true,
        exec_input::Kind::Signal(signal) => {
            // An impossible number, or a process that has just ended: nothing to tell anybody.
            child.signal_group(signal).ok();
        }
        exec_input::Kind::Resize(size) => {
            if let Some(terminal) = &streams.terminal {
                terminal::resize(terminal, &size).ok();
            }
        }
        exec_input::Kind::Start(_) => {}
    }
}

fn close_input(streams: &mut Streams, host: &mut Host) {
    match streams.input.take() {
        Some(input @ Input::Terminal(_)) if !host.silent => {
            host.incoming.push(END_OF_TRANSMISSION);
            host.closing = false;
            streams.input = Some(input);
        }
        // The host will say no more, but the terminal stays open: that would hang up on its programs.
        Some(input @ Input::Terminal(_)) => {
            host.closing = false;
            streams.input = Some(input);
        }
        Some(input) => host.closed = input.close(),
        None => {}
    }
}

async fn read(output: Option<&Output>) -> Option<Vec<u8>> {
    match output {
        Some(output) => output.read().await,
        None => std::future::pending().await,
    }
}

async fn write(input: Option<&Input>, data: &[u8]) -> io::Result<usize> {
    match input {
        Some(input) => input.write(data).await,
        None => std::future::pending().await,
    }
}

async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Reads a report to its end.
async fn collect(pipe: Output) -> Option<Session> {
    let mut report = Vec::new();
    while let Some(data) = pipe.read().await {
        report.extend_from_slice(&data);
        if report.len() > session::MAX_REPORT {
            return None;
        }
    }
    Session::parse(&report)
}
