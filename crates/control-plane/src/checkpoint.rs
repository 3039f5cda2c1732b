//! A sandbox's disk as it was at one moment, to go back to. There is one such copy at most; the next takes its place.

use std::sync::Arc;

use chrono::Utc;
use heyvm_api::{ApiError, ErrorCode, sandbox::SandboxInfo};

use crate::{ControlPlane, ProgressSink, Who, errors, spawn_detached, tell};

impl ControlPlane {
    /// Keeps a copy of the disk as it is now. What runs goes on; its writes wait meanwhile.
    pub async fn checkpoint(self: &Arc<Self>, who: &Who) -> Result<SandboxInfo, ApiError> {
        let (plane, sandbox) = (Arc::clone(self), self.find(who)?);
        spawn_detached(async move {
            let _one_transition = sandbox.transition.lock().await;
            plane.must_be_settled(&sandbox).await?;
            let id = sandbox.record().id.clone();
            let running = sandbox.vm().map(|vm| vm.agent());
            plane.driver.checkpoint(&id, running).await.map_err(errors::vm)?;
            let record = plane.save(&sandbox, |record| record.checkpoint_at = Some(Utc::now())).await?;
            Ok(plane.info(&record))
        })
        .await
    }

    /// Goes back to the copy: stops, puts the disk back, starts. The copy stays.
    pub async fn restore(self: &Arc<Self>, who: &Who, progress: ProgressSink) -> Result<SandboxInfo, ApiError> {
        let (plane, sandbox) = (Arc::clone(self), self.find(who)?);
        spawn_detached(async move {
            let _one_transition = sandbox.transition.lock().await;
            plane.must_be_settled(&sandbox).await?;
            let record = sandbox.snapshot();
            if record.checkpoint_at.is_none() {
                return Err(ApiError::new(ErrorCode::InvalidState, format!("{} has no checkpoint", record.name))
                    .hint(format!("heyvm checkpoint {} makes one", record.name))
                    .sandbox(record.id));
            }
            plane.stop_now(&sandbox).await?;
            tell(&progress, "vm", "putting the disk back");
            plane.driver.restore(&record.id).await.map_err(errors::vm)?;
            plane.start_now(&sandbox, &progress).await
        })
        .await
    }
}
