//! `daemon`, `doctor` and `--api`.

use std::{net::SocketAddr, path::PathBuf};

use heyvm_api::{
    ApiError, ErrorCode, headers,
    orphans::OrphanInfo,
    sandbox::SandboxInfo,
    system::{Check, CheckStatus, DoctorReport},
};
use heyvm_server::listening::Listening;
use serde::Serialize;
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
    /// Show whether it runs, where it listens, and its log
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
            let ended = if all { Some(stop_all(context).await?) } else { None };
            let ran = background::pid(&context.home).is_some();
            background::stop(&context.home)?;
            let (stopped, orphans) = ended.as_ref().map(|all| (&all.stopped[..], &all.orphans[..])).unwrap_or_default();
            let answer = json!({"running": false, "stopped": stopped, "orphans": orphans});
            output::answer(context.format, &answer, || match &ended {
                Some(all) => all.text(),
                None if ran => "the daemon has ended; sandboxes keep running".into(),
                None => "no daemon was running".into(),
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
    let Listening { edge, api } = Listening::of(&context.home);
    let status = DaemonStatus {
        running: is_running,
        pid,
        version,
        home: context.home.clone(),
        log: context.home.join("daemon.log"),
        edge,
        api,
    };
    output::answer(context.format, &status, || status.text());
    Ok(i32::from(!is_running))
}

/// Answer of `daemon status`.
#[derive(Debug, Serialize)]
struct DaemonStatus {
    running: bool,
    pid: Option<i32>,
    version: Option<String>,
    home: PathBuf,
    log: PathBuf,
    /// URLs of the proxy, where sandboxes' host names lead.
    edge: Vec<String>,
    /// URLs of the REST API, while `heyvm --api` serves it.
    api: Vec<String>,
}

impl DaemonStatus {
    fn text(&self) -> String {
        let mut lines = vec![match self.pid {
            Some(pid) if self.running => format!("status   running (process {pid})"),
            _ => "status   not running; the next command starts it".to_owned(),
        }];
        lines.extend(self.version.iter().map(|version| format!("version  {version}")));
        lines.extend(self.edge.iter().map(|url| format!("edge     {url}")));
        lines.extend(self.api.iter().map(|url| format!("api      {url}")));
        lines.push(format!("home     {}", self.home.display()));
        lines.push(format!("log      {}", self.log.display()));
        lines.join("\n")
    }
}

/// What `stop --all` came upon.
#[derive(Default)]
struct StoppedAll {
    /// Names of the sandboxes that it stopped.
    stopped: Vec<String>,
    /// They are no sandboxes, and are left as they are.
    orphans: Vec<OrphanInfo>,
}

impl StoppedAll {
    fn text(&self) -> String {
        let mut lines = vec![match self.stopped.as_slice() {
            [] => "no sandbox was running; the daemon has ended".to_owned(),
            stopped => format!("stopped {}; the daemon has ended", stopped.join(", ")),
        }];
        if !self.orphans.is_empty() {
            lines.push("disks that no record names are left where they are:".into());
            lines.extend(self.orphans.iter().map(|orphan| {
                let name = orphan.name.as_ref().map(|name| format!("{name}, ")).unwrap_or_default();
                let running = if orphan.running { ", its VM still runs" } else { "" };
                format!("  {} ({name}{} MiB{running})", orphan.id, orphan.size_bytes >> 20)
            }));
            lines.push("heyvm recover ID makes one a sandbox again, heyvm rm ID removes it".into());
        }
        lines.join("\n")
    }
}

/// Stops every living sandbox. VMs outlive a daemon: where none runs, one is started to find them.
async fn stop_all(context: &Context) -> Result<StoppedAll, ApiError> {
    if !context.home.join("sandboxes").is_dir() {
        return Ok(StoppedAll::default());
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
    // All that was asked for is done, whether these can be listed or not.
    Ok(StoppedAll { stopped, orphans: client.get("/orphans").await.unwrap_or_default() })
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

#[cfg(test)]
mod tests {
    use heyvm_api::orphans::OrphanStatus;

    use super::*;

    #[test]
    fn status_has_addresses_and_the_log_in_columns() {
        let status = DaemonStatus {
            running: true,
            pid: Some(7),
            version: Some("1.0.0".into()),
            home: "/h".into(),
            log: "/h/daemon.log".into(),
            edge: vec!["http://127.0.0.1:8480".into(), "http://[::1]:8480".into()],
            api: vec!["http://127.0.0.1:3000".into()],
        };
        let text = "status   running (process 7)\nversion  1.0.0\nedge     http://127.0.0.1:8480\n\
                    edge     http://[::1]:8480\napi      http://127.0.0.1:3000\nhome     /h\nlog      /h/daemon.log";
        assert_eq!(status.text(), text);
        let ended = DaemonStatus { running: false, pid: None, version: None, edge: vec![], api: vec![], ..status };
        let text = "status   not running; the next command starts it\nhome     /h\nlog      /h/daemon.log";
        assert_eq!(ended.text(), text);
    }

    #[test]
    fn stop_all_names_orphans_and_what_can_be_done_with_them() {
        let mut all = StoppedAll { stopped: vec!["web".into(), "db".into()], orphans: Vec::new() };
        assert_eq!(all.text(), "stopped web, db; the daemon has ended");
        all.orphans.push(OrphanInfo {
            id: "abc".into(),
            name: Some("old".into()),
            status: OrphanStatus::Orphaned,
            running: true,
            size_bytes: 5 << 20,
            changed_at: chrono::Utc::now(),
            image: None,
            store_id: None,
        });
        let text = all.text();
        assert!(text.contains("  abc (old, 5 MiB, its VM still runs)") && text.contains("heyvm recover ID"), "{text}");
    }
}
