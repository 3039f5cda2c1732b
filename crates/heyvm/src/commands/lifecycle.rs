//! `stop`, `start`, `restart`, `resize`, `checkpoint`, `restore` and `rm`.

use std::io::{BufRead, IsTerminal, Write};

use heyvm_api::{
    ApiError, ErrorCode,
    sandbox::{ResizeRequest, SandboxInfo},
};
use serde::Serialize;

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

/// `resize`.
#[derive(Debug, clap::Args)]
pub struct ResizeArgs {
    /// Id, name or slug
    pub sandbox: String,
    /// micro, mini, small, medium, large or xlarge; a running sandbox is started again
    #[arg(long, required_unless_present = "disk_size_gb", conflicts_with = "disk_size_gb")]
    pub size_class: Option<String>,
    /// Disk in GB, up to 250; it only grows
    #[arg(long, allow_negative_numbers = true)]
    pub disk_size_gb: Option<i64>,
}

/// Ends the VM, keeps the disk.
pub async fn stop(context: &Context, who: &str) -> Outcome {
    let info: SandboxInfo = context.client().await?.post(&path(who, "/stop"), &()).await?;
    output::answer(context.format, &info, || format!("{} is {}", info.name, word(&info.status)));
    Ok(0)
}

/// Goes on from the disk.
pub async fn start(context: &Context, who: &str) -> Outcome {
    let info = told(context, who, "start", &format!("starting {who}"), &()).await?;
    output::answer(context.format, &info, || format!("{} is {}", info.name, word(&info.status)));
    Ok(0)
}

/// Stops and starts.
pub async fn restart(context: &Context, who: &str) -> Outcome {
    let info = told(context, who, "restart", &format!("restarting {who}"), &()).await?;
    output::answer(context.format, &info, || format!("{} is {}", info.name, word(&info.status)));
    Ok(0)
}

/// Goes back to the checkpoint.
pub async fn restore(context: &Context, who: &str) -> Outcome {
    let info = told(context, who, "restore", &format!("restoring {who}"), &()).await?;
    output::answer(context.format, &info, || format!("{} is {}", info.name, word(&info.status)));
    Ok(0)
}

/// Another size class or a larger disk.
pub async fn resize(context: &Context, args: ResizeArgs) -> Outcome {
    let request = ResizeRequest { size_class: args.size_class, disk_size_gb: args.disk_size_gb };
    let info = told(context, &args.sandbox, "resize", &format!("resizing {}", args.sandbox), &request).await?;
    output::answer(context.format, &info, || {
        format!("{} is {} with {} GB of disk", info.name, info.size_class.as_str(), info.disk_size_gb)
    });
    Ok(0)
}

/// Keeps a copy of the disk as it is now.
pub async fn checkpoint(context: &Context, who: &str) -> Outcome {
    let client = context.client().await?;
    let progress = Progress::new(format!("copying the disk of {who}"));
    let kept = client.post(&path(who, "/checkpoint"), &()).await;
    drop(progress);
    let info: SandboxInfo = kept?;
    output::answer(context.format, &info, || format!("{0} can go back to now: heyvm restore {0}", info.name));
    Ok(0)
}

/// A long call, its progress shown.
async fn told(
    context: &Context,
    who: &str,
    verb: &str,
    doing: &str,
    body: &impl Serialize,
) -> Result<SandboxInfo, ApiError> {
    let client = context.client().await?;
    let progress = Progress::new(doing.to_owned());
    let path = path(who, &format!("/{verb}"));
    client.post_with_progress(&path, body, None, |event| progress.tell(&event)).await
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
