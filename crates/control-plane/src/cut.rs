//! A request that cuts short what goes on with a sandbox: it is not kept waiting for hooks, health checks or a slow start.

use heyvm_api::{
    ApiError, ErrorCode,
    sandbox::{Reason, ReasonCode, Status},
};

use crate::Sandbox;

/// What the sandbox is to be instead. A removal counts more than a stop; of two removals the first one's reason counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Stopped, with its disk kept.
    Stop(Reason),
    /// Removed.
    Remove(Reason),
}

impl Cut {
    /// Why, in the words of the one who asked for it.
    pub fn reason(&self) -> &Reason {
        match self {
            Self::Stop(reason) | Self::Remove(reason) => reason,
        }
    }

    /// The error for the caller whose create or start it cuts short.
    pub fn error(&self) -> ApiError {
        let reason = self.reason();
        let hint = match (self, reason.code) {
            (Self::Stop(_), _) => "Run `heyvm start` to start it with what its disk has; hooks do not run again.",
            (_, ReasonCode::TtlExpired) => "Deploy it again, with a longer --ttl-seconds.",
            _ => "Deploy it again.",
        };
        ApiError::new(ErrorCode::InvalidState, format!("{} while it was being made", reason.message))
            .hint(hint)
            .step("vm")
    }
}

impl Sandbox {
    /// Cuts its making or starting short.
    pub(crate) fn cut(&self, cut: Cut) {
        self.cut.send_if_modified(|asked| {
            let counts = match (&asked, &cut) {
                (None, _) | (Some(Cut::Stop(_)), Cut::Remove(_)) => true,
                (Some(_), _) => false,
            };
            if counts {
                *asked = Some(cut);
            }
            counts
        });
    }

    /// As [`Self::cut`], but only while it is being made or started: anything else is not cut short by a stop.
    pub(crate) fn cut_by_stop(&self, reason: Reason) {
        if self.record().status == Status::Provisioning {
            self.cut(Cut::Stop(self.at_its_step(reason)));
        }
    }

    /// The reason, with the step that it cuts short.
    pub(crate) fn at_its_step(&self, reason: Reason) -> Reason {
        match self.step().filter(|_| self.record().status == Status::Provisioning) {
            Some(step) => Reason { message: format!("{} at the step {step}", reason.message), ..reason },
            None => reason,
        }
    }

    /// The transition lock, once its making is over: that may not have taken the lock yet.
    pub(crate) async fn lock_once_made(&self) -> tokio::sync::MutexGuard<'_, ()> {
        let mut changed = self.changed.subscribe();
        loop {
            let lock = self.transition.lock().await;
            let record = self.snapshot();
            if record.status != Status::Provisioning || record.started_before() {
                return lock;
            }
            drop(lock);
            // The sender is a field of this sandbox.
            changed.changed().await.ok();
        }
    }

    /// It stays after all, or has been stopped.
    pub(crate) fn take_cut_back(&self) {
        self.cut.send_replace(None);
    }

    /// What is asked for now.
    pub(crate) fn cut_now(&self) -> Option<Cut> {
        self.cut.borrow().clone()
    }

    /// Resolves when it is to be cut short.
    pub(crate) async fn cut_asked(&self) -> Cut {
        let mut cut = self.cut.subscribe();
        match cut.wait_for(Option::is_some).await.map(|cut| cut.clone()) {
            Ok(Some(cut)) => cut,
            // The sender is a field of this sandbox.
            _ => std::future::pending().await,
        }
    }

    /// What its create or start is doing, while it is.
    pub(crate) fn step(&self) -> Option<String> {
        self.step.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    pub(crate) fn enter_step(&self, step: String) {
        *self.step.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(step);
        self.changed.send_replace(());
    }
}
