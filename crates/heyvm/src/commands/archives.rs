//! `archive`, `archive-dir`, `list-archives`, `delete-archive` and `update`.

use std::{io::Write, path::PathBuf};

use flate2::{Compression, write::GzEncoder};
use futures::TryStreamExt;
use heyvm_api::{
    ApiError, ErrorCode,
    archives::AccountArchive,
    sandbox::{ReplaceMountRequest, SandboxInfo, Status},
    system::ArchiveInfo,
};
use serde_json::json;

use super::{Context, Outcome, deploy::send, encoded, path};
use crate::{archive, output, progress::Progress};

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
    let progress = Progress::new(format!("packing {}", args.directory.display()));
    let packed = archive::pack(&args.directory, args.no_ignore, |done| progress.line().moved("packing", done))?;
    drop(progress);
    let own = || args.directory.canonicalize().ok()?.file_name().map(|name| name.to_string_lossy().into_owned());
    let name = args.name.clone().or_else(own).unwrap_or_else(|| "archive".into());
    let kept = send(&context.client().await?, packed, Some(&name)).await?;
    tell(context, &kept, &name)
}

/// A directory of a sandbox becomes one.
pub async fn archive(context: &Context, args: ArchiveArgs) -> Outcome {
    let client = context.client().await?;
    let info: SandboxInfo = client.get(&path(&args.sandbox, "")).await?;
    let from = args.path.clone().unwrap_or_else(|| info.working_directory.clone());
    let progress = Progress::new(format!("packing {from}"));
    let tar = path(&args.sandbox, &format!("/files/tar?path={}", encoded(&from)));
    let mut pieces = Box::pin(client.stream(&tar, "application/x-tar").await?);
    let unkept = |error: std::io::Error| {
        ApiError::new(ErrorCode::OutOfResources, format!("the archive cannot be kept: {error}"))
            .hint("make room in the directory for temporary files (TMPDIR)")
    };
    let mut packed = GzEncoder::new(tempfile::tempfile().map_err(unkept)?, Compression::fast());
    let mut size = 0;
    while let Some(piece) = pieces.try_next().await.map_err(unkept)? {
        size += piece.len() as u64;
        packed.write_all(&piece).map_err(unkept)?;
        progress.line().moved("packing", size);
    }
    let mut packed = packed.finish().map_err(unkept)?;
    std::io::Seek::rewind(&mut packed).map_err(unkept)?;
    drop(progress);
    let name = args.name.clone().unwrap_or(info.name);
    let kept = send(&client, packed, Some(&name)).await?;
    tell(context, &kept, &name)
}

fn tell(context: &Context, kept: &ArchiveInfo, name: &str) -> Outcome {
    let answer = json!({"id": kept.archive_id, "name": name, "size_bytes": kept.size_bytes});
    output::answer(context.format, &answer, || format!("ID: {}", kept.archive_id));
    Ok(0)
}

/// Archives that can be deployed, newest first.
pub async fn list_archives(context: &Context) -> Outcome {
    let all: Vec<AccountArchive> = context.client().await?.get("/archives").await?;
    output::answer(context.format, &all, || {
        if all.is_empty() {
            return "no archives; heyvm archive-dir DIR makes one".into();
        }
        let row = |archive: &AccountArchive| {
            vec![
                archive.id.clone(),
                archive.name.clone().unwrap_or_else(|| "-".into()),
                format!("{:.1} MB", archive.size_bytes as f64 / 1e6),
                archive.created_at.format("%Y-%m-%d %H:%M:%SZ").to_string(),
            ]
        };
        output::table(&["ID", "NAME", "SIZE", "MADE"], &all.iter().map(row).collect::<Vec<_>>())
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
