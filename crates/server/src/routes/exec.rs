//! Commands in a sandbox: one answer when they have ended, or both directions as they go.

use std::{io, sync::Arc, time::Duration};

use axum::{
    Json,
    extract::{
        State, WebSocketUpgrade,
        ws::{Message, WebSocket, rejection::WebSocketUpgradeRejection},
    },
    response::{IntoResponse, Response},
};
use bytes::{BufMut, Bytes, BytesMut};
use futures::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use heyvm_agent_protocol::{
    CHUNK,
    v1::{EnvVar, ExecInput, ExecOutput, ExecStart, Exit, Pty, exec_input, exec_output},
};
use heyvm_api::{
    ApiError, ErrorCode,
    exec::{
        ClientControl, DetachedResponse, ExecRequest, ExecResponse, FRAME_STDERR, FRAME_STDIN, FRAME_STDOUT, PtySize,
        ServerControl,
    },
    names,
};
use heyvm_control_plane::ControlPlane;
use heyvm_vm::AgentConnection;
use http::StatusCode;
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::Api;
use crate::{
    answer::{self, base64, escaped, text},
    extract::{self, Content, Plane, Who},
    output::{Recording, Source},
    problem::Problem,
};

/// How long a client may take for its first frame.
const FIRST_FRAME: Duration = Duration::from_secs(30);
/// A client that has gone shows by a ping that cannot be written.
const PING: Duration = Duration::from_secs(5);
/// Largest frame of a client.
const MAX_FRAME: usize = 4 << 20;
/// A guest that lives has ended a command, and told so, this long after its time-out, however busy it is.
const GRACE: Duration = Duration::from_secs(20);
const LONGEST: f64 = 30.0 * 86_400.0;

/// Runs a command and answers when it has ended. Of its output the first 256 MiB are kept, less while an account has more
/// than 512 MiB waiting to be read; `truncated` says so. What it began is killed when the caller leaves.
///
/// With `detach` it answers as soon as the command runs: the command goes on, its output goes to /dev/null. `stdin` and
/// `pty` belong to the streaming form and are refused here.
#[utoipa::path(post, path = "/sandboxes/{id}/execute", operation_id = "execute", tag = "commands",
    params(("id" = String, Path, description = "Id, name or slug")), request_body = ExecRequest,
    responses((status = 200, description = "It has ended, with whatever exit code", body = ExecResponse),
        (status = 202, description = "It runs detached", body = DetachedResponse)))]
pub async fn execute(
    State(api): State<Api>,
    Plane(plane): Plane,
    Who(who): Who,
    Content(request): Content<ExecRequest>,
) -> Result<Response, Problem> {
    if request.stdin || request.pty.is_some() {
        let hint = "GET /sandboxes/{id}/exec is the streaming form";
        return Err(Problem::invalid("stdin and pty belong to the streaming form", hint));
    }
    if request.detach && request.session.is_some() {
        let hint = "leave out session, or detach";
        return Err(Problem::invalid("a detached command belongs to no session", hint));
    }
    let start = start(request)?;
    let agent = plane.agent(&who).await?;
    let recording = Recording::new(api.output(), who.account.as_str());
    let deadline = deadline(&start);
    match to_the_end(agent, start, deadline, recording).await {
        Ok(response) => Ok(response),
        Err(problem) => Err(plane.explain(&who, problem.into_error()).await.into()),
    }
}

async fn to_the_end(
    agent: AgentConnection,
    start: ExecStart,
    deadline: Option<Instant>,
    mut output: Recording,
) -> Result<Response, Problem> {
    let detach = start.detach;
    let work = async {
        let mut client = agent.client().await?;
        let input = ExecInput { kind: Some(exec_input::Kind::Start(start)) };
        let mut outputs = client.exec(tokio_stream::once(input)).await?.into_inner();
        loop {
            match outputs.message().await?.and_then(|message| message.kind) {
                Some(exec_output::Kind::Started(started)) if detach => return Ok(Outcome::Detached(started.pid)),
                Some(exec_output::Kind::Started(_) | exec_output::Kind::StdinTaken(_)) => {}
                Some(exec_output::Kind::Stdout(data)) => keep(&mut output, Source::Stdout, &data).await?,
                Some(exec_output::Kind::Stderr(data)) => keep(&mut output, Source::Stderr, &data).await?,
                Some(exec_output::Kind::Exit(exit)) => return Ok(Outcome::Ended(exit)),
                None => return Err(Problem::from(went_away())),
            }
        }
    };
    let exit = match by(deadline, work).await {
        Some(Ok(Outcome::Detached(pid))) => {
            return Ok((StatusCode::ACCEPTED, Json(DetachedResponse { pid })).into_response());
        }
        Some(Ok(Outcome::Ended(exit))) => exit,
        Some(Err(problem)) => return Err(problem),
        None => overdue(),
    };
    if !exit.error.is_empty() {
        keep(&mut output, Source::Stderr, format!("{}\n", printable(&exit.error)).as_bytes()).await?;
    }
    Ok(told(&exit, output))
}

enum Outcome {
    Ended(Exit),
    Detached(i32),
}

/// When the host gives up on a command with a time-out: the guest that enforces it may stand still.
fn deadline(start: &ExecStart) -> Option<Instant> {
    let timeout = Duration::from_millis(start.timeout_ms);
    (!timeout.is_zero()).then(|| Instant::now() + timeout + GRACE)
}

/// `None` when the deadline comes first. Dropped work is a dropped call: the agent, where there is one, ends the command.
async fn by<T>(deadline: Option<Instant>, work: impl Future<Output = T>) -> Option<T> {
    match deadline {
        Some(deadline) => tokio::time::timeout_at(deadline, work).await.ok(),
        None => Some(work.await),
    }
}

/// The end of a command whose sandbox has not ended it in time.
fn overdue() -> Exit {
    let error = format!(
        "the sandbox did not end the command within {} s of its timeout, so that it may not run any more: \
         `heyvm get` says how it is, `heyvm restart` brings it back",
        GRACE.as_secs()
    );
    Exit { code: 124, timed_out: true, error, ..Exit::default() }
}

async fn keep(output: &mut Recording, source: Source, data: &[u8]) -> Result<(), Problem> {
    output.write(source, data).await.map_err(|error| {
        let full = error.kind() == io::ErrorKind::StorageFull;
        let code = if full { ErrorCode::OutOfResources } else { ErrorCode::Internal };
        ApiError::new(code, format!("could not keep the output: {error}"))
            .hint("GET /sandboxes/{id}/exec streams output without keeping it")
            .into()
    })
}

/// The answer, put together as it is sent: see [`ExecResponse`].
fn told(exit: &Exit, output: Recording) -> Response {
    let truncated = if output.is_truncated() { ",\"truncated\":true" } else { "" };
    let head = format!("{{\"exit_code\":{},\"timed_out\":{}{truncated}", exit.code, exit.timed_out);
    let in_base64: Vec<_> = [("stdout_base64", Source::Stdout), ("stderr_base64", Source::Stderr)]
        .into_iter()
        .filter(|(_, source)| !output.is_text(*source))
        .collect();
    let output = output.finish();
    let mut pieces = vec![text(head)];
    for (name, source) in [("output", None), ("stdout", Some(Source::Stdout)), ("stderr", Some(Source::Stderr))] {
        pieces.extend([text(format!(",\"{name}\":\"")), escaped(output.read(source)), text("\"")]);
    }
    for (name, source) in in_base64 {
        pieces.extend([text(format!(",\"{name}\":\"")), base64(output.read(Some(source))), text("\"")]);
    }
    pieces.push(text("}\n"));
    answer::json(pieces)
}

/// A WebSocket: the first text frame is an `ExecRequest`, then binary frames carry the streams (first byte 1 stdin, 2
/// stdout, 3 stderr) and text frames carry `stdin_close`, `signal`, `resize`, and back `stdin_taken`; the last one is
/// `exit` or `error`.
///
/// When the client goes away, all that the command began is killed.
#[utoipa::path(get, path = "/sandboxes/{id}/exec", operation_id = "exec_stream", tag = "commands",
    params(("id" = String, Path, description = "Id, name or slug")),
    responses((status = 101, description = "The WebSocket is open")))]
pub async fn stream(
    Plane(plane): Plane,
    Who(who): Who,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Problem> {
    let agent = plane.agent(&who).await?;
    let upgrade = upgrade.map_err(|rejection| {
        let hint = "connect with a WebSocket client, or use POST /sandboxes/{id}/execute";
        Problem::invalid(format!("this is no WebSocket handshake: {}", rejection.body_text()), hint)
            .with_status(StatusCode::UPGRADE_REQUIRED)
    })?;
    Ok(upgrade
        .max_message_size(MAX_FRAME)
        .max_frame_size(MAX_FRAME)
        .on_upgrade(|socket| run(socket, agent, plane, who)))
}

async fn run(socket: WebSocket, agent: AgentConnection, plane: Arc<ControlPlane>, who: heyvm_control_plane::Who) {
    let (mut outgoing, mut incoming) = socket.split();
    let end = match bridge(&mut outgoing, &mut incoming, agent).await {
        Ok(exit) => ServerControl::Exit {
            exit_code: exit.code,
            timed_out: exit.timed_out,
            message: Some(printable(&exit.error)).filter(|message| !message.is_empty()),
            stdin_read: Some(exit.stdin_read).filter(|_| !exit.timed_out || exit.error.is_empty()),
        },
        Err(Interrupted::Failed(problem)) => {
            ServerControl::Error { error: plane.explain(&who, problem.into_error()).await }
        }
        Err(Interrupted::ClientGone) => return,
    };
    if outgoing.send(control(&end)).await.is_ok() {
        outgoing.close().await.ok();
    }
}

/// Why a command was not carried to its end.
enum Interrupted {
    Failed(Problem),
    ClientGone,
}

impl<P: Into<Problem>> From<P> for Interrupted {
    fn from(problem: P) -> Self {
        Self::Failed(problem.into())
    }
}

/// Carries frames both ways until the command ends. Dropping the call to the agent kills all that the command began.
async fn bridge(
    outgoing: &mut SplitSink<WebSocket, Message>,
    incoming: &mut SplitStream<WebSocket>,
    agent: AgentConnection,
) -> Result<Exit, Interrupted> {
    let request = tokio::time::timeout(FIRST_FRAME, first_frame(incoming));
    let request = request.await.map_err(|_| Problem::invalid("no request came", "send an ExecRequest first"))??;
    let stdin = request.stdin;
    if request.detach {
        let hint = "POST /sandboxes/{id}/execute starts a detached command";
        return Err(Problem::invalid("detach does not belong to the streaming form", hint).into());
    }
    let start = start(request)?;
    let deadline = deadline(&start);
    let start = exec_input::Kind::Start(start);
    let (sender, receiver) = mpsc::channel(4);
    sender.send(ExecInput { kind: Some(start) }).await.ok();
    let output = async {
        let mut client = agent.client().await?;
        let outputs = client.exec(ReceiverStream::new(receiver)).await?.into_inner();
        carry_output(outputs, outgoing).await
    };
    tokio::select! {
        exit = by(deadline, output) => exit.unwrap_or_else(|| Ok(overdue())),
        interrupted = carry_input(incoming, sender, stdin) => Err(interrupted),
    }
}

async fn first_frame(incoming: &mut SplitStream<WebSocket>) -> Result<ExecRequest, Interrupted> {
    loop {
        match incoming.next().await {
            Some(Ok(Message::Text(text))) => return Ok(extract::parse(text.as_bytes())?),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(Message::Binary(_))) => {
                return Err(Problem::invalid("the first frame is binary", "send an ExecRequest as text first").into());
            }
            Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(Interrupted::ClientGone),
        }
    }
}

/// Resolves when the client is gone or says what cannot be.
async fn carry_input(
    incoming: &mut SplitStream<WebSocket>,
    sender: mpsc::Sender<ExecInput>,
    stdin: bool,
) -> Interrupted {
    while let Some(Ok(message)) = incoming.next().await {
        let inputs = match message {
            Message::Binary(frame) => match frame.split_first() {
                Some((&FRAME_STDIN, data)) if stdin => data.chunks(CHUNK).map(stdin_piece).collect(),
                Some((&FRAME_STDIN, _)) => Vec::new(),
                _ => {
                    return Problem::invalid("a binary frame of no known kind", "its first byte is 1 for stdin").into();
                }
            },
            Message::Text(text) => match extract::parse::<ClientControl>(text.as_bytes()) {
                Ok(control) => vec![control_input(control)],
                Err(problem) => return Interrupted::Failed(problem),
            },
            Message::Ping(_) | Message::Pong(_) => Vec::new(),
            Message::Close(_) => break,
        };
        for kind in inputs {
            if sender.send(ExecInput { kind: Some(kind) }).await.is_err() {
                // The command has ended: its exit comes by the other direction.
                std::future::pending::<()>().await;
            }
        }
    }
    Interrupted::ClientGone
}

fn stdin_piece(data: &[u8]) -> exec_input::Kind {
    exec_input::Kind::Stdin(data.to_vec())
}

fn control_input(control: ClientControl) -> exec_input::Kind {
    match control {
        ClientControl::StdinClose => exec_input::Kind::StdinClose(true),
        ClientControl::Signal { signal } => exec_input::Kind::Signal(signal),
        ClientControl::Resize { cols, rows } => exec_input::Kind::Resize(pty(PtySize { cols, rows })),
    }
}

/// The command's output to the client, no faster than the client takes it.
async fn carry_output(
    mut outputs: Streaming<ExecOutput>,
    outgoing: &mut SplitSink<WebSocket, Message>,
) -> Result<Exit, Interrupted> {
    let mut ping = tokio::time::interval_at(Instant::now() + PING, PING);
    ping.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let frame = tokio::select! {
            output = outputs.message() => match output?.and_then(|message| message.kind) {
                Some(exec_output::Kind::Started(_)) => continue,
                Some(exec_output::Kind::Stdout(data)) => frame(FRAME_STDOUT, &data),
                Some(exec_output::Kind::Stderr(data)) => frame(FRAME_STDERR, &data),
                Some(exec_output::Kind::StdinTaken(bytes)) => control(&ServerControl::StdinTaken { bytes }),
                Some(exec_output::Kind::Exit(exit)) => return Ok(exit),
                None => return Err(went_away().into()),
            },
            _ = ping.tick() => Message::Ping(Bytes::new()),
        };
        outgoing.send(frame).await.map_err(|_| Interrupted::ClientGone)?;
    }
}

fn control(said: &ServerControl) -> Message {
    Message::text(serde_json::to_string(said).unwrap_or_default())
}

fn frame(kind: u8, data: &[u8]) -> Message {
    let mut frame = BytesMut::with_capacity(1 + data.len());
    frame.put_u8(kind);
    frame.put_slice(data);
    Message::Binary(frame.freeze())
}

fn went_away() -> ApiError {
    ApiError::new(ErrorCode::SandboxUnreachable, "the sandbox ended while the command ran")
        .hint("`heyvm get` says why it ended")
}

/// The guest writes its messages: control characters stay behind.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(500).collect()
}

/// A request as the agent takes it.
fn start(request: ExecRequest) -> Result<ExecStart, Problem> {
    if request.command.is_empty() {
        return Err(Problem::invalid("command is empty", "name a program, or give a script for sh -c"));
    }
    let args = request.args.unwrap_or_default();
    let texts = std::iter::once(&request.command).chain(&args).chain(request.env.values());
    let others = request.cwd.iter().chain(&request.user).chain(&request.session);
    if texts.chain(others).any(|text| text.contains('\0')) {
        return Err(Problem::invalid("the request holds a zero byte", "no argument of a command can hold one"));
    }
    request.env.keys().try_for_each(|name| names::check_env_name(name))?;
    let timeout_ms = match request.timeout_seconds {
        None => 0,
        // Zero would mean none to the agent.
        Some(seconds) if seconds > 0.0 && seconds <= LONGEST => ((seconds * 1000.0).ceil() as u64).max(1),
        Some(seconds) => {
            let message = format!("timeout_seconds {seconds} is out of range");
            return Err(Problem::invalid(message, "use more than 0 seconds and at most 30 days, or leave it out"));
        }
    };
    Ok(ExecStart {
        shell: args.is_empty(),
        argv: std::iter::once(request.command).chain(args).collect(),
        env: request.env.into_iter().map(|(name, value)| EnvVar { name, value }).collect(),
        cwd: request.cwd.unwrap_or_default(),
        user: request.user.unwrap_or_default(),
        session: request.session.unwrap_or_default(),
        timeout_ms,
        pty: request.pty.map(pty),
        stdin: request.stdin,
        detach: request.detach,
    })
}

fn pty(size: PtySize) -> Pty {
    Pty { cols: size.cols.into(), rows: size.rows.into(), term: String::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(json: serde_json::Value) -> Result<ExecStart, Problem> {
        extract::parse(json.to_string().as_bytes()).and_then(start)
    }

    #[test]
    fn without_arguments_it_is_a_script() {
        for args in ["null", "[]"] {
            let json = format!("{{\"command\": \"a | b\", \"args\": {args}}}");
            let start = start(extract::parse(json.as_bytes()).unwrap()).unwrap();
            assert!(start.shell && start.argv == ["a | b"]);
        }
        let start = request(serde_json::json!({"command": "ls", "args": ["-l"], "timeout_seconds": 0.0001})).unwrap();
        assert!(!start.shell && start.argv == ["ls", "-l"] && start.timeout_ms == 1);
    }

    #[test]
    fn what_cannot_be_run_is_refused() {
        use serde_json::json;
        for bad in [
            json!({}),
            json!({"command": ""}),
            json!({"command": "a\0b"}),
            json!({"command": "a", "timeout_seconds": 0}),
            json!({"command": "a", "timeout_seconds": -1}),
            json!({"command": "a", "timeout_seconds": 1e300}),
            json!({"command": "a", "env": {"A=B": "c"}}),
            json!({"command": "a", "shell": true}),
        ] {
            assert!(request(bad.clone()).is_err(), "{bad}");
        }
    }
    #[tokio::test]
    async fn command_in_a_guest_that_stands_still_ends_at_the_hosts_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        // Takes the connection, and says nothing.
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let agent = AgentConnection::at(move || path.clone(), std::path::PathBuf::new);
        let start = request(serde_json::json!({"command": "true", "timeout_seconds": 2})).unwrap();
        assert!(super::deadline(&start).is_some_and(|end| end > Instant::now() + GRACE));
        let recording = Recording::new(&crate::output::Budget::new("/tmp".into()), "ada");
        let deadline = Some(Instant::now() + Duration::from_millis(200));
        let response = to_the_end(agent, start, deadline, recording).await.unwrap();
        let body = axum::body::to_bytes(response.into_body(), 10_000).await.unwrap();
        let answer: ExecResponse = serde_json::from_slice(&body).unwrap();
        assert!(answer.exit_code == 124 && answer.timed_out, "{answer:?}");
        assert!(answer.stderr.contains("heyvm restart"), "{answer:?}");
    }
}
