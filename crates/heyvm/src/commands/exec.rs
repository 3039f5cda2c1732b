//! `exec`: a command in a sandbox, its streams and its exit status as if it ran here.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    time::{Duration, Instant},
};

use futures::{SinkExt, StreamExt};
use heyvm_api::{
    ApiError, ErrorCode,
    client::Connection,
    exec::{ClientControl, ExecRequest, FRAME_STDERR, FRAME_STDIN, FRAME_STDOUT, ServerControl},
    names,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_tungstenite::{WebSocketStream, tungstenite::Message};

use super::{Context, Outcome, path};
use crate::{cli::ExecArgs, output::Format};

/// A second interrupt within this gives up waiting.
const IMPATIENCE: Duration = Duration::from_secs(1);
/// Exit status of a program that an interrupt has ended.
const INTERRUPTED: i32 = 130;
const BLOCK: usize = 64 << 10;

/// Runs it; the answer is its exit status.
pub async fn exec(context: &Context, args: ExecArgs) -> Outcome {
    let env = args.env.iter().map(|text| names::parse_env(text)).collect::<Result<BTreeMap<_, _>, _>>()?;
    let timeout = args.timeout.as_deref().map(|text| names::parse_duration("--timeout", text)).transpose()?;
    let (command, rest) =
        args.command.split_first().ok_or_else(|| ApiError::new(ErrorCode::InvalidArgument, "no command"))?;
    let request = ExecRequest {
        command: command.clone(),
        args: Some(rest.to_vec()),
        env,
        cwd: args.cwd,
        user: args.user,
        session: args.session,
        timeout_seconds: timeout.map(|timeout| timeout.as_secs_f64()),
        stdin: true,
        pty: None,
    };
    let socket = context.client().await?.websocket(&path(&args.sandbox, "/exec")).await?;
    let mut sink = match context.format {
        Format::Text => Sink::Direct,
        Format::Json => Sink::Spooled(Spool::new()?, Spool::new()?),
    };
    let end = converse(socket, &request, &mut sink).await?;
    if let Some(message) = &end.message {
        match &mut sink {
            Sink::Direct => output_line(message),
            Sink::Spooled(_, stderr) => stderr.push(format!("{message}\n").as_bytes())?,
        }
    }
    if let Sink::Spooled(stdout, stderr) = sink {
        print_json(&end, stdout, stderr)?;
    }
    Ok(end.exit_code)
}

fn output_line(message: &str) {
    let _ = writeln!(io::stderr().lock(), "{message}");
}

/// How it ended.
struct End {
    exit_code: i32,
    timed_out: bool,
    message: Option<String>,
}

/// Where its output goes.
enum Sink {
    Direct,
    Spooled(Spool, Spool),
}

impl Sink {
    fn write(&mut self, stderr: bool, data: &[u8]) -> Result<(), ApiError> {
        match self {
            Self::Spooled(_, spool) if stderr => spool.push(data),
            Self::Spooled(spool, _) => spool.push(data),
            Self::Direct => {
                let written = if stderr {
                    io::stderr().write_all(data)
                } else {
                    let mut out = io::stdout().lock();
                    out.write_all(data).and_then(|()| out.flush())
                };
                // Whoever read it has gone: so has the reason to go on.
                if written.is_err() {
                    std::process::exit(0);
                }
                Ok(())
            }
        }
    }
}

async fn converse(
    mut socket: WebSocketStream<Box<dyn Connection>>,
    request: &ExecRequest,
    sink: &mut Sink,
) -> Result<End, ApiError> {
    let text = serde_json::to_string(request).unwrap_or_default();
    socket.send(Message::text(text)).await.map_err(gone)?;
    let mut stdin = read_stdin();
    let failed = |error: io::Error| ApiError::new(ErrorCode::Internal, error.to_string());
    let mut interrupts = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminations = signal(SignalKind::terminate()).map_err(failed)?;
    let mut last_interrupt: Option<Instant> = None;
    loop {
        let number = tokio::select! {
            message = socket.next() => match message {
                Some(Ok(message)) => match receive(message, sink)? {
                    Some(end) => return Ok(end),
                    None => continue,
                },
                Some(Err(error)) => return Err(gone(error)),
                None => return Err(ApiError::new(ErrorCode::SandboxUnreachable, "the connection ended before the command did")
                    .hint("heyvm get says whether the sandbox still runs")),
            },
            Some(data) = stdin.recv() => {
                let message = if data.is_empty() { control(&ClientControl::StdinClose) } else {
                    Message::binary([&[FRAME_STDIN], data.as_slice()].concat())
                };
                // One that has ended takes no more, and its end is on its way.
                let _ = socket.send(message).await;
                continue;
            }
            _ = interrupts.recv() => {
                if last_interrupt.is_some_and(|at| at.elapsed() < IMPATIENCE) {
                    return Ok(End { exit_code: INTERRUPTED, timed_out: false, message: None });
                }
                last_interrupt = Some(Instant::now());
                nix::libc::SIGINT
            }
            _ = terminations.recv() => nix::libc::SIGTERM,
        };
        let _ = socket.send(control(&ClientControl::Signal { signal: number })).await;
    }
}

fn control(message: &ClientControl) -> Message {
    Message::text(serde_json::to_string(message).unwrap_or_default())
}

fn gone(error: tokio_tungstenite::tungstenite::Error) -> ApiError {
    ApiError::new(ErrorCode::DaemonUnavailable, format!("the connection to the daemon broke: {error}"))
        .hint("heyvm daemon status tells whether it runs")
}

fn receive(message: Message, sink: &mut Sink) -> Result<Option<End>, ApiError> {
    match message {
        Message::Binary(data) => match data.split_first() {
            Some((&FRAME_STDOUT, data)) => sink.write(false, data)?,
            Some((&FRAME_STDERR, data)) => sink.write(true, data)?,
            _ => {}
        },
        Message::Text(text) => match serde_json::from_str(&text) {
            Ok(ServerControl::Exit { exit_code, timed_out, message }) => {
                return Ok(Some(End { exit_code, timed_out, message }));
            }
            Ok(ServerControl::Error { error }) => return Err(error),
            Err(_) => {}
        },
        _ => {}
    }
    Ok(None)
}

/// Standard input in pieces, an empty one at its end. A thread of its own: one that nobody writes to blocks for good.
fn read_stdin() -> tokio::sync::mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    std::thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        loop {
            let mut data = vec![0; BLOCK];
            let length = stdin.read(&mut data).unwrap_or(0);
            data.truncate(length);
            if sender.blocking_send(data).is_err() || length == 0 {
                // Kept open: a closed channel would be an endless stream of nothing.
                return;
            }
        }
    });
    receiver
}

/// Output that waits in an unlinked file until it can be told.
struct Spool {
    file: File,
    /// Whether all of it so far is UTF-8, but for a character that may be cut in two.
    utf8: Utf8,
}

#[derive(Default)]
struct Utf8 {
    broken: bool,
    pending: Vec<u8>,
}

impl Utf8 {
    fn see(&mut self, data: &[u8]) {
        if self.broken {
            return;
        }
        self.pending.extend(data);
        match std::str::from_utf8(&self.pending) {
            Ok(_) => self.pending.clear(),
            Err(error) if error.error_len().is_some() => self.broken = true,
            Err(error) => drop(self.pending.drain(..error.valid_up_to())),
        }
    }

    fn is_whole(&self) -> bool {
        !self.broken && self.pending.is_empty()
    }
}

impl Spool {
    fn new() -> Result<Self, ApiError> {
        Ok(Self { file: tempfile::tempfile().map_err(spool_failed)?, utf8: Utf8::default() })
    }

    fn push(&mut self, data: &[u8]) -> Result<(), ApiError> {
        self.utf8.see(data);
        self.file.write_all(data).map_err(spool_failed)
    }

    /// As the inside of a JSON string, block by block; what is not UTF-8 is replaced.
    fn write_escaped(&mut self, out: &mut impl Write) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(0))?;
        let mut pending = Vec::new();
        let mut block = vec![0; BLOCK];
        loop {
            let length = self.file.read(&mut block)?;
            pending.extend(&block[..length]);
            let cut = if length == 0 { pending.len() } else { whole_characters(&pending) };
            let rest = pending.split_off(cut);
            let text = serde_json::to_string(&String::from_utf8_lossy(&pending))?;
            out.write_all(&text.as_bytes()[1..text.len() - 1])?;
            pending = rest;
            if length == 0 {
                return Ok(());
            }
        }
    }

    fn write_base64(&mut self, out: &mut impl Write) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(0))?;
        let mut encoder = base64::write::EncoderWriter::new(out, &base64::engine::general_purpose::STANDARD);
        io::copy(&mut self.file, &mut encoder)?;
        encoder.finish().map(drop)
    }
}

fn spool_failed(error: io::Error) -> ApiError {
    ApiError::new(ErrorCode::OutOfResources, format!("the output cannot be kept: {error}"))
        .hint("is there space in the directory for temporary files (TMPDIR)?")
}

/// How much of `bytes` is surely not the beginning of a character that goes on.
fn whole_characters(bytes: &[u8]) -> usize {
    match std::str::from_utf8(bytes) {
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        _ => bytes.len().saturating_sub(3.min(bytes.iter().rev().take_while(|byte| **byte >= 0x80).count())),
    }
}

fn print_json(end: &End, mut stdout: Spool, mut stderr: Spool) -> Result<(), ApiError> {
    let print = |stdout: &mut Spool, stderr: &mut Spool| -> io::Result<()> {
        let mut out = io::BufWriter::with_capacity(BLOCK, io::stdout().lock());
        write!(out, "{{\n  \"exit_code\": {},\n  \"stdout\": \"", end.exit_code)?;
        stdout.write_escaped(&mut out)?;
        write!(out, "\",\n  \"stderr\": \"")?;
        stderr.write_escaped(&mut out)?;
        write!(out, "\"")?;
        if end.timed_out {
            write!(out, ",\n  \"timed_out\": true")?;
        }
        for (name, spool) in [("stdout_base64", stdout), ("stderr_base64", stderr)] {
            if !spool.utf8.is_whole() {
                write!(out, ",\n  \"{name}\": \"")?;
                spool.write_base64(&mut out)?;
                write!(out, "\"")?;
            }
        }
        writeln!(out, "\n}}")?;
        out.flush()
    };
    match print(&mut stdout, &mut stderr) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(spool_failed(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn escaped(data: &[u8]) -> String {
        let mut spool = Spool::new().unwrap();
        spool.push(data).unwrap();
        let mut out = Vec::new();
        spool.write_escaped(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn characters_are_not_cut_at_blocks() {
        let text = "ä\n\"€\"".repeat(BLOCK / 3);
        let back: String = serde_json::from_str(&format!("\"{}\"", escaped(text.as_bytes()))).unwrap();
        assert_eq!(back, text);
    }

    #[test]
    fn what_is_not_text_is_replaced_and_known() {
        let mut utf8 = Utf8::default();
        utf8.see(&"ä".as_bytes()[..1]);
        assert!(!utf8.is_whole());
        utf8.see(&"ä".as_bytes()[1..]);
        assert!(utf8.is_whole());
        utf8.see(&[0xff]);
        assert!(!utf8.is_whole());
        assert_eq!(escaped(b"a\xff"), "a\u{fffd}");
    }
}
