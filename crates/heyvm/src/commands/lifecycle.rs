//! `stop`, `start`, `restart`, `resize`, `checkpoint`, `restore` and `rm`.

use std::io::{BufRead, IsTerminal, Write};

use heyvm_api::{
    ApiError, ErrorCode,
    orphans::RecoverRequest,
    sandbox::{ResizeRequest, SandboxInfo},
};
use serde::Serialize;

use super::{Context, Outcome, completions, list::word, path};
use crate::{output, progress::Progress};

/// `rm`.
#[derive(Debug, clap::Args)]
pub struct RmArgs {
    /// Id, name or slug (repeatable)
    #[arg(required = true, add = completions::sandboxes())]
    pub sandboxes: Vec<String>,
    /// Do not ask
    #[arg(short, long, visible_short_alias = 'f', visible_alias = "force")]
    pub yes: bool,
}

/// `recover`.
#[derive(Debug, clap::Args)]
pub struct RecoverArgs {
    /// Id of an orphan, or the beginning of it
    pub orphan: String,
    /// Its name from now on; the one it had when left out
    #[arg(long)]
    pub name: Option<String>,
}

/// `resize`.
#[derive(Debug, clap::Args)]
pub struct ResizeArgs {
    /// Id, name or slug
    #[arg(add = completions::sandboxes())]
    pub sandbox: String,
    /// micro, mini, small, medium, large or xlarge; a running sandbox is started again
    #[arg(long, add = completions::size_classes(), required_unless_present = "disk_size_gb", conflicts_with = "disk_size_gb")]
    pub size_class: Option<String>,
    /// Disk in GB, up to 250; it only grows
    #[arg(long, allow_negative_numbers = true)]
    pub disk_size_gb: Option<i64>,
}

/// Ends the VMs, keeps the disks.
pub async fn stop(context: &Context, sandboxes: &[String]) -> Outcome {
    let client = context.client().await?;
    each(context, sandboxes, "stopped", async |who| client.post(&path(who, "/stop"), &()).await).await
}

/// Goes on from the disks.
pub async fn start(context: &Context, sandboxes: &[String]) -> Outcome {
    let start = async |who: &str| told(context, who, "start", &format!("starting {who}"), &()).await.map(noted);
    each(context, sandboxes, "started", start).await
}

/// Stops and starts.
pub async fn restart(context: &Context, sandboxes: &[String]) -> Outcome {
    let restart = async |who: &str| told(context, who, "restart", &format!("restarting {who}"), &()).await.map(noted);
    each(context, sandboxes, "restarted", restart).await
}

/// Removes them, disks and all.
pub async fn rm(context: &Context, args: &RmArgs) -> Outcome {
    if !args.yes && std::io::stdin().is_terminal() {
        confirm(&args.sandboxes)?;
    }
    let client = context.client().await?;
    each(context, &args.sandboxes, "removed", async |who| client.delete(&path(who, "")).await).await
}

/// Does something to one after another; the first failure ends it, and tells what was `done` before. Prints one sandbox as
/// an object, several as an array.
async fn each(
    context: &Context,
    sandboxes: &[String],
    what: &str,
    act: impl AsyncFn(&str) -> Result<SandboxInfo, ApiError>,
) -> Outcome {
    let mut done = Vec::new();
    for who in sandboxes {
        done.push(act(who).await.map_err(|error| after(error, what, &done))?);
    }
    match &done[..] {
        [one] => output::answer(context.format, one, || ended(one)),
        all => output::answer(context.format, &all, || all.iter().map(ended).collect::<Vec<_>>().join("\n")),
    }
    Ok(0)
}

/// Adds to an error what was done before it.
fn after(mut error: ApiError, what: &str, done: &[SandboxInfo]) -> ApiError {
    if !done.is_empty() {
        let names: Vec<_> = done.iter().map(|info| info.name.as_str()).collect();
        error.message.push_str(&format!("; {what} before it: {}", names.join(", ")));
    }
    error
}

/// What it is now, and which step of its making or starting that has cut short.
fn ended(info: &SandboxInfo) -> String {
    let cut = info.reason.as_ref().map(|reason| &reason.message).filter(|message| message.contains(" at the step "));
    let cut = cut.map(|message| format!(" ({message})")).unwrap_or_default();
    format!("{} is {}{cut}", info.name, word(&info.status))
}

/// What is to be known of it, beside the answer.
fn noted(info: SandboxInfo) -> SandboxInfo {
    info.warnings.iter().for_each(|warning| output::note(warning));
    info
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

/// Makes an orphan a sandbox again.
pub async fn recover(context: &Context, args: RecoverArgs) -> Outcome {
    let request = RecoverRequest { name: args.name };
    let info: SandboxInfo = context.daemon().await?.post(&path(&args.orphan, "/recover"), &request).await?;
    let info = noted(info);
    output::answer(context.format, &info, || format!("{} is {} ({})", info.name, word(&info.status), info.id));
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
