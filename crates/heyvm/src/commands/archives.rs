//! `archive`, `archive-dir`, `list-archives`, `delete-archive` and `update`.

use std::path::PathBuf;

use futures::TryStreamExt;
use heyvm_api::{
    ApiError, ErrorCode,
    archives::AccountArchive,
    sandbox::{ReplaceMountRequest, SandboxInfo, Status},
    system::ArchiveInfo,
};
use serde_json::json;
use tokio_util::io::{StreamReader, SyncIoBridge};

use super::{
    Context, Outcome,
    deploy::{archives_path, plan, send},
    encoded, path,
};
use crate::{
    archive::Compressor,
    outgoing::{self, Outgoing},
    output,
    progress::Progress,
};

/// `archive`.
#[derive(Debug, clap::Args)]
pub struct ArchiveArgs {
    /// Id, name or slug
    pub sandbox: String,
    /// The directory to keep; its working directory when absent
    #[arg(long, value_name = "PATH")]
    pub path: Option<String>,
    /// What to call the archive; the sandbox's name when absent
    #[arg(long)]
    pub name: Option<String>,
}

/// `archive-dir`.
#[derive(Debug, clap::Args)]
pub struct ArchiveDirArgs {
    /// Directory with the app
    pub directory: PathBuf,
    /// What to call the archive; the directory's name when absent
    #[arg(long)]
    pub name: Option<String>,
    /// Take also what .gitignore, .heyvmignore and the default list leave out
    #[arg(long)]
    pub no_ignore: bool,
}

/// `delete-archive`.
#[derive(Debug, clap::Args)]
pub struct DeleteArchiveArgs {
    /// Its id
    pub archive: String,
}

/// `update`.
#[derive(Debug, clap::Args)]
pub struct UpdateArgs {
    /// Id, name or slug
    pub sandbox: String,
    /// The archive whose content is to be there
    #[arg(long)]
    pub archive: String,
    /// The directory whose content it replaces; the working directory when absent
    #[arg(long, value_name = "PATH")]
    pub path: Option<String>,
    /// Leave the start command running
    #[arg(long)]
    pub no_restart: bool,
}

/// A directory of this machine becomes an archive, to be deployed any number of times.
pub async fn archive_dir(context: &Context, args: ArchiveDirArgs) -> Outcome {
    let plan = plan(context, &args.directory, args.no_ignore)?;
    let own = || args.directory.canonicalize().ok()?.file_name().map(|name| name.to_string_lossy().into_owned());
    let name = args.name.clone().or_else(own).unwrap_or_else(|| "archive".into());
    let kept = send(context, &context.client().await?, plan, Some(&name)).await?;
    tell(context, &kept, &name)
}

/// A directory of a sandbox becomes one.
pub async fn archive(context: &Context, args: ArchiveArgs) -> Outcome {
    let client = context.client().await?;
    let info: SandboxInfo = client.get(&path(&args.sandbox, "")).await?;
    let from = args.path.clone().unwrap_or_else(|| info.working_directory.clone());
    let progress = Progress::new(format!("packing {from}"));
    let tar = path(&args.sandbox, &format!("/files/tar?path={}", encoded(&from)));
    let (line, mut moved) = (progress.line(), 0);
    let pieces = client.stream(&tar, "application/x-tar").await?.inspect_ok(move |piece| {
        moved += piece.len() as u64;
        line.moved("packing", moved);
    });
    let mut tar = SyncIoBridge::new(StreamReader::new(Box::pin(pieces)));
    let (outgoing, body) = outgoing::pipe();
    let compression = context.compression();
    let packing = tokio::task::spawn_blocking(move || {
        let mut packed = Compressor::new(compression, outgoing)?;
        std::io::copy(&mut tar, &mut packed)?;
        packed.finish().and_then(Outgoing::finish)
    });
    let name = args.name.clone().unwrap_or(info.name);
    let kept = client.put(&archives_path(Some(&name)), "application/gzip", body).await;
    let packed = packing.await.map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))?;
    drop(progress);
    // A broken pipe is the server's refusal, which says more.
    if let Err(error) = packed.as_ref()
        && error.kind() != std::io::ErrorKind::BrokenPipe
    {
        return Err(ApiError::new(ErrorCode::SandboxUnreachable, format!("could not pack {from}: {error}"))
            .hint("heyvm get NAME says whether the sandbox still runs"));
    }
    let kept = kept?;
    tell(context, &kept, &name)
}

fn tell(context: &Context, kept: &ArchiveInfo, name: &str) -> Outcome {
    let answer = json!({"id": kept.archive_id, "name": name, "size_bytes": kept.size_bytes});
    output::answer(context.format, &answer, || format!("ID: {}", kept.archive_id));
    Ok(0)
}

/// `list-archives`.
#[derive(Debug, clap::Args)]
pub struct ListArchivesArgs {
    /// Also those without a name, which deploys leave, and who uses them
    #[arg(long)]
    pub all: bool,
}

/// Archives that can be deployed, newest first.
pub async fn list_archives(context: &Context, args: &ListArchivesArgs) -> Outcome {
    let all = if args.all { every_archive(context).await? } else { context.client().await?.get("/archives").await? };
    output::answer(context.format, &all, || {
        if all.is_empty() {
            return "no archives; heyvm archive-dir DIR makes one".into();
        }
        let columns = if args.all { 5 } else { 4 };
        let row = |archive: &AccountArchive| {
            let mut row = vec![
                archive.id.clone(),
                archive.name.clone().unwrap_or_else(|| "-".into()),
                format!("{:.1} MB", archive.size_bytes as f64 / 1e6),
                archive.created_at.format("%Y-%m-%d %H:%M:%SZ").to_string(),
                archive.used_by.join(", "),
            ];
            row.truncate(columns);
            row
        };
        output::table(&["ID", "NAME", "SIZE", "MADE", "USED BY"][..columns], &all.iter().map(row).collect::<Vec<_>>())
    });
    Ok(0)
}

/// Those without a name, too. A server removes an account's by itself.
async fn every_archive(context: &Context) -> Result<Vec<AccountArchive>, ApiError> {
    if context.cloud.is_some() {
        return Err(ApiError::new(ErrorCode::Unsupported, "a server lists archives with a name alone")
            .hint("It removes what deploys leave by itself; leave out --all."));
    }
    context.client().await?.get("/archives?all=true").await
}

/// Removes archives that have no name and that no sandbox uses.
pub async fn prune_archives(context: &Context) -> Outcome {
    let all = every_archive(context).await?;
    let client = context.client().await?;
    let mut removed = Vec::new();
    for archive in all.into_iter().filter(|archive| archive.name.is_none() && archive.used_by.is_empty()) {
        client.delete_quietly(&format!("/archives/{}", encoded(&archive.id))).await?;
        removed.push(archive);
    }
    let bytes: u64 = removed.iter().map(|archive| archive.size_bytes).sum();
    let ids: Vec<_> = removed.iter().map(|archive| &archive.id).collect();
    output::answer(context.format, &json!({"removed": ids, "freed_bytes": bytes}), || {
        format!("removed {} archives, freed {:.1} MB", ids.len(), bytes as f64 / 1e6)
    });
    Ok(0)
}

/// Sandboxes that were made from it go on.
pub async fn delete_archive(context: &Context, id: &str) -> Outcome {
    context.client().await?.delete_quietly(&format!("/archives/{}", encoded(id))).await?;
    output::answer(context.format, &json!({"id": id, "removed": true}), || format!("{id} is removed"));
    Ok(0)
}

/// A new version of the app in a sandbox that runs: its directory's content is replaced, then it is restarted.
pub async fn update(context: &Context, args: &UpdateArgs) -> Outcome {
    let client = context.client().await?;
    let progress = Progress::new(format!("updating {}", args.sandbox));
    let request =
        ReplaceMountRequest { archive_id: args.archive.clone(), sandbox_path: args.path.clone(), archive_root: None };
    let mut info: SandboxInfo = client.post(&path(&args.sandbox, "/replace-mount"), &request).await?;
    if info.start_command.is_some() && !args.no_restart {
        let restart = path(&args.sandbox, "/restart");
        info = client.post_with_progress(&restart, &(), None, |event| progress.tell(&event)).await?;
    }
    drop(progress);
    output::answer(context.format, &info, || {
        let how = if info.status == Status::Running { "runs" } else { "has" };
        format!("{} {how} {}", info.name, args.archive)
    });
    Ok(0)
}
