//! A sandbox becomes another size: another size class, which takes another VM, or a larger disk, which grows as it runs.

use std::sync::Arc;

use heyvm_api::{
    ApiError, ErrorCode,
    sandbox::{ResizeRequest, SandboxInfo, SizeClass, Status},
};

use crate::{
    ControlPlane, ProgressSink, Sandbox, Who, errors, not_running, spawn_detached,
    validate::{self, Resize},
};

impl ControlPlane {
    /// Changes the size class, or makes the disk larger. What runs is started again with another class, and goes on with
    /// another disk.
    pub async fn resize(
        self: &Arc<Self>,
        who: &Who,
        request: &ResizeRequest,
        progress: ProgressSink,
    ) -> Result<SandboxInfo, ApiError> {
        let wanted = validate::resize(request)?;
        let (plane, sandbox) = (Arc::clone(self), self.find(who)?);
        spawn_detached(async move {
            let _one_transition = sandbox.transition.lock().await;
            plane.must_be_settled(&sandbox).await?;
            match wanted {
                Resize::Class(class) => plane.change_class(&sandbox, class, &progress).await?,
                Resize::Disk(gib) => plane.grow_disk(&sandbox, gib).await?,
            }
            Ok(plane.info(&sandbox.snapshot()))
        })
        .await
    }

    /// Running with its VM known, stopped or failed. The transition lock is held.
    pub(crate) async fn must_be_settled(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<(), ApiError> {
        // One that was running before this daemon may not have been found yet.
        if sandbox.record().status == Status::Running && sandbox.vm().is_none() {
            self.adopt(sandbox).await?;
        }
        let record = sandbox.snapshot();
        let settled = matches!(record.status, Status::Running | Status::Stopped | Status::Failed) && !record.removing;
        if settled { Ok(()) } else { Err(not_running(&record)) }
    }

    async fn change_class(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        class: SizeClass,
        progress: &ProgressSink,
    ) -> Result<(), ApiError> {
        let record = sandbox.snapshot();
        if record.size_class == class {
            return Ok(());
        }
        if record.status != Status::Running {
            return self.save(sandbox, |record| record.size_class = class).await.map(drop);
        }
        self.stop_now(sandbox).await?;
        self.save(sandbox, |record| record.size_class = class).await?;
        self.start_now(sandbox, progress).await.map(drop)
    }

    async fn grow_disk(&self, sandbox: &Arc<Sandbox>, gib: u32) -> Result<(), ApiError> {
        let record = sandbox.snapshot();
        if gib < record.disk_gib {
            let message = format!("the disk of {} has {} GB and cannot become smaller", record.name, record.disk_gib);
            let hint = "a disk only grows; a new sandbox can have a smaller one";
            return Err(ApiError::new(ErrorCode::InvalidState, message).hint(hint).sandbox(record.id));
        }
        if gib == record.disk_gib {
            return Ok(());
        }
        // Without a VM it grows at the next start.
        if let Some(vm) = sandbox.vm() {
            vm.grow_disk(gib).await.map_err(errors::vm)?;
        }
        sandbox.disk.forget();
        self.save(sandbox, |record| record.disk_gib = gib).await.map(drop)
    }
}
