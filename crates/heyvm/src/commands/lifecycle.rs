//! `stop`, `start`, `restart` and `rm`.

use std::io::{BufRead, IsTerminal, Write};

use heyvm_api::{ApiError, ErrorCode, sandbox::SandboxInfo};

use super::{Context, Outcome, inspect::word, path};
use crate::{cli::RmArgs, output, progress::Progress};

/// Ends the VM, keeps the disk.
pub async fn stop(context: &Context, who: &str) -> Outcome {
    let info: SandboxInfo = context.client().await?.post(&path(who, "/stop"), &()).await?;
    output::answer(context.format, &info, || format!("{} is {}", info.name, word(&info.status)));
    Ok(0)
}

/// Goes on from the disk.
pub async fn start(context: &Context, who: &str, verb: &str) -> Outcome {
    let client = context.client().await?;
    let mut progress = Progress::new();
    let started =
        client.post_with_progress(&path(who, &format!("/{verb}")), &(), None, |event| progress.tell(&event)).await;
    drop(progress);
    let info: SandboxInfo = started?;
    output::answer(context.format, &info, || format!("{} is {}", info.name, word(&info.status)));
    Ok(0)
}

/// Removes one or several; the first that cannot be removed ends it.
pub async fn rm(context: &Context, args: &RmArgs) -> Outcome {
    if !args.yes && std::io::stdin().is_terminal() && !confirmed(&args.sandboxes)? {
        return Ok(1);
    }
    let client = context.client().await?;
    let mut removed: Vec<SandboxInfo> = Vec::new();
    for who in &args.sandboxes {
        removed.push(client.delete(&path(who, "")).await?);
    }
    match removed.as_slice() {
        [one] => output::answer(context.format, one, || format!("{} is removed", one.name)),
        all => output::answer(context.format, &all, || {
            all.iter().map(|info| format!("{} is removed\n", info.name)).collect()
        }),
    }
    Ok(0)
}

fn confirmed(sandboxes: &[String]) -> Result<bool, ApiError> {
    let failed =
        |error: std::io::Error| ApiError::new(ErrorCode::InvalidArgument, error.to_string()).hint("-y does not ask");
    let mut err = std::io::stderr();
    write!(err, "remove {} with everything in it? [y/N] ", sandboxes.join(", ")).map_err(failed)?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).map_err(failed)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
