//! `list` and `get`.

use heyvm_api::sandbox::{SandboxInfo, Status};

use super::{Context, Outcome, path};
use crate::output;

/// `list`.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// Also stopped ones, and those removed within a day
    #[arg(long, conflicts_with = "stopped")]
    pub all: bool,
    /// Only stopped and failed ones
    #[arg(long)]
    pub stopped: bool,
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
    let all: Vec<SandboxInfo> = context.client().await?.list(&format!("/sandboxes?filter={filter}")).await?;
    output::answer(context.format, &all, || {
        if all.is_empty() {
            return "no sandboxes; heyvm deploy DIR makes one".into();
        }
        let rows: Vec<Vec<String>> = all.iter().map(row).collect();
        output::table(&["NAME", "STATUS", "REGION", "IMAGE", "SIZE", "ENDS", "URL"], &rows)
    });
    Ok(0)
}

fn row(info: &SandboxInfo) -> Vec<String> {
    let ends = match (&info.reason, info.expires_at) {
        (Some(reason), _) => reason.message.chars().take(40).collect(),
        (None, Some(at)) => at.format("%Y-%m-%d %H:%M:%SZ").to_string(),
        (None, None) => "-".into(),
    };
    let url = info.urls.first().map_or("-".into(), |url| url.url.clone());
    let (status, size) = (word(&info.status), info.size_class.as_str().into());
    vec![info.name.clone(), status, info.region.clone(), info.image.clone(), size, ends, url]
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
