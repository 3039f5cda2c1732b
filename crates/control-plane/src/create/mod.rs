//! Making a sandbox: a row in the store first, then each step; a step that fails undoes everything before it.

mod steps;

use std::sync::Arc;

use heyvm_api::{
    ApiError, ErrorCode, names,
    sandbox::{CreateRequest, Reason, ReasonCode, SandboxInfo, Status},
};
use heyvm_store::KeyRow;
use tokio::sync::oneshot;

use crate::{
    Account, ControlPlane, ProgressSink, Sandbox,
    cut::Cut,
    errors,
    record::{self, Record},
    spawn_detached, supervised, validate,
};
use steps::Prepared;

/// How often a slug that nobody asked for may give way to another.
const SLUG_TRIES: u32 = 8;

/// For whom a sandbox is made, and what makes the same request give the same one again.
#[derive(Debug, Clone, Default)]
pub struct Asked {
    /// Whose it will be.
    pub account: Account,
    /// The caller's own mark of the request.
    pub idempotency_key: Option<String>,
    /// The id it is to have.
    pub sandbox_id: Option<uuid::Uuid>,
}

impl Asked {
    fn may_be_repeated(&self) -> bool {
        self.idempotency_key.is_some() || self.sandbox_id.is_some()
    }

    /// The key in the store: accounts do not share keys. No header holds a line's end.
    fn key(&self) -> Option<String> {
        let key = self.idempotency_key.as_ref()?;
        Some(if self.account.is_owner() { key.clone() } else { format!("{}\n{key}", self.account.as_str()) })
    }
}

impl ControlPlane {
    /// Makes a sandbox and returns when it is running (or healthy, where that was asked for).
    /// Dropping the future undoes it, unless the request can be repeated: then it goes on.
    pub async fn create(
        self: &Arc<Self>,
        request: CreateRequest,
        asked: Asked,
        progress: ProgressSink,
    ) -> Result<SandboxInfo, ApiError> {
        let plane = Arc::clone(self);
        // Run in a detached task, so that dropping the request never leaks a half-created sandbox.
        if !asked.may_be_repeated() {
            let (has_its_answer, caller) = oneshot::channel();
            let made = spawn_detached(async move {
                let sandbox = plane.begin(&request, &asked).await?;
                plane.undo_without(caller, &sandbox);
                plane.make(sandbox, request, progress).await
            })
            .await;
            has_its_answer.send(()).ok();
            return made;
        }
        spawn_detached(async move {
            let one_at_a_time = plane.keys.lock().await;
            if let Some(known) = plane.made_before(&asked, &request).await? {
                drop(one_at_a_time);
                return plane.wait_until_made(&known).await;
            }
            let sandbox = plane.begin_with_key(&request, &asked).await?;
            drop(one_at_a_time);
            plane.make(sandbox, request, progress).await
        })
        .await
    }

    /// A caller who goes away without its answer takes its sandbox along, half-made or not.
    fn undo_without(self: &Arc<Self>, caller: oneshot::Receiver<()>, sandbox: &Arc<Sandbox>) {
        let (plane, sandbox) = (Arc::clone(self), Arc::clone(sandbox));
        tokio::spawn(async move {
            let reason = record::reason(ReasonCode::FailedStep, "the client went away");
            if caller.await.is_err()
                && let Err(error) = plane.remove_for(&sandbox, reason).await
            {
                tracing::error!(%error, "what a client has left behind could not be removed");
            }
        });
    }

    /// What this key, or this id, has given before.
    async fn made_before(&self, asked: &Asked, request: &CreateRequest) -> Result<Option<Arc<Sandbox>>, ApiError> {
        if let Some(key) = asked.key()
            && let Some(known) = self.made_with(&key, request).await?
        {
            return Ok(Some(known));
        }
        let Some(known) = asked.sandbox_id.and_then(|id| self.with_id(&id.to_string())) else { return Ok(None) };
        let record = known.snapshot();
        if record.account == asked.account && record.fingerprint == record::fingerprint(request) {
            return Ok(Some(known));
        }
        Err(ApiError::new(ErrorCode::IdempotencyKeyReused, "this sandbox id came with another request")
            .hint("use a new id for a new request"))
    }

    /// What this key has given before, as long as that is not gone.
    async fn made_with(&self, key: &str, request: &CreateRequest) -> Result<Option<Arc<Sandbox>>, ApiError> {
        let Some(known) = self.store.key(key).await.map_err(errors::store)? else { return Ok(None) };
        let sandbox = self.with_id(&known.sandbox_id);
        let gone = sandbox.as_ref().is_none_or(|sandbox| {
            let record = sandbox.record();
            (record.status == Status::Removed || record.removing) && sandbox.failure.get().is_none()
        });
        if gone {
            self.store.remove_keys(&known.sandbox_id).await.map_err(errors::store)?;
            return Ok(None);
        }
        if known.request != record::fingerprint(request) {
            return Err(ApiError::new(
                ErrorCode::IdempotencyKeyReused,
                "this idempotency key came with another request",
            )
            .hint("use a new key for a new request"));
        }
        Ok(sandbox)
    }

    async fn begin_with_key(&self, request: &CreateRequest, asked: &Asked) -> Result<Arc<Sandbox>, ApiError> {
        let sandbox = self.begin(request, asked).await?;
        let Some(key) = asked.key() else { return Ok(sandbox) };
        let record = sandbox.snapshot();
        let row = KeyRow { request: record.fingerprint, sandbox_id: record.id };
        if let Err(error) = self.store.add_key(&key, &row, record.created_at.timestamp_millis()).await {
            let reason = record::reason(ReasonCode::FailedStep, "its idempotency key could not be written down");
            self.destroy(&sandbox, reason).await?;
            return Err(errors::store(error));
        }
        Ok(sandbox)
    }

    /// The row, before anything is done.
    async fn begin(&self, request: &CreateRequest, asked: &Asked) -> Result<Arc<Sandbox>, ApiError> {
        let mut record = validate::record(request, &asked.account, &self.config)?;
        record.fingerprint = record::fingerprint(request);
        if let Some(id) = asked.sandbox_id {
            record.id = id.to_string();
        }
        self.must_not_be_an_id(&record)?;
        self.resolve_mounts(&mut record).await?;
        if let Some(archive) = &record.archive_id {
            self.check_archive(archive).await?;
        }
        if let Some(old) = self.living_named(&record.name, &record.account).filter(|_| request.replace) {
            record.waiting_to_replace = true;
            if request.slug.is_none() {
                record.slug.clone_from(&old.record().slug);
            }
        }
        self.insert(&mut record, request.slug.is_none()).await?;
        let sandbox = Sandbox::new(record);
        self.add(&sandbox);
        Ok(sandbox)
    }

    /// Another sandbox's id as a name would hide which of the two is meant.
    pub(crate) fn must_not_be_an_id(&self, record: &Record) -> Result<(), ApiError> {
        for taken in [&record.name, &record.slug] {
            if let Some(other) = self.with_id(taken).filter(|other| other.record().account == record.account) {
                return Err(ApiError::new(ErrorCode::NameTaken, format!("{taken} is the id of a sandbox"))
                    .hint("Use another name.")
                    .sandbox(other.record().id.clone()));
            }
        }
        Ok(())
    }

    /// Into the store, which knows whose name and slug are taken. A slug that nobody asked for gives way.
    pub(crate) async fn insert(&self, record: &mut Record, slug_may_change: bool) -> Result<(), ApiError> {
        let made_up = record.slug.clone();
        for _ in 0..SLUG_TRIES {
            match self.store.insert(&record.row()).await {
                Ok(()) => return Ok(()),
                Err(heyvm_store::Error::SlugTaken) if slug_may_change => {
                    record.slug = names::another_slug(&made_up, rand::random());
                }
                Err(error) => return Err(self.refused(error, record)),
            }
        }
        Err(self.refused(heyvm_store::Error::SlugTaken, record))
    }

    /// Names the sandbox that is in the way.
    fn refused(&self, error: heyvm_store::Error, record: &Record) -> ApiError {
        let taken = matches!(error, heyvm_store::Error::NameTaken | heyvm_store::Error::SlugTaken);
        let answer = errors::store(error);
        let in_the_way = self.all().into_iter().find(|other| {
            let other = other.record();
            let same = other.name == record.name || other.slug == record.slug;
            same && other.account == record.account && other.holds_its_name()
        });
        match in_the_way.filter(|_| taken) {
            Some(other) => answer.sandbox(&other.record().id),
            None => answer,
        }
    }

    /// For those who sent a key again: the same answer as the first one's.
    async fn wait_until_made(&self, sandbox: &Sandbox) -> Result<SandboxInfo, ApiError> {
        let mut changed = sandbox.changed.subscribe();
        loop {
            let record = sandbox.snapshot();
            match sandbox.failure.get() {
                Some(failure) => return Err(failure.clone()),
                None if record.status == Status::Removed => return Ok(self.info(&record)),
                None if record.status != Status::Provisioning && !record.removing => return Ok(self.info(&record)),
                None => {}
            }
            if changed.changed().await.is_err() {
                return Ok(self.info(&sandbox.snapshot()));
            }
        }
    }

    async fn make(
        self: Arc<Self>,
        sandbox: Arc<Sandbox>,
        request: CreateRequest,
        progress: ProgressSink,
    ) -> Result<SandboxInfo, ApiError> {
        let _one_transition = sandbox.transition.lock().await;
        let prepared = tokio::select! {
            prepared = supervised::run("making a sandbox", self.prepare(&sandbox, &request, &progress)) => {
                prepared.map_err(|panicked| errors::internal(&panicked)).flatten()
            }
            cut = sandbox.cut_asked() => Err(cut.error()),
        };
        let outcome = match prepared {
            Ok(prepared) => self.go_live(&sandbox, prepared).await,
            Err(error) => Err(error),
        };
        match outcome {
            Ok(()) => Ok(self.info(&sandbox.snapshot())),
            Err(error) => Err(self.fail(&sandbox, &request, error).await),
        }
    }

    /// Tells the world. From here on nothing cuts it short.
    async fn go_live(self: &Arc<Self>, sandbox: &Arc<Sandbox>, prepared: Prepared) -> Result<(), ApiError> {
        if !self.take_the_place_of_its_namesake(sandbox).await? {
            self.save(sandbox, |record| {
                record.waiting_to_replace = false;
                record.run();
            })
            .await?;
        }
        self.watch(sandbox, prepared.vm, prepared.main);
        Ok(())
    }

    /// Ends a sandbox whose making was cut short by a stop. Its disk is kept, as that of any other stopped one.
    async fn stop_partial(&self, sandbox: &Arc<Sandbox>, reason: Reason) -> Result<(), ApiError> {
        self.save(sandbox, |record| {
            (record.waiting_to_replace, record.has_run) = (false, true);
            record.warnings.push("its setup was stopped before its end: hooks may not have run".into());
        })
        .await?;
        self.end(sandbox, Status::Stopped, reason).await
    }

    /// Undoes a sandbox whose making failed; what is left is the word of it, and its log.
    async fn fail(self: &Arc<Self>, sandbox: &Arc<Sandbox>, request: &CreateRequest, error: ApiError) -> ApiError {
        let step = error.step.clone().unwrap_or_else(|| "vm".into());
        let id = sandbox.record().id.clone();
        let cut = sandbox.cut_now();
        let kept = sandbox.vm().filter(|_| request.keep_on_failure && cut.is_none());
        // One that is stopped before it has a VM has no disk to keep.
        let stopped = matches!(cut, Some(Cut::Stop(_))) && sandbox.vm().is_some();
        let error = if kept.is_some() || stopped { error.sandbox(&id) } else { error };
        let reason = cut.map(|cut| cut.reason().clone()).unwrap_or_else(|| Reason {
            code: ReasonCode::FailedStep,
            message: format!("failed at step {step}: {}", error.message),
            exit_code: error.exit_code,
            log_tail: error.log_tail.clone(),
        });
        // The first one stays.
        sandbox.failure.set(error.clone()).ok();
        if stopped {
            if let Err(undoing) = self.stop_partial(sandbox, reason).await {
                tracing::error!(error = %undoing, id, "a sandbox whose making was stopped could not be put away");
            }
            return error;
        }
        let Some(vm) = kept else {
            if let Err(undoing) = self.destroy(sandbox, reason).await {
                tracing::error!(error = %undoing, id, "a half-made sandbox could not be removed");
            }
            return error;
        };
        // Kept running, so that one can look into it.
        let failed = self.save(sandbox, |record| {
            record.waiting_to_replace = false;
            record.enter(Status::Failed, Some(reason));
        });
        if let Err(error) = failed.await {
            tracing::error!(%error, id, "the failure of a sandbox could not be written down");
        }
        if let Err(error) = self.store.remove_keys(&id).await {
            tracing::error!(%error, id, "the same request will be told of this failure");
        }
        self.watch(sandbox, vm, None);
        error
    }
}
