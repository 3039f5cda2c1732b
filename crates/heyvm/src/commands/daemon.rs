//! `daemon`, `doctor` and `--api`.

use std::net::SocketAddr;

use heyvm_api::{
    ApiError, ErrorCode, headers,
    sandbox::SandboxInfo,
    system::{Check, CheckStatus, DoctorReport},
};
use serde_json::json;

use super::{Context, Outcome, path};
use crate::{
    background::{self, Daemon},
    cli::Serve,
    output,
    service::{Done, Service},
};

/// `daemon`.
#[derive(Debug, clap::Args)]
pub struct DaemonArgs {
    #[command(subcommand)]
    pub command: DaemonCommand,
}

impl DaemonArgs {
    /// Whether this process is to be the daemon.
    pub fn is_run(&self) -> bool {
        matches!(self.command, DaemonCommand::Run)
    }
}

/// What can be done with the daemon.
#[derive(Debug, clap::Subcommand)]
pub enum DaemonCommand {
    /// Be the daemon
    #[command(hide = true)]
    Run,
    /// Tell whether it runs
    Status,
    /// End it; sandboxes keep running unless --all
    Stop {
        /// Stop all sandboxes first
        #[arg(long)]
        all: bool,
    },
    /// End it and start it again; sandboxes keep running
    Restart,
    /// Have systemd start it at boot, so that sandboxes with --restart always come back
    Install,
    /// Have systemd start it at boot no more
    Uninstall,
}

/// Be it, tell of it, end it.
pub async fn daemon(context: &Context, command: DaemonCommand) -> Outcome {
    match command {
        DaemonCommand::Run => {
            heyvm_server::run_daemon(context.home.clone()).await.map_err(told)?;
            Ok(0)
        }
        DaemonCommand::Status => status(context).await,
        DaemonCommand::Stop { all } => {
            let stopped = if all { stop_all(context).await? } else { Vec::new() };
            let ran = background::pid(&context.home).is_some();
            background::stop(&context.home)?;
            let answer = json!({"running": false, "stopped": stopped});
            output::answer(context.format, &answer, || match (all, ran) {
                (true, _) if stopped.is_empty() => "no sandbox was running; the daemon has ended".into(),
                (true, _) => format!("stopped {}; the daemon has ended", stopped.join(", ")),
                (false, true) => "the daemon has ended; sandboxes keep running".into(),
                (false, false) => "no daemon was running".into(),
            });
            Ok(0)
        }
        DaemonCommand::Restart => {
            background::stop(&context.home)?;
            context.daemon().await?;
            status(context).await
        }
        DaemonCommand::Install => {
            let program = std::env::current_exe().map_err(|error| {
                ApiError::new(ErrorCode::HostNotReady, format!("could not find this program: {error}"))
            })?;
            let done = Service::of_caller()?.install(&program, &context.home)?;
            Ok(service_answer(context, "installed", &done))
        }
        DaemonCommand::Uninstall => Ok(service_answer(context, "removed", &Service::of_caller()?.uninstall()?)),
    }
}

fn service_answer(context: &Context, verb: &str, done: &Done) -> i32 {
    let answer = json!({"unit": done.unit, "left_to_run": done.left});
    output::answer(context.format, &answer, || {
        let mut lines = vec![format!("{verb} {}", done.unit.display())];
        lines.extend(done.left.iter().map(|command| format!("  did not work, run it yourself: {command}")));
        lines.join("\n")
    });
    i32::from(!done.left.is_empty())
}

async fn status(context: &Context) -> Outcome {
    let daemon = background::daemon(&context.home).await;
    let pid = background::pid(&context.home);
    let (is_running, version) = match daemon {
        Daemon::Running { health, .. } => (true, Some(health.version)),
        Daemon::Silent => return Err(background::silent(&context.home)),
        Daemon::Absent => (false, None),
    };
    let answer = json!({"running": is_running, "pid": pid, "version": version, "home": context.home});
    output::answer(context.format, &answer, || match pid {
        Some(pid) if is_running => format!("running (process {pid})"),
        _ => "not running; the next command starts it".into(),
    });
    Ok(i32::from(!is_running))
}

/// Stops every living sandbox; the names of those. VMs outlive a daemon: where none runs, one is started to find them.
async fn stop_all(context: &Context) -> Result<Vec<String>, ApiError> {
    if !context.home.join("sandboxes").is_dir() {
        return Ok(Vec::new());
    }
    let client = context.daemon().await?;
    let everyones = client.clone().for_account(headers::EVERY_ACCOUNT)?;
    let all: Vec<SandboxInfo> = everyones.list("/sandboxes?filter=living").await?;
    let mut stopped = Vec::new();
    for info in all {
        let client = match &info.account_id {
            Some(account) => client.clone().for_account(account)?,
            None => client.clone(),
        };
        let _: SandboxInfo = client.post(&path(&info.id, "/stop"), &()).await?;
        stopped.push(info.name);
    }
    Ok(stopped)
}

/// Whether this machine can run sandboxes; exit status 1 where it cannot.
pub async fn doctor(context: &Context) -> Outcome {
    let report = match context.daemon().await {
        Ok(client) => client.get("/doctor").await?,
        Err(error) => DoctorReport {
            ok: false,
            acceleration: "unknown".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            checks: vec![Check {
                name: "daemon".into(),
                status: CheckStatus::Fail,
                message: [vec![error.message], error.log_tail].concat().join("; "),
                hint: error.hint,
            }],
        },
    };
    output::answer(context.format, &report, || {
        let mut lines = Vec::new();
        for check in &report.checks {
            let mark = match check.status {
                CheckStatus::Ok => "ok  ",
                CheckStatus::Warn => "warn",
                CheckStatus::Fail => "FAIL",
            };
            lines.push(format!("{mark}  {:<13} {}", check.name, check.message));
            lines.extend(check.hint.iter().map(|hint| format!("      {:<13} -> {hint}", "")));
        }
        lines.join("\n")
    });
    Ok(i32::from(!report.ok))
}

/// Serves the REST API in the foreground.
pub async fn api(context: &Context, serve: &Serve) -> Outcome {
    context.daemon().await?;
    let secret = std::env::var("JWT_SECRET").ok().filter(|secret| !secret.is_empty());
    let listen = SocketAddr::new(serve.listen, serve.port);
    heyvm_server::run_api(context.home.clone(), listen, secret, serve.allow_remote).await.map_err(told)?;
    Ok(0)
}

pub(super) fn told(error: heyvm_server::Error) -> ApiError {
    use heyvm_server::Error;
    let message = error.to_string();
    match error {
        Error::NotReady(error) => error,
        Error::Config { .. } => {
            ApiError::new(ErrorCode::InvalidArgument, message).hint("correct that key, or take it out of the file")
        }
        Error::Tls(_) => ApiError::new(ErrorCode::InvalidArgument, message)
            .hint("[edge.tls] names PEM files that fit each other, [edge.acme] an authority; docs/server.md has both"),
        Error::Exposed(_) => {
            ApiError::new(ErrorCode::InvalidArgument, message).hint("leave --listen out to serve this machine alone")
        }
        Error::AlreadyRunning(_) => ApiError::new(ErrorCode::DaemonUnavailable, message)
            .hint("heyvm daemon stop ends it; sandboxes keep running"),
        Error::Io { .. } => ApiError::new(ErrorCode::DaemonUnavailable, message)
            .hint("is the port taken, or the directory not yours? --port and HEYO_HOME name others"),
    }
}
