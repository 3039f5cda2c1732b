//! A new archive in place of what a directory of a running sandbox holds. Files of the host are never among what is
//! replaced: where a mount lies at, above or below the directory, nothing is touched.

use std::path::{Path, PathBuf};

use std::sync::Arc;

use heyvm_api::{
    ApiError, ErrorCode,
    sandbox::{Mount, ReplaceMountRequest, SandboxInfo, Status},
};

use crate::{ControlPlane, Sandbox, Who, archives, not_running, spawn_detached};

/// What no archive takes the place of.
const SYSTEM: [&str; 8] = ["/", "/proc", "/sys", "/dev", "/bin", "/lib", "/usr", "/etc"];

impl ControlPlane {
    /// Puts an archive's content in place of everything in a directory: all of it, or nothing is changed. Programs that
    /// run go on with what they have read; a restart has them read it anew.
    pub async fn replace_mount(
        self: &Arc<Self>,
        who: &Who,
        request: ReplaceMountRequest,
    ) -> Result<SandboxInfo, ApiError> {
        let (plane, sandbox) = (Arc::clone(self), self.find(who)?);
        spawn_detached(async move { plane.replace_mount_now(&sandbox, request).await }).await
    }

    async fn replace_mount_now(
        &self,
        sandbox: &Arc<Sandbox>,
        request: ReplaceMountRequest,
    ) -> Result<SandboxInfo, ApiError> {
        let _one_transition = sandbox.transition.lock().await;
        let record = sandbox.snapshot();
        let path = checked(&request.sandbox_path.unwrap_or_else(|| record.working_directory.clone()))?;
        check_mounts(&path, &record.mounts)?;
        let vm = sandbox.vm().filter(|_| record.status == Status::Running).ok_or_else(|| not_running(&record))?;
        self.check_archive(&request.archive_id).await?;
        let root = request.archive_root.as_deref().map(archives::root).transpose()?;
        self.unpack(&vm, &record.account, &request.archive_id, root.as_deref(), &path, true).await?;
        let is_the_apps = path == record.working_directory;
        let record = self
            .save(sandbox, |record| {
                if is_the_apps {
                    (record.archive_id, record.archive_root) = (Some(request.archive_id), root);
                }
            })
            .await?;
        Ok(self.info(&record))
    }
}

fn checked(asked: &str) -> Result<String, ApiError> {
    let leaves = asked.split('/').any(|part| part == "..") || asked.contains('\0');
    let plain = Path::new(asked).components().collect::<PathBuf>().to_string_lossy().into_owned();
    if asked.starts_with('/') && !leaves && !SYSTEM.contains(&plain.as_str()) {
        return Ok(plain);
    }
    Err(ApiError::new(ErrorCode::InvalidArgument, format!("sandbox_path {asked:?} cannot be replaced"))
        .hint("use an absolute path of an app's directory, for example /workspace"))
}

/// Refuses a path that holds files of the host, or is held by a directory of them. The agent looks again, since a path
/// may lead elsewhere in the guest.
fn check_mounts(path: &str, mounts: &[Mount]) -> Result<(), ApiError> {
    let path = Path::new(path);
    let holds =
        |mount: &&Mount| path.starts_with(&mount.sandbox_path) || Path::new(&mount.sandbox_path).starts_with(path);
    let Some(mount) = mounts.iter().find(holds) else { return Ok(()) };
    let (host, at) = (&mount.host_path, &mount.sandbox_path);
    Err(ApiError::new(
        ErrorCode::InvalidState,
        format!("{} cannot be replaced: {host} of the host is mounted at {at}", path.display()),
    )
    .hint("Name another directory, change the files on the host, or make a sandbox without this mount."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_directory_is_not_replaced() {
        for bad in ["", "/", "//", "/etc/", "/proc", "workspace", "/srv/../etc", "/a\0b"] {
            assert_eq!(checked(bad).unwrap_err().code, ErrorCode::InvalidArgument, "{bad:?}");
        }
        assert_eq!(checked("/workspace//./a/").unwrap(), "/workspace/a");
    }

    #[test]
    fn files_of_the_host_are_not_replaced() {
        let mount = |at: &str| Mount { host_path: "/home/me/proj".into(), sandbox_path: at.into(), read_only: false };
        for (path, at) in [("/srv/app", "/srv/app"), ("/srv/app", "/srv/app/a/b"), ("/srv/app/a/b", "/srv/app")] {
            let error = check_mounts(path, &[mount("/other"), mount(at)]).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidState, "{path} {at}");
            assert!(error.message.contains("/home/me/proj") && error.message.contains(at), "{error:?}");
        }
        check_mounts("/srv/app", &[mount("/srv/apples"), mount("/srv/a"), mount("/data")]).unwrap();
    }
}
