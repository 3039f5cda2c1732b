//! One session: the terminal, and its output until a client has acknowledged it. One task owns both.
//!
//! ```text
//! attached ◀─▶ waiting for a client ──60 s──▶ gone
//!     └─ the client closes it, or the sandbox ends ──▶ gone
//! ```

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use futures::{Sink, SinkExt, Stream, StreamExt, stream};
use heyvm_api::{
    client::Client,
    exec::{ClientControl, ExecRequest, FRAME_STDERR, FRAME_STDIN, FRAME_STDOUT, PtySize, STDIN_WINDOW, ServerControl},
};
use rand::RngCore;
use tokio::{
    sync::mpsc::{self, Receiver, Sender},
    time::Instant,
};
use tokio_tungstenite::tungstenite::{Error as WsError, Message};

use super::frames::{Answer, Fault, Init};

/// How long a session waits for its client to come back.
const GRACE: Duration = Duration::from_secs(60);
/// Output that is kept for a client that has not acknowledged it; then the command waits.
const MAX_KEPT: usize = 4 << 20;
/// What a frame costs beside its bytes.
const FRAME_COST: usize = 64;
/// Input that may wait for the command to read it.
const MAX_INPUT: usize = 4 << 20;
/// How long a shell may take to end after it is told that its terminal is gone.
const HANG_UP: Duration = Duration::from_secs(1);
const SIGHUP: i32 = 1;
/// A shell that prompts has done so by then; one that says nothing is as ready as it will be.
const FIRST_WORDS: Duration = Duration::from_secs(5);
/// The user's own shell, else the best there is. Found without starting a program: each costs a new machine a moment, and
/// somebody is waiting to type.
const SHELL: &str = r#"
shell=
while IFS=: read -r _ _ _ _ _ home own; do
    if [ "$home" = "$HOME" ]; then shell=$own; break; fi
done 2>/dev/null </etc/passwd
for each in "$shell" /bin/bash /bin/sh; do
    if [ -x "$each" ]; then SHELL=$each; export SHELL; exec "$each"; fi
done
echo 'there is no shell in this sandbox' >&2
exit 127"#;

/// Both directions of a daemon's exec.
pub struct Shell {
    to: Pin<Box<dyn Sink<Message, Error = WsError> + Send>>,
    from: Pin<Box<dyn Stream<Item = Result<Message, WsError>> + Send>>,
}

/// Starts a shell in a sandbox, and waits until it prompts: clients count the time from `ready` on.
pub async fn open(daemon: &Client, sandbox: &str, init: Init, size: PtySize) -> Result<Shell, Fault> {
    let mut socket = daemon.websocket(&format!("/sandboxes/{sandbox}/exec")).await?;
    let mut env = init.env.unwrap_or_default();
    env.entry("TERM".into()).or_insert_with(|| "xterm-256color".into());
    let request = ExecRequest {
        command: SHELL.into(),
        env,
        cwd: init.cwd,
        stdin: true,
        pty: Some(size),
        ..ExecRequest::default()
    };
    let request = serde_json::to_string(&request).unwrap_or_default();
    socket.send(Message::text(request)).await.map_err(|error| gone(&error.to_string()))?;
    let (to, mut from) = socket.split();
    let first = tokio::time::timeout(FIRST_WORDS, from.next()).await.ok().flatten();
    Ok(Shell { to: Box::pin(to), from: Box::pin(stream::iter(first).chain(from)) })
}

/// An id that nobody guesses.
pub fn new_id() -> String {
    let mut bytes = [0; 16];
    rand::rng().fill_bytes(&mut bytes);
    hex::encode(bytes)
}

fn gone(why: &str) -> Fault {
    Fault::new("sandbox_unreachable", format!("the sandbox's shell is gone: {why}"))
}

/// What connections tell their session. `from` is the connection's number.
pub enum Told {
    /// A connection wants the output, instead of whoever had it.
    Attach { size: Option<PtySize>, answers: Sender<Answer>, number: tokio::sync::oneshot::Sender<u64> },
    /// Bytes for the terminal.
    Input { from: u64, bytes: Bytes },
    /// The terminal has another size now.
    Resize { from: u64, size: PtySize },
    /// Output up to `seq` has come.
    Ack { from: u64, seq: u64 },
    /// The client wants no more of this session.
    Close { from: u64 },
    /// The connection is gone.
    Detach { from: u64 },
}

/// The way to a session.
#[derive(Clone)]
pub struct Handle {
    tell: Sender<Told>,
    ended: Arc<AtomicBool>,
}

impl Handle {
    /// Tells the session; whether it is still there.
    pub async fn tell(&self, told: Told) -> bool {
        self.tell.send(told).await.is_ok()
    }

    /// Whether its shell has ended.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }
}

struct Attached {
    number: u64,
    answers: Sender<Answer>,
    /// The next output it gets.
    next: u64,
}

/// What there is to say at the end.
#[derive(Clone)]
enum End {
    Exit(i32),
    Failed(Fault),
}

/// A session; see the module.
pub struct Session {
    id: String,
    shell: Shell,
    told: Receiver<Told>,
    attached: Option<Attached>,
    connections: u64,
    /// Output by number, without gaps; `first` is the number of the first.
    kept: VecDeque<Bytes>,
    first: u64,
    size: usize,
    input: VecDeque<Bytes>,
    waiting_input: usize,
    /// Input that the command has not taken yet.
    under_way: usize,
    /// Whether a client has changed the terminal's size. From then on the size in `init` says nothing: clients that come
    /// back repeat the one they began with.
    resized: bool,
    end: Option<End>,
    ended: Arc<AtomicBool>,
    deadline: Instant,
}

impl Session {
    /// A session around a shell, and the way to it.
    pub fn new(id: String, shell: Shell) -> (Handle, Self) {
        let (tell, told) = mpsc::channel(16);
        let ended = Arc::<AtomicBool>::default();
        let session = Self {
            id,
            shell,
            told,
            attached: None,
            connections: 0,
            kept: VecDeque::new(),
            first: 1,
            size: 0,
            input: VecDeque::new(),
            waiting_input: 0,
            under_way: 0,
            resized: false,
            end: None,
            ended: Arc::clone(&ended),
            deadline: Instant::now() + GRACE,
        };
        (Handle { tell, ended }, session)
    }

    /// Until its client has closed it, or nobody has come back in time. Going away ends the shell.
    pub async fn run(mut self) {
        loop {
            let turn = self.turn().await;
            match turn {
                Turn::Told(told) => {
                    if self.hear(told).await.is_break() {
                        return;
                    }
                }
                Turn::Shell(message) => self.heard_of_shell(message),
                Turn::Sent => {
                    if self.sent_last() {
                        return;
                    }
                }
                Turn::Input => self.pass_input().await,
                Turn::Nobody => return,
            }
        }
    }

    async fn turn(&mut self) -> Turn {
        let has_room = self.end.is_none() && self.size < MAX_KEPT;
        let may_write = self.end.is_none() && !self.input.is_empty() && self.under_way < STDIN_WINDOW;
        let answer = self.next_answer();
        let out = self.attached.as_ref().zip(answer);
        tokio::select! {
            told = self.told.recv() => told.map_or(Turn::Nobody, Turn::Told),
            sent = send(out) => match sent {
                true => Turn::Sent,
                false => Turn::Told(Told::Detach { from: self.connections }),
            },
            message = self.shell.from.next(), if has_room => Turn::Shell(message),
            () = std::future::ready(()), if may_write => Turn::Input,
            () = tokio::time::sleep_until(self.deadline), if self.attached.is_none() => Turn::Nobody,
        }
    }

    /// What the attached client gets next.
    fn next_answer(&self) -> Option<Answer> {
        let next = self.attached.as_ref()?.next;
        let index = usize::try_from(next.checked_sub(self.first)?).ok()?;
        match self.kept.get(index) {
            Some(bytes) => Some(Answer::Output { seq: next, bytes: bytes.clone() }),
            None => self.end.clone().map(|end| match end {
                End::Exit(code) => Answer::Exit { code },
                End::Failed(fault) => Answer::Error(fault),
            }),
        }
    }

    /// Counts what was sent; whether nothing more will ever be asked for.
    fn sent_last(&mut self) -> bool {
        let Some(attached) = &mut self.attached else { return false };
        if attached.next < self.first + self.kept.len() as u64 {
            attached.next += 1;
            return false;
        }
        // A client that was cut off before it heard the exit code comes back for it; an error is not worth that.
        self.attached = None;
        self.deadline = Instant::now() + GRACE;
        matches!(self.end, Some(End::Failed(_)))
    }

    async fn hear(&mut self, told: Told) -> std::ops::ControlFlow<()> {
        let attached = self.attached.as_ref().map(|attached| attached.number);
        match told {
            Told::Attach { size, answers, number } => self.attach(size, answers, number).await,
            Told::Detach { from } if attached == Some(from) => {
                self.attached = None;
                self.deadline = Instant::now() + GRACE;
            }
            Told::Input { from, bytes } if attached == Some(from) && self.end.is_none() => {
                self.waiting_input += bytes.len();
                self.input.push_back(bytes);
                if self.waiting_input > MAX_INPUT {
                    self.refuse(Fault::new(
                        "input_overflow",
                        "the command does not read its input; there are 4 MiB of it",
                    ));
                }
            }
            Told::Resize { from, size } if attached == Some(from) => {
                self.resized = true;
                self.resize(size).await;
            }
            Told::Ack { from, seq } if attached == Some(from) => self.acknowledge(seq),
            Told::Close { from } if attached == Some(from) => {
                self.close().await;
                return std::ops::ControlFlow::Break(());
            }
            // A connection that is not the session's any more.
            Told::Detach { .. } | Told::Input { .. } | Told::Resize { .. } | Told::Ack { .. } | Told::Close { .. } => {}
        }
        std::ops::ControlFlow::Continue(())
    }

    async fn attach(
        &mut self,
        size: Option<PtySize>,
        answers: Sender<Answer>,
        number: tokio::sync::oneshot::Sender<u64>,
    ) {
        self.refuse(Fault::new("session_taken", "another connection has taken this session over"));
        self.connections += 1;
        let last_seq = self.first + self.kept.len() as u64 - 1;
        // Its channel is new, and has room for one.
        answers.try_send(Answer::Ready { session_id: self.id.clone(), last_seq }).ok();
        number.send(self.connections).ok();
        self.attached = Some(Attached { number: self.connections, answers, next: self.first });
        if let Some(size) = size.filter(|_| !self.resized) {
            self.resize(size).await;
        }
    }

    /// Ends the connection, not the session.
    fn refuse(&mut self, why: Fault) {
        if let Some(attached) = self.attached.take() {
            // One that takes nothing will notice that its channel has ended.
            attached.answers.try_send(Answer::Error(why)).ok();
        }
        self.deadline = Instant::now() + GRACE;
    }

    fn acknowledge(&mut self, seq: u64) {
        // Nobody has seen what was not sent.
        let sent = self.attached.as_ref().map_or(self.first, |attached| attached.next);
        while self.first <= seq && self.first < sent {
            let Some(bytes) = self.kept.pop_front() else { return };
            self.size -= bytes.len() + FRAME_COST;
            self.first += 1;
        }
    }

    fn heard_of_shell(&mut self, message: Option<Result<Message, WsError>>) {
        match message {
            Some(Ok(Message::Binary(frame))) => {
                if let Some(&(FRAME_STDOUT | FRAME_STDERR)) = frame.first()
                    && frame.len() > 1
                {
                    self.size += frame.len() - 1 + FRAME_COST;
                    self.kept.push_back(frame.slice(1..));
                }
            }
            Some(Ok(Message::Text(text))) => match serde_json::from_str::<ServerControl>(text.as_str()) {
                Ok(ServerControl::StdinTaken { bytes }) => {
                    self.under_way = self.under_way.saturating_sub(usize::try_from(bytes).unwrap_or(usize::MAX));
                }
                Ok(ServerControl::Exit { exit_code, .. }) => self.end = Some(End::Exit(exit_code)),
                Ok(ServerControl::Error { error }) => self.end = Some(End::Failed(error.into())),
                Err(error) => self.end = Some(End::Failed(gone(&error.to_string()))),
            },
            Some(Ok(Message::Close(_))) | None => self.end = Some(End::Failed(gone("its connection has ended"))),
            Some(Ok(_)) => {}
            Some(Err(error)) => self.end = Some(End::Failed(gone(&error.to_string()))),
        }
        self.ended.store(self.end.is_some(), Ordering::Relaxed);
    }

    async fn pass_input(&mut self) {
        let Some(mut bytes) = self.input.pop_front() else { return };
        let rest = bytes.split_off(bytes.len().min(STDIN_WINDOW - self.under_way));
        if !rest.is_empty() {
            self.input.push_front(rest);
        }
        self.waiting_input -= bytes.len();
        self.under_way += bytes.len();
        let mut frame = BytesMut::with_capacity(1 + bytes.len());
        frame.put_u8(FRAME_STDIN);
        frame.put_slice(&bytes);
        // When this fails, the other direction tells why.
        self.shell.to.send(Message::Binary(frame.freeze())).await.ok();
    }

    async fn resize(&mut self, size: PtySize) {
        self.control(&ClientControl::Resize { cols: size.cols, rows: size.rows }).await;
    }

    async fn control(&mut self, said: &ClientControl) {
        self.shell.to.send(Message::text(serde_json::to_string(said).unwrap_or_default())).await.ok();
    }

    /// Hangs up, as a terminal does whose window is closed, and tells the client how the shell ended.
    async fn close(&mut self) {
        self.control(&ClientControl::Signal { signal: SIGHUP }).await;
        let ended = async {
            while self.end.is_none() {
                let message = self.shell.from.next().await;
                self.heard_of_shell(message);
                // Nobody wants it any more.
                self.kept.clear();
            }
        };
        tokio::time::timeout(HANG_UP, ended).await.ok();
        let code = match self.end {
            Some(End::Exit(code)) => code,
            _ => 128 + SIGHUP,
        };
        if let Some(attached) = &self.attached {
            tokio::time::timeout(HANG_UP, attached.answers.send(Answer::Exit { code })).await.ok();
        }
    }
}

enum Turn {
    Told(Told),
    Shell(Option<Result<Message, WsError>>),
    Sent,
    Input,
    Nobody,
}

/// Sends when there is something to send; whether it could be.
async fn send(out: Option<(&Attached, Answer)>) -> bool {
    match out {
        Some((attached, answer)) => attached.answers.send(answer).await.is_ok(),
        None => std::future::pending().await,
    }
}
