//! Sandboxes that are started again when they ended by themselves.
//!
//! ```text
//!  running ── ended by itself ──▶ stopped/failed, `next_start_at` ── pause ──▶ provisioning ──▶ running
//!     ▲                               │     ▲                                      │
//!     └─ ran for a while: pauses      │     └───────── the start failed ───────────┘
//!        begin from the shortest      └── stop, rm: it stays as it is
//! ```

use std::sync::{Arc, atomic::Ordering};

use chrono::{Duration, Utc};
use heyvm_api::{
    ApiError,
    sandbox::{ReasonCode, RestartPolicy, SandboxInfo, Status},
};

use crate::{ControlPlane, Sandbox, Who, lifecycle::AGAIN, not_running, record::Record, validate};

/// First and longest pause before one is started again.
const FIRST_PAUSE: Duration = Duration::seconds(1);
const LONGEST_PAUSE: Duration = Duration::seconds(60);
/// One that has run this long begins with the first pause again.
pub(crate) const STEADY: Duration = Duration::seconds(10);

/// How long one that has just ended waits for its next start; `None` where it has none.
pub(crate) fn pause(record: &Record) -> Option<Duration> {
    let ended = matches!(record.status, Status::Stopped | Status::Failed) && !record.removing && record.has_run;
    let reason = record.reason.as_ref().filter(|_| ended)?;
    let again = match (record.restart, reason.code) {
        (RestartPolicy::Never, _) => false,
        (_, ReasonCode::Stopped | ReasonCode::Removed | ReasonCode::Replaced | ReasonCode::TtlExpired) => false,
        (RestartPolicy::Always, _) => true,
        (RestartPolicy::OnFailure, ReasonCode::StartCommandExited) => reason.exit_code != Some(0),
        (RestartPolicy::OnFailure, ReasonCode::GuestShutdown | ReasonCode::HostRestarted) => false,
        (RestartPolicy::OnFailure, _) => true,
    };
    let doubled = FIRST_PAUSE * 2_i32.pow(record.restarts_in_a_row.min(6));
    again.then_some(doubled.min(LONGEST_PAUSE))
}

impl ControlPlane {
    /// Changes whether a sandbox is started again when it ended by itself; one that waits for that no longer may.
    pub async fn set_restart_policy(&self, who: &Who, restart: RestartPolicy) -> Result<SandboxInfo, ApiError> {
        validate::check_restart(restart, &who.account)?;
        let sandbox = self.find(who)?;
        if sandbox.record().removing || sandbox.record().status == Status::Removed {
            return Err(not_running(&sandbox.snapshot()));
        }
        let change = |record: &mut Record| {
            record.restart = restart;
            record.next_start_at = record.next_start_at.filter(|_| pause(record).is_some());
        };
        let record = self.save(&sandbox, change).await?;
        Ok(self.info(&record))
    }

    /// Starts one that is due in the background, once.
    pub(crate) fn start_if_due(self: &Arc<Self>, sandbox: &Arc<Sandbox>) {
        let due = sandbox.record().next_start_at.is_some_and(|at| at <= Utc::now());
        if due && !sandbox.is_starting_again.swap(true, Ordering::Relaxed) {
            tokio::spawn(Arc::clone(self).start_again_by_itself(Arc::clone(sandbox)));
        }
    }

    async fn start_again_by_itself(self: Arc<Self>, sandbox: Arc<Sandbox>) {
        let _one_transition = sandbox.transition.lock().await;
        // It may have been stopped or started while this waited for its turn.
        if sandbox.record().next_start_at.is_some_and(|at| at <= Utc::now())
            && let Err(error) = self.start_now(&sandbox, &tokio::sync::mpsc::unbounded_channel().0).await
        {
            tracing::warn!(%error, id = sandbox.record().id, "a sandbox could not be started again");
            self.put_off(&sandbox).await;
        }
        sandbox.is_starting_again.store(false, Ordering::Relaxed);
        // What could not be done is tried again.
        let record = sandbox.snapshot();
        let deadline = record.deadline().map(|at| at.max(Utc::now() + AGAIN));
        self.book.deadlines.set(&record.id, deadline);
    }

    /// A start that was refused before it began, as where its name is another one's by now, is tried again later.
    async fn put_off(&self, sandbox: &Arc<Sandbox>) {
        if sandbox.record().next_start_at.is_none_or(|at| at > Utc::now()) {
            return;
        }
        let put_off = |record: &mut Record| record.next_start_at = pause(record).map(|pause| Utc::now() + pause);
        if let Err(error) = self.save(sandbox, put_off).await {
            tracing::error!(%error, id = sandbox.record().id, "the next start of a sandbox could not be saved");
        }
    }
}
