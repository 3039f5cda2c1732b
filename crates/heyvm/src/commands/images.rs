//! `images` and `pull`.

use std::path::{Path, PathBuf};

use heyvm_api::{
    ApiError, ErrorCode,
    client::Client,
    images::{ImageInfo, ImportRequest, PruneRequest, PruneResponse, PullRequest},
};
use serde_json::json;

use super::{Context, Outcome, encoded};
use crate::{output, progress::Progress};

/// `pull`.
#[derive(Debug, clap::Args)]
pub struct PullArgs {
    /// For example ubuntu:24.04
    pub image: String,
}

/// `images`.
#[derive(Debug, clap::Args)]
pub struct ImagesArgs {
    #[command(subcommand)]
    pub command: Option<ImagesCommand>,
}

/// What can be done with images. All but the list is about this machine, also after `heyvm login`.
#[derive(Debug, clap::Subcommand)]
pub enum ImagesCommand {
    /// List images here
    #[command(after_help = "Example:\n  heyvm images list --format json")]
    List,
    /// Take an image from a docker save tar, an OCI layout or a root tar
    #[command(after_help = "Example:\n  heyvm images import app.tar --name app:1")]
    Import {
        /// The file or directory
        path: PathBuf,
        /// Name to know it by
        #[arg(long)]
        name: Option<String>,
    },
    /// Remove an image
    #[command(after_help = "Example:\n  heyvm images rm app:1")]
    Rm {
        /// Its name
        name: String,
    },
    /// Remove images that no sandbox uses (the default image stays)
    #[command(after_help = "Example:\n  heyvm images prune")]
    Prune {
        /// Also remove imported images, which no registry can give again
        #[arg(long)]
        all: bool,
    },
    /// Take the guests' kernel from an unpacked kernel package, or from /
    #[command(after_help = "Example:\n  heyvm images import-kernel /tmp/linux-image")]
    ImportKernel {
        /// Directory with boot/vmlinuz-VERSION and lib/modules/VERSION
        directory: PathBuf,
    },
    /// Make sure that the default image and its template are there
    #[command(after_help = "Example:\n  heyvm images prepare")]
    Prepare,
}

/// Whatever is to be done with images; listing is the default.
pub async fn images(context: &Context, args: ImagesArgs) -> Outcome {
    match args.command.unwrap_or(ImagesCommand::List) {
        ImagesCommand::List => list(context).await,
        ImagesCommand::Import { path, name } => {
            let path = absolute(&path)?;
            long(context.daemon().await?, context, "/images/import", &ImportRequest { path, name }).await
        }
        ImagesCommand::Rm { name } => {
            context.daemon().await?.delete_quietly(&format!("/images/{}", encoded(&name).replace("%2F", "/"))).await?;
            output::answer(context.format, &json!({"name": name, "removed": true}), || format!("{name} is removed"));
            Ok(0)
        }
        ImagesCommand::Prune { all } => prune(context, all).await,
        ImagesCommand::ImportKernel { directory } => import_kernel(context, &directory).await,
        ImagesCommand::Prepare => long(context.daemon().await?, context, "/images/prepare", &()).await,
    }
}

async fn prune(context: &Context, all: bool) -> Outcome {
    let pruned: PruneResponse = context.daemon().await?.post("/images/prune", &PruneRequest { all }).await?;
    output::answer(context.format, &pruned, || {
        let mut lines: Vec<String> = pruned.removed.iter().map(|name| format!("{name} is removed")).collect();
        lines.push(format!("{:.0} MB are free again", pruned.freed_bytes as f64 / 1e6));
        lines.join("\n")
    });
    Ok(0)
}

/// Fetches an image from its registry.
pub async fn pull(context: &Context, image: &str) -> Outcome {
    long(context.client().await?, context, "/images/pull", &PullRequest { image: image.to_owned() }).await
}

fn absolute(path: &Path) -> Result<String, ApiError> {
    let found = path.canonicalize().map_err(|error| {
        ApiError::new(ErrorCode::InvalidArgument, format!("{}: {error}", path.display()))
            .hint("name a file that is there")
    })?;
    Ok(found.display().to_string())
}

async fn list(context: &Context) -> Outcome {
    let all: Vec<ImageInfo> = context.client().await?.get("/images").await?;
    output::answer(context.format, &all, || {
        let row = |image: &ImageInfo| {
            let size = format!("{:.0} MB", image.size_bytes as f64 / 1e6);
            let digest = image.digest.chars().take(19).collect();
            vec![
                image.name.clone(),
                size,
                image.source.clone(),
                digest,
                if image.is_default { "default" } else { "" }.into(),
            ]
        };
        output::table(&["NAME", "SIZE", "FROM", "DIGEST", ""], &all.iter().map(row).collect::<Vec<_>>())
    });
    Ok(0)
}

async fn long(client: Client, context: &Context, path: &str, body: &impl serde::Serialize) -> Outcome {
    let progress = Progress::new("preparing the image");
    let done = client.post_with_progress(path, body, None, |event| progress.tell(&event)).await;
    drop(progress);
    let image: ImageInfo = done?;
    output::answer(context.format, &image, || {
        format!("{} ({:.0} MB) is here", image.name, image.size_bytes as f64 / 1e6)
    });
    Ok(0)
}

/// Set-up, not a request: the tree is this user's, and no daemon is needed.
async fn import_kernel(context: &Context, directory: &Path) -> Outcome {
    let failed = |error: heyvm_images::Error| {
        let source = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
        ApiError::new(ErrorCode::HostNotReady, format!("{error}{source}"))
            .hint("name an unpacked kernel package, or / for this system's own kernel")
    };
    let store = heyvm_images::ImageStore::open(&context.home, Default::default()).map_err(failed)?;
    let version = store.import_kernel(directory).await.map_err(failed)?;
    output::answer(context.format, &json!({"kernel": version}), || format!("guest kernel {version} is here"));
    Ok(0)
}
