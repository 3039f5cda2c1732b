//! Stop, start, remove, and what happens by itself: a start command ends, a guest panics, a time-to-live runs out.

use std::{
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use chrono::Utc;
use heyvm_agent_protocol::v1::Exit as MainExit;
use heyvm_api::{
    ApiError, ErrorCode,
    sandbox::{Reason, ReasonCode, SandboxInfo, Status},
};
use heyvm_vm::{Exit, ExitCause, Vm};
use tokio::sync::MutexGuard;

use crate::{
    ControlPlane, ProgressSink, Sandbox, Who, begin_step,
    cut::Cut,
    errors,
    guest_command::shown,
    main_command::{Followed, Main},
    not_running, ready,
    record::{self, Record},
    spawn_detached,
    supervised::{self, Panicked},
    validate,
};

/// What processes get to end in order.
pub(crate) const GRACE: Duration = Duration::from_secs(5);
/// A transition that is under way gets this long before it is ended for a stop.
const BEFORE_STOP: Duration = Duration::from_secs(30);
/// The same for a removal, which leaves nothing of what it does.
const BEFORE_REMOVAL: Duration = Duration::from_secs(2);
/// What could not be done about a sandbox by itself is tried again after this.
pub(crate) const AGAIN: chrono::Duration = chrono::Duration::seconds(1);

impl ControlPlane {
    /// Ends the VM, keeps the disk. Stopping a stopped one succeeds.
    pub async fn stop(self: &Arc<Self>, who: &Who) -> Result<SandboxInfo, ApiError> {
        let (plane, sandbox) = (Arc::clone(self), self.find(who)?);
        spawn_detached(async move {
            sandbox.cut_by_stop(record::reason(ReasonCode::Stopped, "stopped by a request"));
            let _one_transition = plane.seize(&sandbox, BEFORE_STOP, sandbox.lock_once_made()).await?;
            // A removal that is asked for as well waits for the lock, and goes on.
            if let Some(Cut::Stop(_)) = sandbox.cut_now() {
                sandbox.take_cut_back();
            }
            // One that was stopped before it had a VM is gone: there was nothing to keep.
            let record = sandbox.snapshot();
            if record.status == Status::Removed
                && record.reason.as_ref().is_some_and(|why| why.code == ReasonCode::Stopped)
            {
                return Ok(plane.info(&record));
            }
            plane.stop_now(&sandbox).await
        })
        .await
    }

    /// Takes the transition lock within a bounded time. A transition that holds it for long may be waiting for a guest that
    /// never answers: the VM is ended then, and with it the wait. One that is being made or started was cut short already,
    /// and its VM is ended here only where it is to be removed.
    async fn seize<'s>(
        &self,
        sandbox: &'s Sandbox,
        patience: Duration,
        lock: impl Future<Output = MutexGuard<'s, ()>>,
    ) -> Result<MutexGuard<'s, ()>, ApiError> {
        let mut lock = pin!(lock);
        if let Ok(free) = tokio::time::timeout(patience, &mut lock).await {
            return Ok(free);
        }
        let record = sandbox.snapshot();
        let is_cut_short = record.status == Status::Provisioning && !matches!(sandbox.cut_now(), Some(Cut::Remove(_)));
        if let Some(vm) = sandbox.vm().filter(|_| !is_cut_short) {
            tracing::warn!(id = record.id, "a transition takes long; the VM is ended, so that the next one can begin");
            vm.stop(Duration::ZERO).await.map_err(errors::vm)?;
        }
        Ok(lock.await)
    }

    /// The transition lock is held.
    pub(crate) async fn stop_now(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<SandboxInfo, ApiError> {
        // One that was running before this daemon may not have been found yet.
        if sandbox.record().status == Status::Running
            && sandbox.vm().is_none()
            && let Err(error) = self.adopt(sandbox).await
        {
            let id = sandbox.record().id.clone();
            tracing::warn!(%error, id, "a VM that cannot be reached is killed, as its stop was requested");
            self.driver.kill(&id).await.map_err(errors::vm)?;
        }
        let record = sandbox.snapshot();
        match (record.status, record.reason.clone()) {
            _ if record.removing => return Err(not_running(&record)),
            // One that waits to be started again waits no longer.
            (Status::Stopped | Status::Failed, _) if sandbox.vm().is_none() && record.next_start_at.is_some() => {
                self.save(sandbox, |record| record.next_start_at = None).await.map(drop)?;
            }
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
    pub(crate) async fn end(&self, sandbox: &Arc<Sandbox>, status: Status, reason: Reason) -> Result<(), ApiError> {
        self.save(sandbox, |record| record.enter(Status::Stopping, Some(reason.clone()))).await?;
        match sandbox.vm() {
            Some(vm) => vm.stop(GRACE).await.map_err(errors::vm)?,
            // A start that was cut short may have come as far as a VM that is not known here.
            None => self.driver.kill(&sandbox.snapshot().id).await.map_err(errors::vm)?,
        }
        sandbox.set_vm(None);
        self.save(sandbox, |record| record.enter(status, Some(reason))).await.map(drop)
    }

    /// Goes on from the disk and runs the start command again. Starting a running one succeeds.
    pub async fn start(self: &Arc<Self>, who: &Who, progress: ProgressSink) -> Result<SandboxInfo, ApiError> {
        let (plane, sandbox) = (Arc::clone(self), self.find(who)?);
        spawn_detached(async move {
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
        if let Some(cut) = sandbox.cut_now() {
            return Err(cut.error().sandbox(record.id));
        }
        self.save(sandbox, |record| record.enter(Status::Provisioning, None)).await?;
        let started = tokio::select! {
            started = supervised::run("starting a sandbox", self.start_again(sandbox, progress)) => {
                started.map_err(|panicked| errors::internal(&panicked)).flatten()
            }
            cut = sandbox.cut_asked() => {
                match &cut {
                    Cut::Remove(reason) => self.destroy(sandbox, reason.clone()).await?,
                    Cut::Stop(reason) => self.end(sandbox, Status::Stopped, reason.clone()).await?,
                }
                return Err(cut.error().sandbox(record.id));
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
        begin_step(sandbox, progress, "template", "preparing the template");
        self.driver
            .prepare(&spec, self.forward(progress, "template"))
            .await
            .map_err(|error| errors::vm(error).step("vm"))?;
        begin_step(sandbox, progress, "vm", "starting the VM");
        // One that failed but was kept running is ended first: a start begins anew.
        if let Some(vm) = sandbox.vm() {
            vm.stop(GRACE).await.map_err(errors::vm)?;
        }
        let vm = self.driver.start(&record.id, &spec).await.map_err(|error| errors::vm(error).step("vm"))?;
        sandbox.set_vm(Some(Arc::clone(&vm)));
        // Before anything runs that a full disk may keep from running.
        self.look_at_disk(sandbox, &vm.agent()).await;
        self.mount_all(sandbox, &vm).await.map_err(|error| error.step("mount"))?;
        let begun = async {
            let mut main = self.run_start_command(sandbox, &vm, progress).await?;
            self.wait_until_ready(sandbox, &vm, main.as_mut(), progress).await?;
            Ok(main)
        };
        let main = begun.await.map_err(|error| sandbox.disk.explain(&record.name, error))?;
        self.save(sandbox, Record::run).await?;
        self.watch(sandbox, vm, main);
        Ok(())
    }

    /// Stop, then start, with nothing in between.
    pub async fn restart(self: &Arc<Self>, who: &Who, progress: ProgressSink) -> Result<SandboxInfo, ApiError> {
        let (plane, sandbox) = (Arc::clone(self), self.find(who)?);
        spawn_detached(async move {
            let _one_transition = sandbox.transition.lock().await;
            plane.stop_now(&sandbox).await?;
            plane.start_now(&sandbox, &progress).await
        })
        .await
    }

    /// Destroys it with disk and URLs; told of for a day. Removing a removed one succeeds. Removes an orphan by its id.
    pub async fn remove(self: &Arc<Self>, who: &Who) -> Result<SandboxInfo, ApiError> {
        let sandbox = match self.find(who) {
            Ok(sandbox) => sandbox,
            Err(error) if error.code == ErrorCode::SandboxNotFound && who.account.is_owner() => {
                return self.remove_orphan(who).await?.ok_or(error);
            }
            Err(error) => return Err(error),
        };
        let plane = Arc::clone(self);
        let reason = sandbox.at_its_step(record::reason(ReasonCode::Removed, "removed by a request"));
        spawn_detached(async move {
            plane.remove_for(&sandbox, reason).await?;
            Ok(plane.info(&sandbox.snapshot()))
        })
        .await
    }

    /// Cuts short what goes on with it, then destroys it.
    pub(crate) async fn remove_for(&self, sandbox: &Arc<Sandbox>, reason: Reason) -> Result<(), ApiError> {
        sandbox.cut(Cut::Remove(reason.clone()));
        let _one_transition = self.seize(sandbox, BEFORE_REMOVAL, sandbox.transition.lock()).await?;
        if sandbox.record().status == Status::Removed {
            return Ok(());
        }
        let removed = self.destroy(sandbox, reason).await;
        if !sandbox.record().removing {
            sandbox.take_cut_back();
        }
        removed
    }

    /// Sets the time-to-live anew, from now on.
    pub async fn set_ttl(&self, who: &Who, ttl_seconds: Option<i64>) -> Result<SandboxInfo, ApiError> {
        let ttl = validate::check_ttl(ttl_seconds)?;
        let sandbox = self.find(who)?;
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
    pub(crate) async fn destroy(&self, sandbox: &Arc<Sandbox>, reason: Reason) -> Result<(), ApiError> {
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
        self.forget_mounts(&record.id).await;
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
        vm.live();
        let (plane, sandbox) = (Arc::clone(self), Arc::clone(sandbox));
        tokio::spawn(async move {
            let mut main = main;
            let watched = supervised::run("watching a sandbox", async {
                loop {
                    let ended = tokio::select! {
                        exit = vm.exited() => Ended::Vm(exit),
                        followed = ready::ended(main.as_mut()) => match followed {
                            Followed::Exited(exit) => Ended::Main(exit),
                            Followed::Lost(panicked) => Ended::Unwatched(panicked),
                        },
                    };
                    match ended {
                        // A sandbox is more than what its image runs by itself.
                        Ended::Main(exit) if exit.code == 0 && sandbox.record().runs_the_images_command() => {
                            main = None;
                        }
                        ended => break ended,
                    }
                }
            });
            let ended = watched.await.unwrap_or_else(Ended::Unwatched);
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

    async fn put_away_after(&self, sandbox: &Arc<Sandbox>, ended: Ended) -> Result<(), ApiError> {
        let record = sandbox.snapshot();
        match record.status {
            Status::Running => {
                let log_tail = self.log_tail(&record.id).await;
                let (status, reason) = match ended {
                    Ended::Vm(exit) => judge(exit, log_tail),
                    Ended::Main(exit) => judge_main(&exit, log_tail),
                    Ended::Unwatched(panicked) => (
                        Status::Failed,
                        Reason { log_tail, ..record::reason(ReasonCode::Internal, panicked.to_string()) },
                    ),
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
            self.book.deadlines.wait().await;
            // One sandbox that makes it panic is not to keep the others alive.
            supervised::run("looking for what is due", self.sweep()).await.ok();
        }
    }

    pub(crate) async fn sweep(self: &Arc<Self>) {
        let now = Utc::now();
        for id in self.book.deadlines.take_due(now) {
            let Some(sandbox) = self.with_id(&id) else { continue };
            let record = sandbox.snapshot();
            let (deadline, expires_at) = (record.deadline(), record.expires_at());
            if deadline.is_none_or(|at| at > now) {
                self.book.deadlines.set(&id, deadline);
            } else if record.status == Status::Removed {
                self.forget(&id).await;
            } else if expires_at.is_none_or(|at| at > now) {
                // Its start may take a while, and its time may run out meanwhile.
                self.book.deadlines.set(&id, expires_at);
                self.start_if_due(&sandbox);
            } else if !sandbox.expiring.swap(true, Ordering::Relaxed) {
                // Each on its own: one that is slow to end keeps no other alive, nor those whose time runs out meanwhile.
                tokio::spawn(Arc::clone(self).expire(sandbox));
            }
        }
    }

    async fn expire(self: Arc<Self>, sandbox: Arc<Sandbox>) {
        let reason = record::reason(ReasonCode::TtlExpired, "its time-to-live ran out");
        let removed = supervised::run("removing an expired sandbox", self.remove_for(&sandbox, reason)).await;
        if let Ok(Err(error)) = removed {
            tracing::error!(%error, "a sandbox whose time ran out could not be removed");
        }
        sandbox.expiring.store(false, Ordering::Relaxed);
        // What could not be removed is tried again, and so is what got another deadline meanwhile.
        let (id, removed) = {
            let record = sandbox.record();
            (record.id.clone(), record.status == Status::Removed)
        };
        if !removed {
            self.book.deadlines.set(&id, Some(Utc::now() + AGAIN));
        }
    }

    async fn forget(&self, id: &str) {
        match self.store.forget(id).await {
            Ok(()) => {
                self.drop_from_memory(id);
                self.remove_log(id).await;
            }
            Err(error) => {
                tracing::error!(%error, id, "a removed sandbox could not be forgotten");
                self.book.deadlines.set(id, Some(Utc::now() + AGAIN));
            }
        }
    }
}

enum Ended {
    Vm(Exit),
    Main(MainExit),
    /// A fault of ours: what cannot be watched is not left running.
    Unwatched(Panicked),
}

/// Why a VM ended, and what the sandbox is now.
pub(crate) fn judge(exit: Exit, log_tail: Vec<String>) -> (Status, Reason) {
    let (status, code, message) = match exit.cause {
        ExitCause::GuestShutdown => (Status::Stopped, ReasonCode::GuestShutdown, "the guest powered itself off"),
        ExitCause::GuestPanic => (Status::Failed, ReasonCode::GuestPanic, "the guest's kernel panicked"),
        ExitCause::GuestHalted => (Status::Failed, ReasonCode::GuestHalted, "the guest halted its processors"),
        ExitCause::AgentReplaced => {
            (Status::Failed, ReasonCode::AgentReplaced, "the guest sends garbage in place of its agent's protocol")
        }
        ExitCause::Unrunnable => (Status::Failed, ReasonCode::KvmFailed, "KVM could not run the guest any further"),
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
