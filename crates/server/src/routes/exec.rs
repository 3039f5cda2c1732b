//! Commands in a sandbox: one answer when they have ended, or both directions as they go.

use std::{io, sync::Arc, time::Duration};

use axum::{
    extract::{
        State, WebSocketUpgrade,
        ws::{Message, WebSocket, rejection::WebSocketUpgradeRejection},
    },
    response::Response,
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
    exec::{ClientControl, ExecRequest, ExecResponse, FRAME_STDERR, FRAME_STDIN, FRAME_STDOUT, PtySize, ServerControl},
    names,
};
use heyvm_control_plane::ControlPlane;
use heyvm_vm::AgentConnection;
use http::StatusCode;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::Api;
use crate::{
    answer::{self, Spool, base64, escaped, text},
    extract::{self, Content, Plane, Who},
    problem::Problem,
};

/// How long a client may take for its first frame.
const FIRST_FRAME: Duration = Duration::from_secs(30);
/// A client that has gone shows by a ping that cannot be written.
const PING: Duration = Duration::from_secs(5);
/// Largest frame of a client.
const MAX_FRAME: usize = 4 << 20;
/// Most output of one `execute`; the streaming form has no limit.
const MAX_OUTPUT: u64 = 1 << 30;
const LONGEST: f64 = 30.0 * 86_400.0;

/// Runs a command and answers when it has ended. Output of any size up to a GiB is answered whole.
///
/// `stdin` and `pty` belong to the streaming form and are refused here.
#[utoipa::path(post, path = "/sandboxes/{id}/execute", operation_id = "execute", tag = "commands",
    params(("id" = String, Path, description = "Id, name or slug")), request_body = ExecRequest,
    responses((status = 200, description = "It has ended, with whatever exit code", body = ExecResponse)))]
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
    let start = start(request)?;
    let agent = plane.agent(&who).await?;
    match to_the_end(&api, agent, start).await {
        Ok(response) => Ok(response),
        Err(problem) => Err(plane.explain(&who, problem.into_error()).await.into()),
    }
}

async fn to_the_end(api: &Api, agent: AgentConnection, start: ExecStart) -> Result<Response, Problem> {
    let mut client = agent.client().await?;
    let input = ExecInput { kind: Some(exec_input::Kind::Start(start)) };
    let mut outputs = client.exec(tokio_stream::once(input)).await?.into_inner();
    let [mut stdout, mut stderr, mut output] = [(); 3].map(|()| Spool::new(api.spool()));
    let exit = loop {
        match outputs.message().await?.and_then(|message| message.kind) {
            Some(exec_output::Kind::Started(_) | exec_output::Kind::StdinTaken(_)) => {}
            Some(exec_output::Kind::Stdout(data)) => keep(&data, &mut stdout, &mut output)?,
            Some(exec_output::Kind::Stderr(data)) => keep(&data, &mut stderr, &mut output)?,
            Some(exec_output::Kind::Exit(exit)) => break exit,
            None => return Err(went_away().into()),
        }
    };
    if !exit.error.is_empty() {
        keep(format!("{}\n", printable(&exit.error)).as_bytes(), &mut stderr, &mut output)?;
    }
    Ok(told(&exit, stdout, stderr, output))
}

fn keep(data: &[u8], stream: &mut Spool, output: &mut Spool) -> Result<(), Problem> {
    if output.length() + data.len() as u64 > MAX_OUTPUT {
        return Err(ApiError::new(ErrorCode::TooLarge, "the command printed more than a GiB")
            .hint("GET /sandboxes/{id}/exec streams output of any size")
            .into());
    }
    stream.write(data).and_then(|()| output.write(data)).map_err(|error| {
        let full = error.kind() == io::ErrorKind::StorageFull;
        let code = if full { ErrorCode::OutOfResources } else { ErrorCode::Internal };
        ApiError::new(code, format!("the output could not be kept: {error}")).into()
    })
}

/// The answer, put together as it is sent: see [`ExecResponse`].
fn told(exit: &Exit, stdout: Spool, stderr: Spool, output: Spool) -> Response {
    let (stdout_is_text, stderr_is_text) = (stdout.is_text(), stderr.is_text());
    let (stdout, stderr, output) = (stdout.finish(), stderr.finish(), output.finish());
    let head = format!("{{\"exit_code\":{},\"timed_out\":{},\"output\":\"", exit.code, exit.timed_out);
    let mut pieces = vec![
        text(head),
        escaped(output.read()),
        text("\",\"stdout\":\""),
        escaped(stdout.read()),
        text("\",\"stderr\":\""),
        escaped(stderr.read()),
    ];
    if !stdout_is_text {
        pieces.extend([text("\",\"stdout_base64\":\""), base64(stdout.read())]);
    }
    if !stderr_is_text {
        pieces.extend([text("\",\"stderr_base64\":\""), base64(stderr.read())]);
    }
    pieces.push(text("\"}\n"));
    answer::json(pieces)
}

/// A WebSocket: the first text frame is an `ExecRequest`, then binary frames carry the streams (first byte 1 stdin, 2
/// stdout, 3 stderr) and text frames carry `stdin_close`, `signal`, `resize`, and back `stdin_taken`; the last one is
/// `exit` or `error`.
///
/// When the client goes away the command's whole process group is killed.
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
        },
        Err(Interrupted::Failed(problem)) => {
            ServerControl::Error { error: plane.explain(&who, problem.into_error()).await }
        }
        Err(Interrupted::ClientGone) => return,
    };
    if outgoing.send(control(&end)).await.is_ok() {
        let _ = outgoing.close().await;
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

/// Carries frames both ways until the command ends. Dropping the call to the agent kills the process group.
async fn bridge(
    outgoing: &mut SplitSink<WebSocket, Message>,
    incoming: &mut SplitStream<WebSocket>,
    agent: AgentConnection,
) -> Result<Exit, Interrupted> {
    let request = tokio::time::timeout(FIRST_FRAME, first_frame(incoming));
    let request = request.await.map_err(|_| Problem::invalid("no request came", "send an ExecRequest first"))??;
    let stdin = request.stdin;
    let start = exec_input::Kind::Start(start(request)?);
    let (sender, receiver) = mpsc::channel(4);
    let _ = sender.send(ExecInput { kind: Some(start) }).await;
    let mut client = agent.client().await?;
    let output = async {
        let outputs = client.exec(ReceiverStream::new(receiver)).await?.into_inner();
        carry_output(outputs, outgoing).await
    };
    tokio::select! {
        exit = output => exit,
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
    let mut ping = tokio::time::interval_at(tokio::time::Instant::now() + PING, PING);
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
        detach: false,
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
}
