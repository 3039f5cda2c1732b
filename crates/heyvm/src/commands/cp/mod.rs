//! `cp`: files and directories into a sandbox and out of it, as a tar stream.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
    pin::pin,
};

use futures::StreamExt;
use heyvm_api::{ApiError, ErrorCode};
use serde_json::{Value, json};
use tokio_util::io::{ReaderStream, SyncIoBridge};

use super::{Context, Outcome, encoded, path};
use crate::output;

/// `cp`.
#[derive(Debug, clap::Args)]
pub struct CpArgs {
    /// A path here, or SANDBOX:/path
    pub from: String,
    /// A path here, or SANDBOX:/path
    pub to: String,
}

/// Copies; one of the two paths is in a sandbox.
pub async fn cp(context: &Context, args: &CpArgs) -> Outcome {
    match (remote(&args.from), remote(&args.to)) {
        (None, Some((who, target))) => into(context, Path::new(&args.from), who, target).await?,
        (Some((who, source)), None) => out_of(context, who, source, Path::new(&args.to)).await?,
        _ => {
            return Err(invalid("one of the two paths must be in a sandbox").hint("write it NAME:/absolute/path"));
        }
    }
    output::answer(context.format, &json!({"from": args.from, "to": args.to, "copied": true}), String::new);
    Ok(0)
}

fn invalid(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::InvalidArgument, message)
}

/// `NAME:/path`; a path here may have a colon, but none behind which a `/` follows at once before any other.
fn remote(text: &str) -> Option<(&str, &str)> {
    let (who, path) = text.split_once(':')?;
    (!who.is_empty() && !who.contains('/') && path.starts_with('/')).then_some((who, path))
}

async fn into(context: &Context, source: &Path, who: &str, target: &str) -> Result<(), ApiError> {
    let io = |error: io::Error| {
        invalid(format!("{}: {error}", source.display())).hint("name a file or directory that is there")
    };
    let meta = fs::metadata(source).map_err(io)?;
    // A file goes under the name that the target ends with, a directory's content into the target.
    let as_directory = meta.is_dir() || target.ends_with('/');
    let (directory, name) = if as_directory {
        (target.to_owned(), source.file_name().map(PathBuf::from).unwrap_or_default())
    } else {
        let target = Path::new(target);
        let parent = target.parent().map_or("/".into(), |parent| parent.display().to_string());
        (parent, target.file_name().map(PathBuf::from).unwrap_or_default())
    };
    let (reader, writer) = tokio::io::duplex(256 << 10);
    let source_path = source.to_owned();
    let is_dir = meta.is_dir();
    let packing = tokio::task::spawn_blocking(move || {
        let mut archive = tar::Builder::new(SyncIoBridge::new(writer));
        archive.follow_symlinks(false);
        if is_dir {
            archive.append_dir_all("", &source_path)?;
        } else {
            archive.append_path_with_name(&source_path, &name)?;
        }
        archive.into_inner()?.shutdown()
    });
    let url = path(who, &format!("/files/tar?path={}", encoded(&directory)));
    let sent: Result<Value, ApiError> =
        context.client().await?.put(&url, "application/x-tar", ReaderStream::new(reader)).await;
    sent?;
    packing.await.map_err(|error| invalid(error.to_string()))?.map_err(io)
}

async fn out_of(context: &Context, who: &str, source: &str, target: &Path) -> Result<(), ApiError> {
    let url = path(who, &format!("/files/tar?path={}", encoded(source)));
    let pieces = context.client().await?.stream(&url, "application/x-tar").await?;
    let (mut writer, reader) = tokio::io::duplex(256 << 10);
    let (target, source) = (target.to_owned(), source.to_owned());
    let unpacking = tokio::task::spawn_blocking(move || unpack(SyncIoBridge::new(reader), &target, &source));
    let mut pieces = pin!(pieces);
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|error| invalid(format!("the copy broke off: {error}")))?;
        if tokio::io::AsyncWriteExt::write_all(&mut writer, &piece).await.is_err() {
            break;
        }
    }
    drop(writer);
    let unpacked = unpacking.await.map_err(|error| invalid(error.to_string()))?;
    unpacked
        .map_err(|error| invalid(format!("{error}")).hint("what a sandbox sends is unpacked only within the target"))
}

/// What comes from a sandbox is not trusted: nothing is written but within the target.
fn unpack(reader: impl io::Read, target: &Path, source: &str) -> io::Result<()> {
    let name = Path::new(source).file_name().unwrap_or_default();
    let mut archive = tar::Archive::new(reader);
    let mut entries = archive.entries()?;
    let Some(first) = entries.next() else {
        return fs::create_dir_all(target);
    };
    let mut first = first?;
    let single = first.header().entry_type().is_file() && first.path()?.as_os_str() == name;
    if single {
        let file = if target.is_dir() { target.join(name) } else { target.to_owned() };
        io::copy(&mut first, &mut fs::File::create(file)?)?;
        return Ok(());
    }
    fs::create_dir_all(target)?;
    checked(&mut first, target)?;
    for entry in entries {
        checked(&mut entry?, target)?;
    }
    Ok(())
}

fn checked(entry: &mut tar::Entry<'_, impl io::Read>, target: &Path) -> io::Result<()> {
    let path = entry.path()?.into_owned();
    let inside = path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    entry.set_preserve_permissions(false);
    if inside && entry.unpack_in(target)? {
        Ok(())
    } else {
        Err(io::Error::other(format!("{} leaves the target", path.display())))
    }
}
