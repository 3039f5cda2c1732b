//! `list`, `get` and `logs`.

use std::{
    io::{self, Write},
    pin::pin,
};

use futures::StreamExt;
use heyvm_api::sandbox::{SandboxInfo, Status};
use serde::{Deserialize, Serialize};

use super::{Context, Outcome, path};
use crate::{
    cli::{ListArgs, LogsArgs},
    output::{self, Format},
};

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
    output::answer(context.format, &all, || {
        if all.is_empty() {
            return "no sandboxes; heyvm deploy DIR makes one".into();
        }
        let rows: Vec<Vec<String>> = all.iter().map(row).collect();
        output::table(&["NAME", "STATUS", "IMAGE", "SIZE", "ENDS", "URL"], &rows)
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
    vec![info.name.clone(), word(&info.status), info.image.clone(), info.size_class.as_str().into(), ends, url]
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
    if let Some(reason) = &info.reason {
        lines.push(format!("reason   {}", reason.message));
        lines.extend(reason.log_tail.iter().map(|line| format!("  | {line}")));
    }
    lines.extend(info.warnings.iter().map(|warning| format!("note     {warning}")));
    lines.join("\n")
}

/// One line of a log as the API streams it.
#[derive(Deserialize)]
struct LogLine {
    stream: String,
    text: String,
}

#[derive(Serialize)]
struct Logs {
    logs: String,
    stdout: String,
    stderr: String,
}

/// What the start command printed: each stream to its own, as it came.
pub async fn logs(context: &Context, args: &LogsArgs) -> Outcome {
    let client = context.client().await?;
    let follow = if args.follow { "?follow=true" } else { "" };
    let lines = client.stream(&path(&args.sandbox, &format!("/logs{follow}")), "application/x-ndjson").await?;
    let mut lines = pin!(lines);
    let mut all = Logs { logs: String::new(), stdout: String::new(), stderr: String::new() };
    let mut buffer: Vec<u8> = Vec::new();
    while let Some(piece) = lines.next().await {
        let Ok(piece) = piece else { break };
        buffer.extend(piece);
        while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = buffer.drain(..=end).collect();
            if let Ok(line) = serde_json::from_slice::<LogLine>(&line) {
                show(context.format, &line, &mut all);
            }
        }
    }
    if context.format == Format::Json {
        output::json(&all);
    }
    Ok(0)
}

fn show(format: Format, line: &LogLine, all: &mut Logs) {
    let is_stderr = line.stream == "stderr";
    if format == Format::Json {
        all.logs.push_str(&line.text);
        if is_stderr { &mut all.stderr } else { &mut all.stdout }.push_str(&line.text);
        return;
    }
    let written = if is_stderr {
        io::stderr().write_all(line.text.as_bytes())
    } else {
        let mut out = io::stdout();
        out.write_all(line.text.as_bytes()).and_then(|()| out.flush())
    };
    if written.is_err() {
        std::process::exit(0);
    }
}
