//! `list` and `get`.

use heyvm_api::sandbox::{SandboxInfo, Status};

use super::{Context, Outcome, path};
use crate::output;

/// `list`.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// Also stopped ones, and those removed within a day
    #[arg(short, long, conflicts_with = "stopped")]
    pub all: bool,
    /// Only stopped and failed ones
    #[arg(long)]
    pub stopped: bool,
    /// Print ids alone, one a line (as JSON: an array of ids)
    #[arg(short, long)]
    pub quiet: bool,
}

/// A status in lower case.
pub fn word(status: &Status) -> String {
    serde_json::to_value(status).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// Sandboxes, newest first.
pub async fn list(context: &Context, args: &ListArgs) -> Outcome {
    let filter = match (args.all, args.stopped) {
        (true, _) => "all",
        (_, true) => "stopped",
        _ => "living",
    };
    let all: Vec<SandboxInfo> = context.client().await?.get(&format!("/sandboxes?filter={filter}")).await?;
    if args.quiet {
        let ids: Vec<_> = all.iter().map(|info| info.id.as_str()).collect();
        output::answer(context.format, &ids, || ids.join("\n"));
        return Ok(0);
    }
    output::answer(context.format, &all, || {
        if all.is_empty() {
            return "no sandboxes; heyvm deploy DIR makes one".into();
        }
        let mut columns = vec!["NAME", "STATUS", "REGION", "IMAGE", "SIZE", "ENDS", "URL"];
        // Only ended sandboxes have a reason.
        let has_reasons = all.iter().any(|info| info.reason.is_some());
        columns.extend(has_reasons.then_some("REASON"));
        let rows: Vec<Vec<String>> = all.iter().map(|info| row(info, has_reasons)).collect();
        output::table(&columns, &rows)
    });
    Ok(0)
}

fn row(info: &SandboxInfo, has_reasons: bool) -> Vec<String> {
    // A removed sandbox has no end before it.
    let ends = info.expires_at.filter(|_| info.status != Status::Removed);
    let ends = ends.map_or("-".into(), |at| at.format("%Y-%m-%d %H:%M:%SZ").to_string());
    let url = info.urls.first().map_or("-".into(), |url| url.url.clone());
    let (status, size) = (word(&info.status), info.size_class.as_str().into());
    let mut row = vec![info.name.clone(), status, info.region.clone(), info.image.clone(), size, ends, url];
    if has_reasons {
        row.push(info.reason.as_ref().map_or("-".into(), |reason| reason.message.chars().take(60).collect()));
    }
    row
}

/// Everything about one.
pub async fn get(context: &Context, who: &str) -> Outcome {
    let info: SandboxInfo = context.client().await?.get(&path(who, "")).await?;
    output::answer(context.format, &info, || text(&info));
    Ok(0)
}

fn text(info: &SandboxInfo) -> String {
    let mut lines = vec![
        format!("name     {}", info.name),
        format!("id       {}", info.id),
        format!("status   {}", word(&info.status)),
        format!("region   {}", info.region),
        format!("image    {}", info.image),
        format!("size     {} ({} GB disk)", info.size_class.as_str(), info.disk_size_gb),
        format!("created  {}", info.created_at.format("%Y-%m-%d %H:%M:%SZ")),
    ];
    if let Some(at) = info.expires_at {
        lines.push(format!("ends     {}", at.format("%Y-%m-%d %H:%M:%SZ")));
    }
    if let Some(command) = &info.start_command {
        lines.push(format!("start    {command}"));
    }
    lines.extend(info.urls.iter().map(|url| format!("url      {} -> port {}", url.url, url.port)));
    let local = info.urls.iter().filter_map(|url| Some((url.local_url.as_ref()?, url.port)));
    lines.extend(
        local.map(|(url, port)| format!("local    {url} -> port {port} (for programs that cannot resolve the url)")),
    );
    lines.extend(info.mounts.iter().map(|mount| {
        let only = if mount.read_only { " (read-only)" } else { "" };
        format!("mount    {} -> {}{only}", mount.host_path, mount.sandbox_path)
    }));
    if let Some(reason) = &info.reason {
        lines.push(format!("reason   {}", reason.message));
        lines.extend(reason.log_tail.iter().map(|line| format!("  | {line}")));
    }
    lines.extend(info.warnings.iter().map(|warning| format!("note     {warning}")));
    lines.join("\n")
}
