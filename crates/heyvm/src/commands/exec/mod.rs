//! `exec`: a command in a sandbox, its streams and its exit status as if it ran here.
//!
//! - [`conversation`]: the messages to and from the daemon while it runs.
//! - [`stdin`]: standard input, read only as far as the command takes it.  [`terminal`]: `--tty`.

mod conversation;
mod stdin;
mod terminal;

use std::{
    collections::BTreeMap,
    io::{self, IsTerminal, Write},
};

use heyvm_api::{
    ApiError, ErrorCode,
    client::Client,
    exec::{DetachedResponse, ExecRequest, ExecResponse},
    names,
};
use tokio::io::AsyncWriteExt;

use super::{Context, Outcome, path};
use crate::{
    output::{self, Format},
    spool::Spool,
};
use conversation::{End, Output};

/// `exec`.
#[derive(Debug, clap::Args)]
pub struct ExecArgs {
    /// Id, name or slug
    pub sandbox: String,
    /// Pass standard input on (the default, as in ssh; accepted for the habit of `-it`)
    #[arg(short, long)]
    pub interactive: bool,
    /// Leave standard input alone, as ssh -n does: for loops that read it themselves
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    pub no_stdin: bool,
    /// Run it on a terminal of its own, joined to this one
    #[arg(short, long)]
    pub tty: bool,
    /// Answer once it runs and leave it running; its output goes to /dev/null unless it redirects that
    #[arg(short, long, conflicts_with_all = ["interactive", "tty", "session"])]
    pub detach: bool,
    /// Environment variable KEY=VALUE (repeatable)
    #[arg(short, long)]
    pub env: Vec<String>,
    /// Directory to run it in; the sandbox's working directory when absent
    #[arg(short = 'w', long, visible_alias = "workdir")]
    pub cwd: Option<String>,
    /// User to run it as, by name or by uid[:gid]; root when absent
    #[arg(short, long)]
    pub user: Option<String>,
    /// Named session, which keeps its directory and environment
    #[arg(long)]
    pub session: Option<String>,
    /// Kill it and all it started after this long (30s, 2m), and exit with 124
    #[arg(long)]
    pub timeout: Option<String>,
    /// The command, behind -- where its first word begins with a dash
    #[arg(required = true, trailing_var_arg = true)]
    pub command: Vec<String>,
}

/// Runs it; the answer is its exit status.
pub async fn exec(context: &Context, args: ExecArgs) -> Outcome {
    let request = request(&args, context.format)?;
    let client = context.client().await?;
    if args.detach {
        return detach(context, &client, &args.sandbox, &request).await;
    }
    let socket = client.websocket(&path(&args.sandbox, "/exec")).await?;
    let _raw = if args.tty { terminal::Raw::enter()? } else { None };
    let silence = client.until_silent();
    match context.format {
        Format::Text => {
            let mut streams = Streams { stdout: tokio::io::stdout(), stderr: tokio::io::stderr() };
            let end = match conversation::hold(socket, request, &mut streams, silence).await {
                Err(conversation::Broken::OutputClosed) => return Ok(output::PIPE_CLOSED),
                other => other?,
            };
            if let Some(message) = &end.message {
                writeln!(io::stderr(), "heyvm: {message}").ok();
            }
            Ok(end.exit_code)
        }
        Format::Json => {
            let mut spools = Spools { stdout: Spool::new(), stderr: Spool::new() };
            let end = conversation::hold(socket, request, &mut spools, silence).await?;
            spools.tell(&end)
        }
    }
}

/// The answer to a command that is to run by itself.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Detached {
    Runs(DetachedResponse),
    /// It could not be started.
    Ended(ExecResponse),
}

async fn detach(context: &Context, client: &Client, sandbox: &str, request: &ExecRequest) -> Outcome {
    match client.post(&path(sandbox, "/execute"), request).await? {
        Detached::Runs(running) => {
            let answer = serde_json::json!({"pid": running.pid, "detached": true});
            output::answer(context.format, &answer, || running.pid.to_string());
            Ok(0)
        }
        Detached::Ended(ended) => {
            let answer = serde_json::json!({"exit_code": ended.exit_code, "stdout": "", "stderr": ended.stderr});
            match context.format {
                Format::Json => output::answer(Format::Json, &answer, String::new),
                Format::Text => drop(write!(io::stderr(), "heyvm: {}", ended.stderr)),
            }
            Ok(ended.exit_code)
        }
    }
}

fn request(args: &ExecArgs, format: Format) -> Result<ExecRequest, ApiError> {
    let env = args.env.iter().map(|text| names::parse_env(text)).collect::<Result<BTreeMap<_, _>, _>>()?;
    let timeout = args.timeout.as_deref().map(|text| names::parse_duration("--timeout", text)).transpose()?;
    let invalid = |message: &str, hint: &str| ApiError::new(ErrorCode::InvalidArgument, message).hint(hint);
    if args.tty && format == Format::Json {
        return Err(invalid("a terminal's output is no JSON document", "leave out --tty or --format json"));
    }
    let (command, rest) =
        args.command.split_first().ok_or_else(|| invalid("there is no command", "heyvm exec NAME -- COMMAND"))?;
    Ok(ExecRequest {
        command: command.clone(),
        args: Some(rest.to_vec()),
        env: if args.tty { terminal::with_kind(env) } else { env },
        cwd: args.cwd.clone(),
        user: args.user.clone(),
        session: args.session.clone(),
        timeout_seconds: timeout.map(|timeout| timeout.as_secs_f64()),
        stdin: !args.no_stdin && !args.detach && stdin::is_wanted(),
        detach: args.detach,
        pty: args.tty.then(terminal::size),
    })
}

/// Text mode: the streams as they come.
struct Streams {
    stdout: tokio::io::Stdout,
    stderr: tokio::io::Stderr,
}

impl Output for Streams {
    async fn stdout(&mut self, data: &[u8]) -> io::Result<()> {
        self.stdout.write_all(data).await?;
        self.stdout.flush().await
    }

    async fn stderr(&mut self, data: &[u8]) -> io::Result<()> {
        self.stderr.write_all(data).await?;
        self.stderr.flush().await
    }
}

/// JSON mode: all of it at the end.
struct Spools {
    stdout: Spool,
    stderr: Spool,
}

impl Output for Spools {
    async fn stdout(&mut self, data: &[u8]) -> io::Result<()> {
        self.stdout.push(data)
    }

    async fn stderr(&mut self, data: &[u8]) -> io::Result<()> {
        self.stderr.push(data)
    }
}

impl Spools {
    fn tell(mut self, end: &End) -> Outcome {
        if let Some(message) = &end.message {
            self.stderr.push(format!("heyvm: {message}\n").as_bytes()).map_err(conversation::cannot_keep)?;
        }
        let mut out = io::BufWriter::with_capacity(64 << 10, io::stdout().lock());
        match self.write(end, &mut out).and_then(|()| out.flush()) {
            Ok(()) => Ok(end.exit_code),
            Err(error) => output::cannot_write(&error),
        }
    }

    fn write(&mut self, end: &End, out: &mut impl Write) -> io::Result<()> {
        write!(out, "{{\n  \"exit_code\": {},\n  \"stdout\": \"", end.exit_code)?;
        self.stdout.write_escaped(out)?;
        write!(out, "\",\n  \"stderr\": \"")?;
        self.stderr.write_escaped(out)?;
        write!(out, "\"")?;
        if end.timed_out {
            write!(out, ",\n  \"timed_out\": true")?;
        }
        for (name, spool) in [("stdout_base64", &mut self.stdout), ("stderr_base64", &mut self.stderr)] {
            if !spool.is_text() {
                write!(out, ",\n  \"{name}\": \"")?;
                spool.write_base64(out)?;
                write!(out, "\"")?;
            }
        }
        writeln!(out, "\n}}")
    }
}

/// Whether somebody sits in front of it.
fn is_interactive() -> bool {
    io::stdin().is_terminal()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn document(stdout: &[u8], stderr: &[u8], end: &End) -> Value {
        let mut spools = Spools { stdout: Spool::new(), stderr: Spool::new() };
        spools.stdout.push(stdout).unwrap();
        spools.stderr.push(stderr).unwrap();
        let mut out = Vec::new();
        spools.write(end, &mut out).unwrap();
        serde_json::from_slice(&out).unwrap()
    }

    #[test]
    fn text_is_told_in_three_fields() {
        let end = End { exit_code: 0, timed_out: false, message: None, stdin_read: None };
        let told = document(b"hello\n", b"", &end);
        assert_eq!(told, json!({"exit_code": 0, "stdout": "hello\n", "stderr": ""}));
    }

    #[test]
    fn bytes_and_time_outs_have_fields_of_their_own() {
        let end = End { exit_code: 124, timed_out: true, message: None, stdin_read: None };
        let told = document(b"\xff\0x", b"fine", &end);
        assert_eq!(
            told,
            json!({"exit_code": 124, "stdout": "\u{fffd}\0x", "stderr": "fine", "timed_out": true, "stdout_base64": "/wB4"})
        );
    }
}
