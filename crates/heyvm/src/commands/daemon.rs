//! `daemon`, `doctor` and `--api`.

use std::net::SocketAddr;

use heyvm_api::{
    ApiError, ErrorCode,
    sandbox::SandboxInfo,
    system::{Check, CheckStatus, DoctorReport},
};
use serde_json::json;

use super::{Context, Outcome, path};
use crate::{cli::DaemonCommand, daemon as background, output};

/// Be it, tell of it, end it.
pub async fn daemon(context: &Context, command: DaemonCommand) -> Outcome {
    match command {
        DaemonCommand::Run => {
            let ended = heyvm_server::run_daemon(context.home.clone()).await;
            ended.map(|()| 0).map_err(|error| ApiError::new(ErrorCode::DaemonUnavailable, error.to_string()))
        }
        DaemonCommand::Status => status(context).await,
        DaemonCommand::Stop { all } => {
            if all {
                stop_all(context).await?;
            }
            background::stop(&context.home)?;
            output::answer(context.format, &json!({"running": false}), || "the daemon has ended".into());
            Ok(0)
        }
        DaemonCommand::Restart => {
            background::stop(&context.home)?;
            context.client().await?;
            status(context).await
        }
    }
}

async fn status(context: &Context) -> Outcome {
    let running = background::running(&context.home).await;
    let pid = background::pid(&context.home);
    let is_running = running.is_some();
    let version = running.and_then(|(_, version)| version);
    let answer = json!({"running": is_running, "pid": pid, "version": version, "home": context.home});
    output::answer(context.format, &answer, || match pid {
        Some(pid) if is_running => format!("running (process {pid})"),
        _ => "not running; the next command starts it".into(),
    });
    Ok(i32::from(!is_running))
}

async fn stop_all(context: &Context) -> Result<(), ApiError> {
    let Some((client, _)) = background::running(&context.home).await else { return Ok(()) };
    let all: Vec<SandboxInfo> = client.get("/sandboxes?filter=living").await?;
    for info in all {
        let _: SandboxInfo = client.post(&path(&info.id, "/stop"), &()).await?;
    }
    Ok(())
}

/// Whether this machine can run sandboxes; exit status 1 where it cannot.
pub async fn doctor(context: &Context) -> Outcome {
    let report = match context.client().await {
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
pub async fn api(context: &Context, listen: SocketAddr, allow_remote: bool) -> Outcome {
    context.client().await?;
    let secret = std::env::var("JWT_SECRET").ok().filter(|secret| !secret.is_empty());
    let ended = heyvm_server::run_api(context.home.clone(), listen, secret, allow_remote).await;
    ended.map(|()| 0).map_err(|error| ApiError::new(ErrorCode::DaemonUnavailable, error.to_string()))
}
