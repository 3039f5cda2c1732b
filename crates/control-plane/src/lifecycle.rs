//! Stop, start, remove, and what happens by itself: a start command ends, a guest panics, a time-to-live runs out.

use std::{sync::Arc, time::Duration};

use chrono::Utc;
use heyvm_agent_protocol::v1::{Exit as MainExit, main_event};
use heyvm_api::{
    ApiError,
    sandbox::{Reason, ReasonCode, SandboxInfo, Status},
};
use heyvm_vm::{Exit, ExitCause, Vm};

use crate::{
    ControlPlane, ProgressSink, Sandbox, errors, not_running, ready,
    record::{self, Record},
    tell, validate,
};

/// What processes get to end in order.
const GRACE: Duration = Duration::from_secs(5);
/// How often expired and long removed sandboxes are looked for, at least.
const SWEEP: Duration = Duration::from_secs(30);
/// How long a removed sandbox is told of.
const REMEMBERED: chrono::Duration = chrono::Duration::days(1);
/// Pause before an agent that did not answer is asked again.
const RETRY: Duration = Duration::from_millis(500);

impl ControlPlane {
    /// Ends the VM, keeps the disk. Stopping a stopped one succeeds.
    pub async fn stop(self: &Arc<Self>, who: &str) -> Result<SandboxInfo, ApiError> {
        let sandbox = self.find(who)?;
        let _one_transition = sandbox.transition.lock().await;
        let record = sandbox.snapshot();
        match record.status {
            Status::Stopped => Ok(self.info(&record)),
            Status::Removed => Err(not_running(&record)),
            _ => {
                let reason = record::reason(ReasonCode::Stopped, "stopped by a request");
                self.end(&sandbox, Status::Stopped, reason).await?;
                Ok(self.info(&sandbox.snapshot()))
            }
        }
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
    pub async fn start(self: &Arc<Self>, who: &str, progress: ProgressSink) -> Result<SandboxInfo, ApiError> {
        let sandbox = self.find(who)?;
        let _one_transition = sandbox.transition.lock().await;
        let record = sandbox.snapshot();
        match record.status {
            Status::Running => return Ok(self.info(&record)),
            Status::Stopped | Status::Failed => {}
            _ => return Err(not_running(&record)),
        }
        self.save(&sandbox, |record| {
            record.enter(Status::Provisioning, None);
            record.log_offset = 0;
        })
        .await?;
        match self.start_again(&sandbox, &progress).await {
            Ok(()) => Ok(self.info(&sandbox.snapshot())),
            Err(error) => {
                let step = error.step.clone().unwrap_or_else(|| "vm".into());
                let mut reason =
                    record::reason(ReasonCode::FailedStep, format!("failed at step {step}: {}", error.message));
                reason.log_tail.clone_from(&error.log_tail);
                self.end(&sandbox, Status::Failed, reason).await?;
                Err(error.sandbox(record.id))
            }
        }
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
        self.run_start_command(sandbox, &vm, progress).await?;
        self.wait_until_ready(sandbox, &vm, progress).await?;
        self.save(sandbox, |record| {
            record.enter(Status::Running, None);
            record.started_at = Some(record.status_changed_at);
        })
        .await?;
        self.watch(sandbox, vm);
        Ok(())
    }

    /// Stop, then start.
    pub async fn restart(self: &Arc<Self>, who: &str, progress: ProgressSink) -> Result<SandboxInfo, ApiError> {
        let id = self.stop(who).await?.id;
        self.start(&id, progress).await
    }

    /// Destroys it with disk and URLs; told of for a day. Removing a removed one succeeds.
    pub async fn remove(self: &Arc<Self>, who: &str) -> Result<SandboxInfo, ApiError> {
        let sandbox = self.find(who)?;
        if sandbox.record().status == Status::Provisioning {
            sandbox.cancel.cancel();
        }
        let _one_transition = sandbox.transition.lock().await;
        if sandbox.record().status != Status::Removed {
            self.destroy(&sandbox, record::reason(ReasonCode::Removed, "removed by a request")).await;
        }
        Ok(self.info(&sandbox.snapshot()))
    }

    /// Sets the time-to-live anew, from now on.
    pub async fn set_ttl(&self, who: &str, ttl_seconds: Option<i64>) -> Result<SandboxInfo, ApiError> {
        let ttl = validate::check_ttl(ttl_seconds)?;
        let sandbox = self.find(who)?;
        let _one_transition = sandbox.transition.lock().await;
        if sandbox.record().status == Status::Removed {
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

    /// The word of its end first, then VM, disk and URLs. The transition lock is held. Never fails halfway: what cannot
    /// be removed now is found by the next daemon, since the record says that it is gone.
    pub(crate) async fn destroy(&self, sandbox: &Sandbox, reason: Reason) {
        let saved = self.save(sandbox, |record| {
            record.waiting_to_replace = false;
            record.enter(Status::Removed, Some(reason));
        });
        if let Err(error) = saved.await {
            tracing::error!(%error, "the end of a sandbox could not be written down");
        }
        let id = sandbox.record().id.clone();
        self.unbind_all(&id).await;
        sandbox.set_vm(None);
        if let Err(error) = self.driver.destroy(&id).await {
            tracing::error!(%error, id, "a sandbox could not be removed");
        }
    }

    /// Follows a running VM to its end: its log, its start command, its process.
    pub(crate) fn watch(self: &Arc<Self>, sandbox: &Arc<Sandbox>, vm: Arc<dyn Vm>) {
        let (plane, sandbox) = (Arc::clone(self), Arc::clone(sandbox));
        tokio::spawn(async move {
            let has_main = sandbox.record().start_command.is_some();
            let ended = tokio::select! {
                exit = vm.exited() => Ended::Vm(exit),
                exit = plane.follow_main(&sandbox, &vm), if has_main => Ended::Main(exit),
            };
            let _one_transition = sandbox.transition.lock().await;
            // Whoever ended it on purpose has said so already.
            let current = sandbox.vm().is_some_and(|now| Arc::ptr_eq(&now, &vm));
            if !current || sandbox.record().status != Status::Running {
                return;
            }
            let log_tail = plane.log_tail(&sandbox.record().id);
            let (status, reason) = match ended {
                Ended::Vm(exit) => judge(exit, log_tail),
                Ended::Main(exit) => judge_main(&exit, log_tail),
            };
            if let Err(error) = plane.end(&sandbox, status, reason).await {
                tracing::error!(%error, "a sandbox that ended could not be put away");
            }
        });
    }

    /// Keeps the start command's output until it ends. An agent that does not answer is asked again: the VM's own end
    /// is seen elsewhere.
    async fn follow_main(&self, sandbox: &Sandbox, vm: &Arc<dyn Vm>) -> MainExit {
        let agent = vm.agent();
        loop {
            let (id, offset) = {
                let record = sandbox.record();
                (record.id.clone(), record.log_offset)
            };
            if let Ok(mut events) = ready::watch_main(&agent, offset).await {
                while let Ok(Some(event)) = events.message().await {
                    match event.kind {
                        Some(main_event::Kind::Log(log)) => {
                            let next = log.offset.saturating_add(log.data.len() as u64);
                            self.append_log(&id, log.stderr, &log.data);
                            sandbox.record().log_offset = next;
                            sandbox.changed.send_replace(());
                        }
                        Some(main_event::Kind::Exit(exit)) => return exit,
                        None => {}
                    }
                }
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Removes what has expired and forgets what was removed a day ago, for as long as the daemon runs.
    pub(crate) async fn sweep_forever(self: Arc<Self>) {
        loop {
            self.sweep().await;
            tokio::time::sleep(self.until_next_expiry()).await;
        }
    }

    pub(crate) async fn sweep(self: &Arc<Self>) {
        let now = Utc::now();
        for sandbox in self.all() {
            let record = sandbox.snapshot();
            if record.status == Status::Removed {
                if now - record.status_changed_at > REMEMBERED {
                    self.forget(&record).await;
                }
            } else if record.expires_at().is_some_and(|at| at <= now) {
                sandbox.cancel.cancel();
                let _one_transition = sandbox.transition.lock().await;
                if sandbox.record().status != Status::Removed {
                    self.destroy(&sandbox, record::reason(ReasonCode::TtlExpired, "its time-to-live ran out")).await;
                }
            }
        }
    }

    async fn forget(&self, record: &Record) {
        if self.store.forget(&record.id).await.is_ok() {
            self.drop_from_memory(&record.id);
            self.remove_log(&record.id);
        }
    }

    fn until_next_expiry(&self) -> Duration {
        let now = Utc::now();
        let all = self.all();
        let living = all.iter().map(|sandbox| sandbox.snapshot()).filter(|record| record.status != Status::Removed);
        let next = living.filter_map(|record| record.expires_at()).min();
        let wait = next.and_then(|at| (at - now).to_std().ok()).unwrap_or(SWEEP);
        // One that is asked for meanwhile may expire sooner than any that is known now.
        wait.clamp(Duration::from_millis(20), Duration::from_millis(500))
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
        ExitCause::HostRestarted => (Status::Stopped, ReasonCode::HostRestarted, "the host was restarted"),
        ExitCause::Lost => (Status::Failed, ReasonCode::VmLost, "the VM's process ended, nobody knows why"),
    };
    let mut reason = record::reason(code, message);
    reason.log_tail = if exit.console_tail.is_empty() { log_tail } else { exit.console_tail };
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
