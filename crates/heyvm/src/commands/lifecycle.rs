//! `stop`, `start`, `restart` and `rm`.

use std::io::{BufRead, IsTerminal, Write};

use heyvm_api::{ApiError, ErrorCode, sandbox::SandboxInfo};

use super::{Context, Outcome, list::word, path};
use crate::{output, progress::Progress};

/// `rm`.
#[derive(Debug, clap::Args)]
pub struct RmArgs {
    /// Id, name or slug (repeatable)
    #[arg(required = true)]
    pub sandboxes: Vec<String>,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
}

/// Ends the VM, keeps the disk.
pub async fn stop(context: &Context, who: &str) -> Outcome {
    let info: SandboxInfo = context.client().await?.post(&path(who, "/stop"), &()).await?;
    output::answer(context.format, &info, || format!("{} is {}", info.name, word(&info.status)));
    Ok(0)
}

/// Goes on from the disk.
pub async fn start(context: &Context, who: &str, verb: &str) -> Outcome {
    let client = context.client().await?;
    let progress = Progress::new(format!("{verb}ing {who}"));
    let started =
        client.post_with_progress(&path(who, &format!("/{verb}")), &(), None, |event| progress.tell(&event)).await;
    drop(progress);
    let info: SandboxInfo = started?;
    output::answer(context.format, &info, || format!("{} is {}", info.name, word(&info.status)));
    Ok(0)
}

/// Removes one or several; the first that cannot be removed ends it.
pub async fn rm(context: &Context, args: &RmArgs) -> Outcome {
    if !args.yes && std::io::stdin().is_terminal() {
        confirm(&args.sandboxes)?;
    }
    let client = context.client().await?;
    let mut removed: Vec<SandboxInfo> = Vec::new();
    for who in &args.sandboxes {
        removed.push(client.delete(&path(who, "")).await.map_err(|error| after(error, &removed))?);
    }
    match removed.as_slice() {
        [one] => output::answer(context.format, one, || format!("{} is removed", one.name)),
        all => output::answer(context.format, &all, || {
            all.iter().map(|info| format!("{} is removed\n", info.name)).collect()
        }),
    }
    Ok(0)
}

/// The error, with what was removed before it.
fn after(mut error: ApiError, removed: &[SandboxInfo]) -> ApiError {
    if !removed.is_empty() {
        let names: Vec<_> = removed.iter().map(|info| info.name.as_str()).collect();
        error.message.push_str(&format!("; removed before it: {}", names.join(", ")));
    }
    error
}

fn confirm(sandboxes: &[String]) -> Result<(), ApiError> {
    let failed =
        |error: std::io::Error| ApiError::new(ErrorCode::InvalidArgument, error.to_string()).hint("-y does not ask");
    let mut err = std::io::stderr();
    write!(err, "remove {} with everything in it? [y/N] ", sandboxes.join(", ")).map_err(failed)?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).map_err(failed)?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        return Ok(());
    }
    Err(ApiError::new(ErrorCode::InvalidArgument, "nothing was removed").hint("answer y, or use -y, to remove it"))
}
