//! `logs`.

use std::{
    io::{self, Write},
    pin::pin,
};

use futures::StreamExt;
use heyvm_api::{
    ApiError, ErrorCode,
    sandbox::{LogPiece, timestamp},
};

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
    /// Only the last N lines of what there is; 0 with --follow shows what comes from now on
    #[arg(short = 'n', long, value_name = "N", value_parser = lines)]
    pub tail: Option<Lines>,
    /// Show the time (UTC, RFC 3339) at which each line began to come
    #[arg(short, long)]
    pub timestamps: bool,
}

/// How many lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lines {
    All,
    Last(u64),
}

fn lines(text: &str) -> Result<Lines, String> {
    if text == "all" {
        return Ok(Lines::All);
    }
    text.parse().map(Lines::Last).map_err(|_| "give a number of lines, or all".into())
}

impl LogsArgs {
    fn path(&self) -> String {
        let tail = match self.tail {
            Some(Lines::Last(lines)) => Some(format!("tail={lines}")),
            Some(Lines::All) | None => None,
        };
        let flag = |is_set: bool, name: &str| is_set.then(|| format!("{name}=true"));
        let query = [flag(self.follow, "follow"), tail, flag(self.timestamps, "timestamps")];
        let query = query.into_iter().flatten().collect::<Vec<_>>().join("&");
        path(&self.sandbox, &if query.is_empty() { "/logs".into() } else { format!("/logs?{query}") })
    }
}

/// What the start command printed: each stream to its own, as it came.
pub async fn logs(context: &Context, args: &LogsArgs) -> Outcome {
    let client = context.client().await?;
    let lines = client.stream(&args.path(), "application/x-ndjson").await?;
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
            let piece = serde_json::from_slice(line).map_err(|error| broken_off(&error.to_string()))?;
            let piece = stamped(piece);
            if let Err(error) = told.piece(&piece) {
                return output::cannot_write(&error);
            }
        }
        buffer.drain(..whole);
    }
    told.end().map_or_else(|error| output::cannot_write(&error), |()| Ok(0))
}

/// With its time, where it has one, before its text.
fn stamped(mut piece: LogPiece) -> LogPiece {
    if let Some(time) = piece.time {
        piece.text.insert_str(0, &timestamp(time));
    }
    piece
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
            document.piece(&LogPiece { stream: stream.into(), text: text.into(), time: None }).unwrap();
        }
        let mut out = Vec::new();
        document.write(&mut out).unwrap();
        let told: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(told, json!({"logs": "one\n\"oh\"\ntwo\n", "stdout": "one\ntwo\n", "stderr": "\"oh\"\n"}));
    }

    #[test]
    fn flags_are_those_of_docker() {
        let path = |words: &str| {
            let words = format!("heyvm logs web {words}");
            let cli = crate::arguments::parse(words.split_whitespace().map(Into::into).collect()).ok()?;
            match cli.command {
                Some(crate::cli::Command::Logs(args)) => Some(args.path()),
                _ => None,
            }
        };
        for (words, expected) in [
            ("", "/sandboxes/web/logs"),
            ("--tail 5", "/sandboxes/web/logs?tail=5"),
            ("-fn0", "/sandboxes/web/logs?follow=true&tail=0"),
            ("-n all -t", "/sandboxes/web/logs?timestamps=true"),
            ("--follow --timestamps --tail=1", "/sandboxes/web/logs?follow=true&tail=1&timestamps=true"),
        ] {
            assert_eq!(path(words).as_deref(), Some(expected), "{words}");
        }
        assert!(path("--tail -1").is_none() && path("-n x").is_none());
    }

    #[test]
    fn time_stands_before_the_line() {
        let time = chrono::DateTime::from_timestamp(1, 0);
        let piece = LogPiece { stream: "stdout".into(), text: "one\n".into(), time };
        assert_eq!(stamped(piece).text, "1970-01-01T00:00:01.000000Z one\n");
    }
}
