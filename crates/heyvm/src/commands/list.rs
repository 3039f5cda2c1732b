//! `list` and `get`.

use chrono::Utc;
use heyvm_api::{
    orphans::OrphanInfo,
    sandbox::{AgentState, RestartPolicy, SandboxInfo, Status},
};
use serde::{Serialize, Serializer, ser::SerializeSeq};

use super::{Context, Outcome, path};
use crate::output;

/// `list`.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// Also stopped ones, those removed within a day, and orphaned disks
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
    let client = context.client().await?;
    let all: Vec<SandboxInfo> = client.list(&format!("/sandboxes?filter={filter}")).await?;
    // A server's accounts have none: a lost record is its operator's affair.
    let orphans: Vec<OrphanInfo> = match args.all && context.cloud.is_none() {
        true => client.get("/orphans").await?,
        false => Vec::new(),
    };
    if args.quiet {
        let ids = all.iter().map(|info| info.id.as_str()).chain(orphans.iter().map(|orphan| orphan.id.as_str()));
        let ids: Vec<_> = ids.collect();
        output::answer(context.format, &ids, || ids.join("\n"));
        return Ok(0);
    }
    let listed = Listed { all: &all, orphans: &orphans };
    output::answer(context.format, &listed, || {
        if all.is_empty() && orphans.is_empty() {
            return "no sandboxes; heyvm deploy DIR makes one".into();
        }
        let mut columns = vec!["NAME", "STATUS", "REGION", "IMAGE", "SIZE", "EXPIRES", "URL"];
        // Only ended sandboxes have a reason, and only orphans an age.
        let has_reasons = !orphans.is_empty() || all.iter().any(|info| reason(info).is_some());
        columns.extend(has_reasons.then_some("REASON"));
        let rows = all.iter().map(|info| row(info, has_reasons)).chain(orphans.iter().map(orphan_row));
        output::table(&columns, &rows.collect::<Vec<_>>())
    });
    Ok(0)
}

/// Sandboxes, then orphans: one list, as each says by its status what it is.
struct Listed<'a> {
    all: &'a [SandboxInfo],
    orphans: &'a [OrphanInfo],
}

impl Serialize for Listed<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.all.len() + self.orphans.len()))?;
        self.all.iter().try_for_each(|info| list.serialize_element(info))?;
        self.orphans.iter().try_for_each(|orphan| list.serialize_element(orphan))?;
        list.end()
    }
}

fn orphan_row(orphan: &OrphanInfo) -> Vec<String> {
    let name = orphan.name.as_ref().map_or(orphan.id.clone(), |name| format!("{name} ({})", orphan.id));
    let hours = (Utc::now() - orphan.changed_at).num_hours().max(0);
    let size = format!("{} MiB", orphan.size_bytes >> 20);
    let (image, running) = (orphan.image.clone().unwrap_or("-".into()), if orphan.running { ", running" } else { "" });
    let reason = format!("no record names it; {hours} h old{running}");
    vec![name, "orphaned".into(), "-".into(), image, size, "-".into(), "-".into(), reason]
}

/// A reason's characters in a list; `get` has all of it.
const REASON: usize = 60;

fn row(info: &SandboxInfo, has_reasons: bool) -> Vec<String> {
    // A removed sandbox has no end before it; a stopped one is removed in its time, too.
    let expires = info.expires_at.filter(|_| info.status != Status::Removed);
    let expires = expires.map_or("-".into(), |at| at.format("%Y-%m-%d %H:%M:%SZ").to_string());
    let url = info.urls.first().map_or("-".into(), |url| url.url.clone());
    let (status, size) = (listed_status(info), info.size_class.as_str().into());
    let mut row = vec![info.name.clone(), status, info.region.clone(), info.image.clone(), size, expires, url];
    if has_reasons {
        row.push(reason(info).map_or("-".into(), in_one_line));
    }
    row
}

/// The status, and what goes on within it.
fn listed_status(info: &SandboxInfo) -> String {
    let step = info.step.as_deref().and_then(|step| step.split(':').next()).map(str::to_owned);
    let next = || info.next_start_at.map(|at| format!("starts again at {}", at.format("%H:%M:%SZ")));
    let silent = || info.agent.map(|AgentState::Unresponsive| "unresponsive".to_owned());
    let detail = step.or_else(next).or_else(silent).map(|detail| format!(" ({detail})"));
    word(&info.status) + &detail.unwrap_or_default()
}

/// Why it does not run. A server that cannot ask a sandbox's region has a message alone.
fn reason(info: &SandboxInfo) -> Option<&str> {
    info.reason.as_ref().map(|reason| reason.message.as_str()).or(info.error_message.as_deref())
}

fn in_one_line(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.chars().count() <= REASON {
        return line;
    }
    line.chars().take(REASON - 1).chain(['…']).collect()
}

/// Everything about one.
pub async fn get(context: &Context, who: &str) -> Outcome {
    let info: SandboxInfo = context.client().await?.get(&path(who, "")).await?;
    output::answer(context.format, &info, || text(&info));
    Ok(0)
}

fn status(info: &SandboxInfo) -> String {
    let step = info.step.as_ref().map(|step| format!(" ({step})"));
    word(&info.status) + &step.unwrap_or_default()
}

fn text(info: &SandboxInfo) -> String {
    let mut lines = vec![
        format!("name     {}", info.name),
        format!("id       {}", info.id),
        format!("status   {}", status(info)),
        format!("region   {}", info.region),
        format!("image    {}", info.image),
        format!("size     {} ({} GB disk)", info.size_class.as_str(), info.disk_size_gb),
        format!("created  {}", info.created_at.format("%Y-%m-%d %H:%M:%SZ")),
    ];
    if let Some(at) = info.expires_at {
        lines.push(format!("expires  {}", at.format("%Y-%m-%d %H:%M:%SZ")));
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
    if info.restart != RestartPolicy::Never || info.restart_count > 0 {
        let next = info.next_start_at.map(|at| format!(", next start at {}", at.format("%Y-%m-%d %H:%M:%SZ")));
        let (policy, count) = (info.restart.as_str(), info.restart_count);
        lines.push(format!("restart  {policy} ({count} so far{})", next.unwrap_or_default()));
    }
    if info.agent.is_some() {
        lines.push("agent    unresponsive".into());
    }
    if let Some(reason) = &info.reason {
        lines.push(format!("reason   {}", reason.message));
        lines.extend(reason.log_tail.iter().map(|line| format!("  | {line}")));
    }
    lines.extend(info.warnings.iter().map(|warning| format!("note     {warning}")));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use chrono::TimeZone;
    use heyvm_api::sandbox::{Reason, ReasonCode};
    use serde_json::json;

    use super::*;

    fn sandbox(status: &str) -> SandboxInfo {
        let at = "2026-11-30T12:00:00Z";
        serde_json::from_value(json!({
            "id": "1", "name": "web", "slug": "web", "status": status, "image": "i", "image_requested": null,
            "backend_type": "qemu", "region": "local", "size_class": "small", "disk_size_gb": 10, "is_deployed": false,
            "archive_id": null, "created_at": at, "status_changed_at": at, "uptime_secs": 0, "ttl_seconds": 3600,
            "expires_at": "2026-11-30T13:00:00Z", "env_vars": {}, "start_command": null, "working_directory": "/",
            "setup_hooks": [], "error_message": null, "reason": null, "urls": []
        }))
        .unwrap()
    }

    #[test]
    fn columns_hold_what_their_heads_say() {
        let expires = "2026-11-30 13:00:00Z";
        let columns = |info: &SandboxInfo| {
            let row = row(info, true);
            [row[1].clone(), row[5].clone(), row[7].clone()]
        };
        assert_eq!(columns(&sandbox("running")), ["running", expires, "-"]);

        let message = "the start command\nexited with 1";
        let reason = Reason {
            code: ReasonCode::StartCommandExited,
            message: message.into(),
            exit_code: Some(1),
            log_tail: Vec::new(),
        };
        let next_start_at = Utc.with_ymd_and_hms(2026, 11, 30, 12, 0, 30).single();
        let mut info = SandboxInfo { reason: Some(reason), next_start_at, ..sandbox("failed") };
        let status = "failed (starts again at 12:00:30Z)";
        assert_eq!(columns(&info), [status, expires, "the start command exited with 1"]);

        info.reason.as_mut().unwrap().message = "é".repeat(61);
        assert_eq!(columns(&info)[2], "é".repeat(59) + "…");

        let unreachable = SandboxInfo { error_message: Some("eu is unreachable".into()), ..sandbox("stopped") };
        assert_eq!(columns(&unreachable), ["stopped", expires, "eu is unreachable"]);
        let silent = SandboxInfo { agent: Some(AgentState::Unresponsive), ..sandbox("running") };
        assert_eq!(columns(&silent)[0], "running (unresponsive)");
        assert_eq!(columns(&sandbox("removed"))[1], "-", "it has no end before it");
    }
}
