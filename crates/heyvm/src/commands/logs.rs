//! `logs`.

use std::{
    io::{self, Write},
    pin::pin,
};

use futures::StreamExt;
use heyvm_api::{ApiError, ErrorCode, sandbox::LogPiece};

use super::{Context, Outcome, path};
use crate::{
    output::{self, Format},
    spool::Spool,
};

/// `logs`.
#[derive(Debug, clap::Args)]
pub struct LogsArgs {
    /// Id, name or slug
    pub sandbox: String,
    /// Go on until the sandbox ends
    #[arg(short, long)]
    pub follow: bool,
}

/// What the start command printed: each stream to its own, as it came.
pub async fn logs(context: &Context, args: &LogsArgs) -> Outcome {
    let client = context.client().await?;
    let follow = if args.follow { "?follow=true" } else { "" };
    let lines = client.stream(&path(&args.sandbox, &format!("/logs{follow}")), "application/x-ndjson").await?;
    let mut lines = pin!(lines);
    let mut told: Box<dyn Listener> = match context.format {
        Format::Text => Box::new(Streams),
        Format::Json => Box::new(Document { logs: Spool::new(), stdout: Spool::new(), stderr: Spool::new() }),
    };
    let mut buffer: Vec<u8> = Vec::new();
    while let Some(piece) = lines.next().await {
        buffer.extend(piece.map_err(|error| broken_off(&error.to_string()))?);
        let whole = buffer.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        for line in buffer[..whole].split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let piece: LogPiece = serde_json::from_slice(line).map_err(|error| broken_off(&error.to_string()))?;
            if let Err(error) = told.piece(&piece) {
                return output::cannot_write(&error);
            }
        }
        buffer.drain(..whole);
    }
    told.end().map_or_else(|error| output::cannot_write(&error), |()| Ok(0))
}

fn broken_off(why: &str) -> ApiError {
    ApiError::new(ErrorCode::DaemonUnavailable, format!("the logs broke off: {why}"))
        .hint("run the command again; heyvm daemon status tells whether the daemon runs")
}

/// Where the pieces go.
trait Listener {
    fn piece(&mut self, piece: &LogPiece) -> io::Result<()>;
    fn end(&mut self) -> io::Result<()>;
}

/// Text mode: each stream to its own, as it comes.
struct Streams;

impl Listener for Streams {
    fn piece(&mut self, piece: &LogPiece) -> io::Result<()> {
        if is_stderr(piece) {
            return io::stderr().write_all(piece.text.as_bytes());
        }
        let mut out = io::stdout().lock();
        out.write_all(piece.text.as_bytes())?;
        out.flush()
    }

    fn end(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// JSON mode: all of it at the end, in the order of arrival and by stream.
struct Document {
    logs: Spool,
    stdout: Spool,
    stderr: Spool,
}

impl Document {
    fn write(&mut self, out: &mut impl Write) -> io::Result<()> {
        let fields = [
            ("{\n  \"logs", &mut self.logs),
            ("\",\n  \"stdout", &mut self.stdout),
            ("\",\n  \"stderr", &mut self.stderr),
        ];
        for (name, spool) in fields {
            write!(out, "{name}\": \"")?;
            spool.write_escaped(out)?;
        }
        writeln!(out, "\"\n}}")?;
        out.flush()
    }
}

impl Listener for Document {
    fn piece(&mut self, piece: &LogPiece) -> io::Result<()> {
        self.logs.push(piece.text.as_bytes())?;
        if is_stderr(piece) { &mut self.stderr } else { &mut self.stdout }.push(piece.text.as_bytes())
    }

    fn end(&mut self) -> io::Result<()> {
        self.write(&mut io::BufWriter::new(io::stdout().lock()))
    }
}

fn is_stderr(piece: &LogPiece) -> bool {
    piece.stream == "stderr"
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn one_document_has_the_streams_together_and_apart() {
        let mut document = Document { logs: Spool::new(), stdout: Spool::new(), stderr: Spool::new() };
        for (stream, text) in [("stdout", "one\n"), ("stderr", "\"oh\"\n"), ("stdout", "two\n")] {
            document.piece(&LogPiece { stream: stream.into(), text: text.into() }).unwrap();
        }
        let mut out = Vec::new();
        document.write(&mut out).unwrap();
        let told: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(told, json!({"logs": "one\n\"oh\"\ntwo\n", "stdout": "one\ntwo\n", "stderr": "\"oh\"\n"}));
    }
}
