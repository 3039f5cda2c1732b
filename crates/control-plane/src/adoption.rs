//! What a new daemon finds: VMs that still run are adopted, partial ones removed, ended ones judged, orphans left alone.
//! What cannot be found out now is not guessed: it is looked at again. What cannot be read is left as it is.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, OnceLock, RwLock},
    time::Duration,
};

use heyvm_api::{
    ApiError,
    sandbox::{Reason, ReasonCode, Status},
};
use heyvm_images::ImageStore;
use heyvm_store::{SandboxRow, Store};
use heyvm_vm::{Driver, Vm};

use crate::{
    Config, ControlPlane, Sandbox, archives,
    blocking::blocking,
    errors, lifecycle, logs, orphans,
    record::{self, Record},
    supervised,
};

/// Opening waits this long until every sandbox is settled. One that takes longer holds up nobody but those who want
/// something of it.
const OPENING: Duration = Duration::from_secs(3);
/// A VM that is not found within this time is looked for again.
const FINDING: Duration = Duration::from_secs(30);
/// First and longest pause before what could not be settled is looked at again.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

impl ControlPlane {
    /// Opens the state: adopts running VMs, cleans up half-made ones, removes what has expired, starts the timers.
    pub async fn open(
        config: Config,
        store: Store,
        driver: Arc<dyn Driver>,
        images: Arc<ImageStore>,
    ) -> Result<Arc<Self>, ApiError> {
        let store_id = store.id().await.map_err(errors::store)?;
        let rows = store.sandboxes().await.map_err(errors::store)?;
        let vms = driver.list().await.map_err(errors::vm)?;
        let (mut sandboxes, mut unread) = (HashMap::new(), HashSet::new());
        for row in &rows {
            let Some(mut record) = read(row, &images).await else {
                unread.insert(row.id.clone());
                continue;
            };
            if vms.contains(&row.id) {
                record = orphans::newest(driver.as_ref(), &store, record).await;
            }
            sandboxes.insert(record.id.clone(), Sandbox::new(record));
        }
        let pulls = crate::Pulls::new(&config.images);
        let plane = Arc::new(Self {
            unread,
            store_id,
            config,
            store,
            driver,
            images,
            sandboxes: RwLock::new(sandboxes),
            endpoints: RwLock::default(),
            listeners: OnceLock::new(),
            local_ports: RwLock::default(),
            keys: tokio::sync::Mutex::default(),
            binding: tokio::sync::Mutex::default(),
            book: Default::default(),
            image_use: tokio::sync::Mutex::default(),
            pulls,
            substitutions: std::sync::Mutex::default(),
        });
        plane.all().iter().for_each(|sandbox| plane.book.noted(sandbox));
        plane.load_endpoints().await?;
        plane.prepare_files(rows.clone(), vms.clone()).await?;
        plane.look_at_unnamed(&rows, &vms).await;
        plane.settle_all().await;
        plane.sweep().await;
        plane.prune_images().await;
        tokio::spawn(Arc::clone(&plane).sweep_forever());
        tokio::spawn(Arc::clone(&plane).tidy_archives_forever());
        Ok(plane)
    }

    async fn prepare_files(&self, rows: Vec<SandboxRow>, vms: Vec<String>) -> Result<(), ApiError> {
        let home = self.config.home.clone();
        let prepared = blocking(move || archives::prepare(&home).and_then(|()| logs::prepare(&home, &rows, &vms)));
        prepared.await?.map_err(|error| errors::io("preparing archives and logs", &error))
    }

    /// Side by side.
    async fn settle_all(self: &Arc<Self>) {
        let settling = self.all().into_iter().map(|sandbox| tokio::spawn(Arc::clone(self).settle(sandbox)));
        let all = futures::future::join_all(settling.collect::<Vec<_>>());
        if tokio::time::timeout(OPENING, all).await.is_err() {
            tracing::warn!("some sandboxes of another daemon are not settled yet");
        }
    }

    /// Brings one sandbox from whatever the last daemon left to a state that is true.
    async fn settle(self: Arc<Self>, sandbox: Arc<Sandbox>) {
        let mut pause = FIRST_PAUSE;
        loop {
            let settled = supervised::run("settling a sandbox", self.try_to_settle(&sandbox)).await;
            let Err(error) = settled.map_err(|panicked| errors::internal(&panicked)).flatten() else { return };
            tracing::error!(%error, id = sandbox.record().id, "what another daemon has left is looked at again later");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn try_to_settle(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<(), ApiError> {
        let _one_transition = sandbox.transition.lock().await;
        let record = sandbox.snapshot();
        match record.status {
            // Another one came first.
            _ if sandbox.vm().is_some() => Ok(()),
            Status::Provisioning if record.started_before() => {
                let why = "the daemon ended while the sandbox was being started";
                self.end_found(sandbox, Status::Stopped, Some(record::reason(ReasonCode::DaemonRestarted, why))).await
            }
            Status::Provisioning => {
                let why = "the daemon ended while the sandbox was being made";
                self.destroy(sandbox, record::reason(ReasonCode::DaemonRestarted, why)).await
            }
            Status::Running => self.adopt(sandbox).await,
            Status::Stopping if record.removing => {
                let unknown = || record::reason(ReasonCode::Removed, "removed");
                self.destroy(sandbox, record.reason.unwrap_or_else(unknown)).await
            }
            Status::Stopping => self.finish_stopping(sandbox).await,
            Status::Failed => self.adopt_failed(sandbox).await,
            Status::Stopped | Status::Removed => Ok(()),
        }
    }

    /// The VM that an earlier daemon started; `None` when it no longer runs, an error when that is not known.
    pub(crate) async fn find_vm(&self, id: &str) -> Result<Option<Arc<dyn Vm>>, ApiError> {
        let id = id.to_owned();
        let late = |_| heyvm_vm::Error::Unreachable("no answer in time".into());
        let found = tokio::time::timeout(FINDING, self.driver.adopt(&id)).await.map_err(late).flatten();
        found.map_err(errors::vm)
    }

    /// Its end is written down only when it is known to have ended. The transition lock is held.
    pub(crate) async fn adopt(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<(), ApiError> {
        let id = sandbox.record().id.clone();
        if let Some(vm) = self.find_vm(&id).await? {
            self.take_up(sandbox, vm).await;
            return Ok(());
        }
        let (status, reason) = lifecycle::judge(self.driver.post_mortem(&id).await, self.log_tail(&id).await);
        self.save(sandbox, |record| record.enter(status, Some(reason))).await.map(drop)
    }

    /// Goes on with a VM that runs: its log, its mounts, its end.
    pub(crate) async fn take_up(self: &Arc<Self>, sandbox: &Arc<Sandbox>, vm: Arc<dyn Vm>) {
        sandbox.set_vm(Some(Arc::clone(&vm)));
        self.watch_agent(sandbox, &vm);
        self.resume_log(sandbox).await;
        self.resume_mounts(sandbox, &vm);
        let record = sandbox.snapshot();
        let has_main = record.start_command.is_some() || record.runs_the_images_command();
        let main = has_main.then(|| self.follow(sandbox, &vm));
        self.watch(sandbox, vm, main);
    }

    /// One that failed and was kept running to be looked into.
    async fn adopt_failed(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<(), ApiError> {
        let id = sandbox.record().id.clone();
        if let Some(vm) = self.find_vm(&id).await? {
            sandbox.set_vm(Some(Arc::clone(&vm)));
            self.watch_agent(sandbox, &vm);
            self.resume_mounts(sandbox, &vm);
            self.watch(sandbox, vm, None);
        }
        Ok(())
    }

    async fn finish_stopping(&self, sandbox: &Arc<Sandbox>) -> Result<(), ApiError> {
        let reason = sandbox.record().reason.clone();
        let failed = reason.as_ref().is_some_and(|reason| {
            !matches!(reason.code, ReasonCode::Stopped | ReasonCode::GuestShutdown) && reason.exit_code != Some(0)
        });
        self.end_found(sandbox, if failed { Status::Failed } else { Status::Stopped }, reason).await
    }

    /// Its disk is kept.
    async fn end_found(&self, sandbox: &Arc<Sandbox>, status: Status, reason: Option<Reason>) -> Result<(), ApiError> {
        let id = sandbox.record().id.clone();
        if let Some(vm) = self.find_vm(&id).await? {
            vm.stop(lifecycle::GRACE).await.map_err(errors::vm)?;
        }
        self.save(sandbox, |record| record.enter(status, reason)).await.map(drop)
    }

    /// Removes what is certainly no one's: the last daemon's warm pool, and the rest of a sandbox whose removal the store
    /// knows. Anything else that no row names is an orphan, and is left alone.
    async fn look_at_unnamed(&self, rows: &[SandboxRow], vms: &[String]) {
        let removed: HashSet<&str> = rows.iter().filter(|row| row.removed).map(|row| row.id.as_str()).collect();
        let named: HashSet<&str> = rows.iter().map(|row| row.id.as_str()).collect();
        for id in vms {
            if !self.driver.is_of_the_pool(id) && !removed.contains(id.as_str()) {
                if !named.contains(id.as_str()) {
                    tracing::warn!(id, "no record names this VM: it is left alone; `heyvm recover` takes it up again");
                }
                continue;
            }
            if let Err(error) = self.driver.destroy(id).await {
                tracing::error!(%error, id, "what is left of a VM could not be removed: the next daemon tries again");
            }
        }
    }
}

/// The record in a row; none where another version has written what this one cannot read.
async fn read(row: &SandboxRow, images: &ImageStore) -> Option<Record> {
    match Record::from_row(row) {
        Ok(mut record) => {
            // Earlier versions wrote the image's name alone.
            if record.image_digest.is_none() {
                record.image_digest = images.get(&record.image).await.map(|image| image.digest);
            }
            Some(record)
        }
        Err(error) => {
            tracing::error!(%error, id = row.id, "a sandbox that another version has written down is left alone");
            None
        }
    }
}
