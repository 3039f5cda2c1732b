//! A new archive in place of what a directory of a running sandbox holds.

use heyvm_api::{
    ApiError, ErrorCode,
    sandbox::{ReplaceMountRequest, SandboxInfo, Status},
};

use crate::{ControlPlane, Who, archives, not_running};

/// What no archive takes the place of.
const SYSTEM: [&str; 8] = ["/", "/proc", "/sys", "/dev", "/bin", "/lib", "/usr", "/etc"];

impl ControlPlane {
    /// Puts an archive's content in place of everything in a directory: all of it, or nothing is changed. Programs that
    /// run go on with what they have read; a restart has them read it anew.
    pub async fn replace_mount(&self, who: &Who, request: ReplaceMountRequest) -> Result<SandboxInfo, ApiError> {
        let sandbox = self.find(who)?;
        let _one_transition = sandbox.transition.lock().await;
        let record = sandbox.snapshot();
        let vm = sandbox.vm().filter(|_| record.status == Status::Running).ok_or_else(|| not_running(&record))?;
        archives::check(&self.config.home, &request.archive_id)?;
        let root = request.archive_root.as_deref().map(archives::root).transpose()?;
        let path = checked(request.sandbox_path.unwrap_or_else(|| record.working_directory.clone()))?;
        self.unpack(&vm, &request.archive_id, root.as_deref(), &path, true).await?;
        let is_the_apps = path == record.working_directory;
        let record = self
            .save(&sandbox, |record| {
                if is_the_apps {
                    (record.archive_id, record.archive_root) = (Some(request.archive_id), root);
                }
            })
            .await?;
        Ok(self.info(&record))
    }
}

fn checked(path: String) -> Result<String, ApiError> {
    let plain = path.trim_end_matches('/');
    let leaves = path.split('/').any(|part| part == "..") || path.contains('\0');
    if path.starts_with('/') && !leaves && !SYSTEM.contains(&plain) && !plain.is_empty() {
        return Ok(plain.to_owned());
    }
    Err(ApiError::new(ErrorCode::InvalidArgument, format!("sandbox_path {path:?} cannot be replaced"))
        .hint("use an absolute path of an app's directory, for example /workspace"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_directory_is_not_replaced() {
        for bad in ["", "/", "//", "/etc/", "/proc", "workspace", "/srv/../etc", "/a\0b"] {
            assert_eq!(checked(bad.into()).unwrap_err().code, ErrorCode::InvalidArgument, "{bad:?}");
        }
        assert_eq!(checked("/workspace/".into()).unwrap(), "/workspace");
    }
}
