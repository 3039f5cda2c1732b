//! `mount-add`, and what `--mount` says.

use std::path::{Path, PathBuf};

use heyvm_api::{
    ApiError, ErrorCode,
    sandbox::{Mount, SandboxInfo, Status},
};

use super::{Context, Outcome, path};
use crate::output;

/// `mount-add`.
#[derive(Debug, clap::Args)]
pub struct MountAddArgs {
    /// Id, name or slug
    #[arg(long)]
    pub id: String,
    /// Directory of this machine
    #[arg(long, value_name = "DIRECTORY")]
    pub host_path: PathBuf,
    /// Where the sandbox sees it
    #[arg(long, value_name = "PATH")]
    pub sandbox_path: String,
    /// The sandbox may not change it
    #[arg(long)]
    pub read_only: bool,
}

/// A directory of this machine appears in a sandbox.
pub async fn mount_add(context: &Context, args: &MountAddArgs) -> Outcome {
    let mount = Mount {
        host_path: whole(&args.host_path)?,
        sandbox_path: args.sandbox_path.clone(),
        read_only: args.read_only,
    };
    let info: SandboxInfo = context.client().await?.post(&path(&args.id, "/mounts"), &mount).await?;
    output::answer(context.format, &info, || {
        let when = if info.status == Status::Running { "is" } else { "will be, when it starts," };
        format!("{} {when} at {} in {}", mount.host_path, mount.sandbox_path, info.name)
    });
    Ok(0)
}

/// `HOST:SANDBOX`, with `:ro` behind it where the sandbox may only read. A relative directory is one of the caller's.
pub fn parse(text: &str) -> Result<Mount, ApiError> {
    let (paths, read_only) = match text.strip_suffix(":ro") {
        Some(paths) => (paths, true),
        None => (text.strip_suffix(":rw").unwrap_or(text), false),
    };
    // The sandbox's path is absolute, the host's may hold anything.
    let Some((host, sandbox)) = paths.rsplit_once(":/").filter(|(host, _)| !host.is_empty()) else {
        let message = format!("--mount {text:?} is not HOST:SANDBOX");
        return Err(ApiError::new(ErrorCode::InvalidArgument, message)
            .hint("for example --mount ./data:/data, or --mount ./data:/data:ro for reading alone"));
    };
    Ok(Mount { host_path: whole(Path::new(host))?, sandbox_path: format!("/{sandbox}"), read_only })
}

/// The daemon has another directory than its caller.
fn whole(path: &Path) -> Result<String, ApiError> {
    let refused = |why: String| {
        let message = format!("{} cannot be mounted: {why}", path.display());
        ApiError::new(ErrorCode::InvalidDirectory, message).hint("name a directory that is there")
    };
    let whole = std::path::absolute(path).map_err(|error| refused(error.to_string()))?;
    whole.into_os_string().into_string().map_err(|_| refused("its name is not UTF-8".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_mount_says() {
        let parsed = |text: &str| parse(text).map(|mount| (mount.host_path, mount.sandbox_path, mount.read_only));
        assert_eq!(parsed("/a:/b").unwrap(), ("/a".into(), "/b".into(), false));
        assert_eq!(parsed("/a:/b:ro").unwrap(), ("/a".into(), "/b".into(), true));
        assert_eq!(parsed("/a:/b:rw").unwrap(), ("/a".into(), "/b".into(), false));
        assert_eq!(parsed("/a:b:/c").unwrap(), ("/a:b".into(), "/c".into(), false));
        assert!(parsed("sub:/b").unwrap().0.ends_with("/sub"));
        for bad in ["", "/a", "/a:b", ":/b", "/a:ro"] {
            let error = parse(bad).unwrap_err();
            assert!(error.code == ErrorCode::InvalidArgument && error.hint.is_some(), "{bad:?}");
        }
    }
}
