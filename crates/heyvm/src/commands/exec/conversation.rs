//! What is said to the daemon, and what it answers, while a command runs.
//!
//! ```text
//! standard input ─▶ outgoing (a task: never keeps us from reading) ─▶ WebSocket ─▶ daemon
//! signals ────────▶    ↑ first                                        WebSocket ─▶ output
//! ```
//! No more input is under way than the command's end is sure to have room for ([`STDIN_WINDOW`]), so that signals
//! overtake what nobody reads.

use std::{
    future::Future,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{Sink, SinkExt, Stream, StreamExt};
use heyvm_api::{
    ApiError, ErrorCode,
    exec::{ClientControl, ExecRequest, FRAME_STDERR, FRAME_STDIN, FRAME_STDOUT, STDIN_WINDOW, ServerControl},
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{Semaphore, mpsc},
};
use tokio_tungstenite::tungstenite::{Error as WebSocketError, Message};

use super::{stdin, terminal};

/// A command that was asked to end (SIGTERM, SIGHUP), and its sandbox, have this long to do so; then we end.
const FAREWELL: Duration = Duration::from_secs(5);
/// A second interrupt within this gives up waiting.
const IMPATIENCE: Duration = Duration::from_secs(1);
/// A command that does not live to see its signal keeps no more than these waiting.
const SIGNALS_WAITING: usize = 16;

/// How a command ended.
#[derive(Debug, PartialEq, Eq)]
pub struct End {
    /// Its exit status.
    pub exit_code: i32,
    /// Whether the time-out ended it.
    pub timed_out: bool,
    /// Why it could not be started.
    pub message: Option<String>,
    /// Bytes of standard input that it has read, where that is known.
    pub stdin_read: Option<u64>,
}

/// Where its output goes.
pub trait Output {
    /// A piece of its standard output.
    fn stdout(&mut self, data: &[u8]) -> impl Future<Output = io::Result<()>>;
    /// A piece of its standard error.
    fn stderr(&mut self, data: &[u8]) -> impl Future<Output = io::Result<()>>;
}

/// Why a conversation ended before the command did.
#[derive(Debug)]
pub enum Broken {
    /// Nobody reads our output any more.
    OutputClosed,
    /// Anything else.
    Failed(ApiError),
}

impl From<Broken> for ApiError {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Failed(error) => error,
            Broken::OutputClosed => cannot_keep(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

/// The output has nowhere to go.
pub fn cannot_keep(error: io::Error) -> ApiError {
    ApiError::new(ErrorCode::OutOfResources, format!("the command's output cannot be kept: {error}"))
        .hint("make room where standard output goes, and in the directory for temporary files (TMPDIR)")
}

/// Starts the command and stays with it to its end. Two interrupts in a row end the wait, and with it the command; so
/// does a request to end that it has not followed within [`FAREWELL`], and `silence`: a daemon that does not answer.
pub async fn hold<S>(
    socket: S,
    request: ExecRequest,
    output: &mut impl Output,
    silence: impl Future<Output = ApiError>,
) -> Result<End, Broken>
where
    S: Sink<Message, Error = WebSocketError> + Stream<Item = Result<Message, WebSocketError>> + Send + 'static,
{
    let (outgoing, mut incoming) = socket.split();
    let text = serde_json::to_string(&request).unwrap_or_default();
    let mut signals = Signals::catch(request.pty.is_some())?;
    let (controls, waiting) = mpsc::channel(SIGNALS_WAITING);
    let source = request.stdin.then(stdin::Source::open);
    let input = source.as_ref().map(stdin::Source::read);
    let window = Arc::new(Semaphore::new(STDIN_WINDOW));
    let sending = tokio::spawn(send(outgoing, text, waiting, input, Arc::clone(&window)));
    // Output that nobody takes holds up what comes in, but not the signals.
    let listening = listen(&mut incoming, output, &window);
    tokio::pin!(listening, silence);
    let end = loop {
        tokio::select! {
            end = &mut listening => break end,
            error = &mut silence => break Err(Broken::Failed(error)),
            heard = signals.next() => match heard {
                Heard::Control(control) => drop(controls.try_send(control)),
                Heard::GiveUp(exit_code) => break Ok(End { exit_code, timed_out: false, message: None, stdin_read: None }),
            },
        }
    };
    sending.abort();
    if let (Some(source), Ok(End { stdin_read: Some(bytes), .. })) = (&source, &end) {
        source.give_back(*bytes);
    }
    end
}

async fn listen<S>(socket: &mut S, output: &mut impl Output, window: &Semaphore) -> Result<End, Broken>
where
    S: Stream<Item = Result<Message, WebSocketError>> + Unpin,
{
    while let Some(message) = socket.next().await {
        if let Some(end) = hear(message.map_err(gone)?, output, window).await? {
            return Ok(end);
        }
    }
    Err(Broken::Failed(
        ApiError::new(ErrorCode::SandboxUnreachable, "the connection ended before the command did")
            .hint("heyvm get NAME says whether the sandbox still runs"),
    ))
}

/// Sends signals before input, and input as there is room for it, until it ends.
async fn send<S>(
    mut socket: S,
    request: String,
    mut controls: mpsc::Receiver<ClientControl>,
    mut input: Option<mpsc::Receiver<Bytes>>,
    window: Arc<Semaphore>,
) where
    S: Sink<Message, Error = WebSocketError> + Unpin,
{
    // A connection that takes nothing shows where the answers do not come.
    if socket.send(Message::text(request)).await.is_err() {
        return;
    }
    loop {
        let next_input = async {
            match &mut input {
                Some(input) => next_piece(input, &window).await,
                None => std::future::pending().await,
            }
        };
        let message = tokio::select! {
            biased;
            control = controls.recv() => match control {
                Some(control) => control_message(&control),
                None => return,
            },
            piece = next_input => match piece {
                Some(piece) => Message::binary([&[FRAME_STDIN], &piece[..]].concat()),
                None => {
                    input = None;
                    control_message(&ClientControl::StdinClose)
                }
            },
        };
        // A command that has ended takes no more, and its end is on its way to us.
        if socket.send(message).await.is_err() {
            return;
        }
    }
}

/// The next piece of input, once there is room for it. Given up while it waits, it has taken nothing.
async fn next_piece(input: &mut mpsc::Receiver<Bytes>, window: &Semaphore) -> Option<Bytes> {
    let mut room = window.acquire_many(stdin::BLOCK as u32).await.ok()?;
    let piece = input.recv().await?;
    // It comes back as `stdin_taken`; what the piece did not need, now.
    if let Some(used) = room.split(piece.len()) {
        used.forget();
    }
    Some(piece)
}

fn control_message(control: &ClientControl) -> Message {
    Message::text(serde_json::to_string(control).unwrap_or_default())
}

fn gone(error: WebSocketError) -> Broken {
    let error = ApiError::new(ErrorCode::DaemonUnavailable, format!("the connection to the daemon broke: {error}"))
        .hint("run the command again; heyvm daemon status tells whether the daemon runs");
    Broken::Failed(error)
}

async fn hear(message: Message, output: &mut impl Output, window: &Semaphore) -> Result<Option<End>, Broken> {
    let written = match &message {
        Message::Binary(data) => match data.split_first() {
            Some((&FRAME_STDOUT, data)) => output.stdout(data).await,
            Some((&FRAME_STDERR, data)) => output.stderr(data).await,
            _ => Ok(()),
        },
        Message::Text(text) => match serde_json::from_str(text) {
            Ok(ServerControl::Exit { exit_code, timed_out, message, stdin_read }) => {
                return Ok(Some(End { exit_code, timed_out, message, stdin_read }));
            }
            Ok(ServerControl::StdinTaken { bytes }) => {
                window.add_permits(usize::try_from(bytes).unwrap_or(STDIN_WINDOW).min(STDIN_WINDOW));
                Ok(())
            }
            Ok(ServerControl::Error { error }) => return Err(Broken::Failed(error)),
            // A newer server may say more than we know of.
            Err(_) => Ok(()),
        },
        _ => Ok(()),
    };
    match written {
        Ok(()) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Broken::OutputClosed),
        Err(error) => Err(Broken::Failed(cannot_keep(error))),
    }
}

enum Heard {
    Control(ClientControl),
    GiveUp(i32),
}

/// Signals that are the command's rather than ours.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
    resize: Signal,
    has_terminal: bool,
    last: Option<(i32, Instant)>,
    /// When we end, and for which signal.
    end: Option<(i32, Instant)>,
}

impl Signals {
    fn catch(has_terminal: bool) -> Result<Self, Broken> {
        let catch = |kind| {
            signal(kind)
                .map_err(|error| Broken::Failed(ApiError::new(ErrorCode::Internal, format!("signals: {error}"))))
        };
        Ok(Self {
            interrupt: catch(SignalKind::interrupt())?,
            terminate: catch(SignalKind::terminate())?,
            hang_up: catch(SignalKind::hangup())?,
            resize: catch(SignalKind::window_change())?,
            has_terminal,
            last: None,
            end: None,
        })
    }

    async fn next(&mut self) -> Heard {
        let end = self.end;
        let farewell = async {
            match end {
                Some((number, at)) => {
                    tokio::time::sleep_until(at.into()).await;
                    number
                }
                None => std::future::pending().await,
            }
        };
        let number = tokio::select! {
            number = farewell => return Heard::GiveUp(128 + number),
            _ = self.interrupt.recv() => nix::libc::SIGINT,
            _ = self.terminate.recv() => nix::libc::SIGTERM,
            _ = self.hang_up.recv() => nix::libc::SIGHUP,
            _ = self.resize.recv(), if self.has_terminal => {
                let size = terminal::size();
                return Heard::Control(ClientControl::Resize { cols: size.cols, rows: size.rows });
            }
        };
        let again = self.last.is_some_and(|(before, at)| before == number && at.elapsed() < IMPATIENCE);
        self.last = Some((number, Instant::now()));
        if number != nix::libc::SIGINT && self.end.is_none() {
            self.end = Some((number, Instant::now() + FAREWELL));
        }
        if again { Heard::GiveUp(128 + number) } else { Heard::Control(ClientControl::Signal { signal: number }) }
    }
}
