//! Stop, start, remove, and what happens by itself: a start command ends, a guest panics, a time-to-live runs out.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use chrono::Utc;
use heyvm_agent_protocol::v1::Exit as MainExit;
use heyvm_api::{
    ApiError,
    sandbox::{Reason, ReasonCode, SandboxInfo, Status},
};
use heyvm_vm::{Exit, ExitCause, Vm};

use crate::{
    ControlPlane, ProgressSink, Sandbox, Who, apart,
    create::cut_short,
    errors,
    guest_command::shown,
    main_command::Main,
    not_running, ready,
    record::{self, Record},
    tell, validate,
};

/// What processes get to end in order.
pub(crate) const GRACE: Duration = Duration::from_secs(5);
/// What could not be done about an expired sandbox is tried again after this.
const AGAIN: chrono::Duration = chrono::Duration::seconds(1);

impl ControlPlane {
    /// Ends the VM, keeps the disk. Stopping a stopped one succeeds.
    pub async fn stop(self: &Arc<Self>, who: &Who) -> Result<SandboxInfo, ApiError> {
        let (plane, sandbox) = (Arc::clone(self), self.find(who)?);
        apart(async move {
            let _one_transition = sandbox.transition.lock().await;
            plane.stop_now(&sandbox).await
        })
        .await
    }

    /// The transition lock is held.
    pub(crate) async fn stop_now(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<SandboxInfo, ApiError> {
        // One that was running before this daemon may not have been found yet.
        if sandbox.record().status == Status::Running && sandbox.vm().is_none() {
            self.adopt(sandbox).await?;
        }
        let record = sandbox.snapshot();
        match (record.status, record.reason.clone()) {
            _ if record.removing => return Err(not_running(&record)),
            (Status::Stopped, _) => {}
            // Why it failed stays to be read, also when it was kept running to be looked into.
            (Status::Failed, Some(why)) if sandbox.vm().is_some() => self.end(sandbox, Status::Failed, why).await?,
            (Status::Failed, _) => {}
            _ => {
                self.end(sandbox, Status::Stopped, record::reason(ReasonCode::Stopped, "stopped by a request")).await?
            }
        }
        Ok(self.info(&sandbox.snapshot()))
    }

    /// Ends the VM in order. The transition lock is held.
    async fn end(&self, sandbox: &Sandbox, status: Status, reason: Reason) -> Result<(), ApiError> {
        self.save(sandbox, |record| record.enter(Status::Stopping, Some(reason.clone()))).await?;
        if let Some(vm) = sandbox.vm() {
            vm.stop(GRACE).await.map_err(errors::vm)?;
        }
        sandbox.set_vm(None);
        self.save(sandbox, |record| record.enter(status, Some(reason))).await.map(drop)
    }

    /// Goes on from the disk and runs the start command again. Starting a running one succeeds.
    pub async fn start(self: &Arc<Self>, who: &Who, progress: ProgressSink) -> Result<SandboxInfo, ApiError> {
        let (plane, sandbox) = (Arc::clone(self), self.find(who)?);
        apart(async move {
            let _one_transition = sandbox.transition.lock().await;
            plane.start_now(&sandbox, &progress).await
        })
        .await
    }

    /// The transition lock is held.
    pub(crate) async fn start_now(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        progress: &ProgressSink,
    ) -> Result<SandboxInfo, ApiError> {
        let record = sandbox.snapshot();
        match record.status {
            Status::Running => return Ok(self.info(&record)),
            Status::Stopped | Status::Failed => {}
            _ => return Err(not_running(&record)),
        }
        if let Some(reason) = sandbox.removal.borrow().clone() {
            return Err(cut_short(&reason).sandbox(record.id));
        }
        self.save(sandbox, |record| record.enter(Status::Provisioning, None)).await?;
        let started = tokio::select! {
            started = self.start_again(sandbox, progress) => started,
            reason = sandbox.removal_asked() => {
                self.destroy(sandbox, reason.clone()).await?;
                return Err(cut_short(&reason).sandbox(record.id));
            }
        };
        if let Err(error) = started {
            let step = error.step.clone().unwrap_or_else(|| "vm".into());
            let mut reason =
                record::reason(ReasonCode::FailedStep, format!("failed at step {step}: {}", error.message));
            reason.exit_code = error.exit_code;
            reason.log_tail.clone_from(&error.log_tail);
            if let Err(error) = self.end(sandbox, Status::Failed, reason).await {
                tracing::error!(%error, id = record.id, "a sandbox that did not start could not be put away");
            }
            return Err(error.sandbox(record.id));
        }
        Ok(self.info(&sandbox.snapshot()))
    }

    async fn start_again(self: &Arc<Self>, sandbox: &Arc<Sandbox>, progress: &ProgressSink) -> Result<(), ApiError> {
        let record = sandbox.snapshot();
        let spec = self.spec_of(&record).await.map_err(|error| error.step("image"))?;
        tell(progress, "template", "preparing the template");
        self.driver
            .prepare(&spec, self.forward(progress, "template"))
            .await
            .map_err(|error| errors::vm(error).step("vm"))?;
        tell(progress, "vm", "starting the VM");
        // One that failed but was kept running is ended first: a start begins anew.
        if let Some(vm) = sandbox.vm() {
            vm.stop(GRACE).await.map_err(errors::vm)?;
        }
        let vm = self.driver.start(&record.id, &spec).await.map_err(|error| errors::vm(error).step("vm"))?;
        sandbox.set_vm(Some(Arc::clone(&vm)));
        self.mount_all(sandbox, &vm).await.map_err(|error| error.step("mount"))?;
        let mut main = self.run_start_command(sandbox, &vm, progress).await?;
        self.wait_until_ready(sandbox, &vm, main.as_mut(), progress).await?;
        self.save(sandbox, Record::run).await?;
        self.watch(sandbox, vm, main);
        Ok(())
    }

    /// Stop, then start, with nothing in between.
    pub async fn restart(self: &Arc<Self>, who: &Who, progress: ProgressSink) -> Result<SandboxInfo, ApiError> {
        let (plane, sandbox) = (Arc::clone(self), self.find(who)?);
        apart(async move {
            let _one_transition = sandbox.transition.lock().await;
            plane.stop_now(&sandbox).await?;
            plane.start_now(&sandbox, &progress).await
        })
        .await
    }

    /// Destroys it with disk and URLs; told of for a day. Removing a removed one succeeds.
    pub async fn remove(self: &Arc<Self>, who: &Who) -> Result<SandboxInfo, ApiError> {
        let (plane, sandbox) = (Arc::clone(self), self.find(who)?);
        let reason = record::reason(ReasonCode::Removed, "removed by a request");
        apart(async move {
            plane.remove_for(&sandbox, reason).await?;
            Ok(plane.info(&sandbox.snapshot()))
        })
        .await
    }

    /// Cuts short what goes on with it, then destroys it.
    pub(crate) async fn remove_for(&self, sandbox: &Arc<Sandbox>, reason: Reason) -> Result<(), ApiError> {
        sandbox.ask_removal(reason.clone());
        let _one_transition = sandbox.transition.lock().await;
        if sandbox.record().status == Status::Removed {
            return Ok(());
        }
        let removed = self.destroy(sandbox, reason).await;
        if !sandbox.record().removing {
            sandbox.take_removal_back();
        }
        removed
    }

    /// Sets the time-to-live anew, from now on.
    pub async fn set_ttl(&self, who: &Who, ttl_seconds: Option<i64>) -> Result<SandboxInfo, ApiError> {
        let ttl = validate::check_ttl(ttl_seconds)?;
        let sandbox = self.find(who)?;
        let _one_transition = sandbox.transition.lock().await;
        if sandbox.record().removing {
            return Err(not_running(&sandbox.snapshot()));
        }
        let record = self
            .save(&sandbox, |record| {
                let age = (Utc::now() - record.created_at).num_seconds().max(0);
                record.ttl_seconds = ttl.map(|ttl| age.saturating_add(ttl));
            })
            .await?;
        Ok(self.info(&record))
    }

    /// That it goes is written down first, then VM, disk and URLs go; only then it is told to be gone. What cannot be
    /// removed now stays on its way out: the next `rm` or the next daemon goes on with it. The transition lock is held.
    pub(crate) async fn destroy(&self, sandbox: &Sandbox, reason: Reason) -> Result<(), ApiError> {
        let record = self
            .save(sandbox, |record| {
                // One that was on its way out already keeps its first reason.
                let first = record.reason.take().filter(|_| record.removing);
                record.waiting_to_replace = false;
                record.removing = true;
                record.enter(Status::Stopping, Some(first.unwrap_or(reason)));
            })
            .await?;
        self.unbind_all(&record.id).await;
        sandbox.set_vm(None);
        self.driver.destroy(&record.id).await.map_err(errors::vm)?;
        self.forget_mounts(&record.id);
        self.save(sandbox, |record| {
            record.enter(Status::Removed, record.reason.clone());
            record.drop_content();
        })
        .await?;
        self.prune_images().await;
        self.store.remove_keys(&record.id).await.map_err(errors::store)
    }

    /// Follows a running VM to its end: its start command, its process.
    pub(crate) fn watch(self: &Arc<Self>, sandbox: &Arc<Sandbox>, vm: Arc<dyn Vm>, main: Option<Main>) {
        let (plane, sandbox) = (Arc::clone(self), Arc::clone(sandbox));
        tokio::spawn(async move {
            let mut main = main;
            let ended = tokio::select! {
                exit = vm.exited() => Ended::Vm(exit),
                exit = ready::ended(main.as_mut()) => Ended::Main(exit),
            };
            let _one_transition = sandbox.transition.lock().await;
            // Whoever ended it on purpose has said so already.
            if !sandbox.vm().is_some_and(|now| Arc::ptr_eq(&now, &vm)) {
                return;
            }
            if let Err(error) = plane.put_away_after(&sandbox, ended).await {
                tracing::error!(%error, "a sandbox that ended could not be put away");
            }
        });
    }

    async fn put_away_after(&self, sandbox: &Sandbox, ended: Ended) -> Result<(), ApiError> {
        let record = sandbox.snapshot();
        match record.status {
            Status::Running => {
                let log_tail = self.log_tail(&record.id);
                let (status, reason) = match ended {
                    Ended::Vm(exit) => judge(exit, log_tail),
                    Ended::Main(exit) => judge_main(&exit, log_tail),
                };
                self.end(sandbox, status, reason).await
            }
            // It was kept running after a failure, which stays the reason.
            Status::Failed => {
                sandbox.set_vm(None);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Removes what has expired and forgets what was removed a day ago, for as long as the daemon runs.
    pub(crate) async fn sweep_forever(self: Arc<Self>) {
        loop {
            self.deadlines.wait().await;
            self.sweep().await;
        }
    }

    pub(crate) async fn sweep(self: &Arc<Self>) {
        let now = Utc::now();
        for id in self.deadlines.take_due(now) {
            let Some(sandbox) = self.with_id(&id) else { continue };
            let (is_removed, deadline) = {
                let record = sandbox.record();
                (record.status == Status::Removed, record.deadline())
            };
            if deadline.is_none_or(|at| at > now) {
                self.deadlines.set(&id, deadline);
            } else if is_removed {
                self.forget(&id).await;
            } else if !sandbox.expiring.swap(true, Ordering::Relaxed) {
                // Each on its own: one that is slow to end keeps no other alive, nor those whose time runs out meanwhile.
                tokio::spawn(Arc::clone(self).expire(sandbox));
            }
        }
    }

    async fn expire(self: Arc<Self>, sandbox: Arc<Sandbox>) {
        let reason = record::reason(ReasonCode::TtlExpired, "its time-to-live ran out");
        if let Err(error) = self.remove_for(&sandbox, reason).await {
            tracing::error!(%error, "a sandbox whose time ran out could not be removed");
        }
        sandbox.expiring.store(false, Ordering::Relaxed);
        // What could not be removed is tried again, and so is what got another deadline meanwhile.
        let (id, removed) = {
            let record = sandbox.record();
            (record.id.clone(), record.status == Status::Removed)
        };
        if !removed {
            self.deadlines.set(&id, Some(Utc::now() + AGAIN));
        }
    }

    async fn forget(&self, id: &str) {
        match self.store.forget(id).await {
            Ok(()) => {
                self.drop_from_memory(id);
                self.remove_log(id);
            }
            Err(error) => {
                tracing::error!(%error, id, "a removed sandbox could not be forgotten");
                self.deadlines.set(id, Some(Utc::now() + AGAIN));
            }
        }
    }
}

enum Ended {
    Vm(Exit),
    Main(MainExit),
}

/// Why a VM ended, and what the sandbox is now.
pub(crate) fn judge(exit: Exit, log_tail: Vec<String>) -> (Status, Reason) {
    let (status, code, message) = match exit.cause {
        ExitCause::GuestShutdown => (Status::Stopped, ReasonCode::GuestShutdown, "the guest powered itself off"),
        ExitCause::GuestPanic => (Status::Failed, ReasonCode::GuestPanic, "the guest's kernel panicked"),
        ExitCause::OutOfMemory => {
            (Status::Failed, ReasonCode::OutOfMemory, "out of memory: the host ended the VM at its memory limit")
        }
        ExitCause::HostRestarted => (Status::Stopped, ReasonCode::HostRestarted, "the host was restarted"),
        ExitCause::Lost => (Status::Failed, ReasonCode::VmLost, "the VM's process ended, nobody knows why"),
    };
    let mut reason = record::reason(code, message);
    let console: Vec<_> = exit.console_tail.iter().map(|line| shown(line)).collect();
    reason.log_tail = if console.is_empty() { log_tail } else { console };
    (status, reason)
}

fn judge_main(exit: &MainExit, log_tail: Vec<String>) -> (Status, Reason) {
    let (code, message) = if exit.oom_killed {
        (ReasonCode::OutOfMemory, "out of memory: the kernel ended the start command".to_owned())
    } else {
        (ReasonCode::StartCommandExited, format!("the start command exited with {}", exit.code))
    };
    let status = if exit.code == 0 { Status::Stopped } else { Status::Failed };
    (status, Reason { code, message, exit_code: Some(exit.code), log_tail })
}
