//! What a new daemon finds: VMs that still run are adopted, half-made ones removed, ended ones judged, strays destroyed.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, RwLock},
};

use heyvm_api::{
    ApiError,
    sandbox::{Reason, ReasonCode, Status},
};
use heyvm_store::Store;
use heyvm_vm::Driver;

use crate::{Config, ControlPlane, Sandbox, errors, lifecycle, record};

impl ControlPlane {
    /// Opens the state: adopts running VMs, cleans up half-made ones, removes what has expired, starts the timers.
    pub async fn open(
        config: Config,
        store: Store,
        driver: Arc<dyn Driver>,
        images: Arc<heyvm_images::ImageStore>,
    ) -> Result<Arc<Self>, ApiError> {
        let rows = store.sandboxes().await.map_err(errors::store)?;
        let records = rows.iter().filter_map(record::Record::from_row);
        let sandboxes: HashMap<_, _> = records.map(|record| (record.id.clone(), Sandbox::new(record))).collect();
        let plane = Arc::new(Self {
            config,
            store,
            driver,
            images,
            sandboxes: RwLock::new(sandboxes),
            endpoints: RwLock::default(),
            keys: tokio::sync::Mutex::default(),
            reloading: tokio::sync::Mutex::default(),
        });
        plane.reload_endpoints().await?;
        plane.prepare_directories()?;
        plane.remove_strays().await?;
        let found: Vec<_> = plane
            .all()
            .into_iter()
            .map(|sandbox| {
                let plane = Arc::clone(&plane);
                tokio::spawn(async move { plane.settle(&sandbox).await })
            })
            .collect();
        for each in found {
            each.await.map_err(|error| errors::internal(&error))?;
        }
        plane.sweep().await;
        tokio::spawn(Arc::clone(&plane).sweep_forever());
        Ok(plane)
    }

    /// Brings one sandbox from whatever the last daemon left to a state that is true.
    async fn settle(self: &Arc<Self>, sandbox: &Arc<Sandbox>) {
        let _one_transition = sandbox.transition.lock().await;
        let record = sandbox.snapshot();
        match record.status {
            Status::Provisioning if record.started_before() => self.give_up_start(sandbox).await,
            Status::Provisioning => {
                let reason =
                    record::reason(ReasonCode::DaemonRestarted, "the daemon ended while the sandbox was being made");
                self.put_away(sandbox, reason).await;
            }
            Status::Running => self.adopt(sandbox).await,
            Status::Stopping if record.removing => {
                let unknown = || record::reason(ReasonCode::Removed, "removed");
                self.put_away(sandbox, record.reason.unwrap_or_else(unknown)).await;
            }
            Status::Stopping => self.finish_stopping(sandbox).await,
            Status::Failed => self.adopt_failed(sandbox).await,
            Status::Stopped | Status::Removed => {}
        }
    }

    async fn adopt(self: &Arc<Self>, sandbox: &Arc<Sandbox>) {
        let id = sandbox.record().id.clone();
        match self.driver.adopt(&id).await {
            Ok(Some(vm)) => {
                sandbox.set_vm(Some(Arc::clone(&vm)));
                self.resume_log(sandbox);
                let main = sandbox.record().start_command.is_some().then(|| self.follow(sandbox, &vm));
                self.watch(sandbox, vm, main);
            }
            other => {
                if let Err(error) = other {
                    tracing::error!(%error, id, "a running sandbox could not be adopted");
                }
                let (status, reason) = lifecycle::judge(self.driver.post_mortem(&id).await, self.log_tail(&id));
                if let Err(error) = self.save(sandbox, |record| record.enter(status, Some(reason))).await {
                    tracing::error!(%error, id, "the end of a sandbox could not be written down");
                }
            }
        }
    }

    /// One that failed and was kept running to be looked into.
    async fn adopt_failed(self: &Arc<Self>, sandbox: &Arc<Sandbox>) {
        let id = sandbox.record().id.clone();
        if let Ok(Some(vm)) = self.driver.adopt(&id).await {
            sandbox.set_vm(Some(Arc::clone(&vm)));
            self.watch(sandbox, vm, None);
        }
    }

    /// What cannot be removed now stays on its way out, for the next daemon or the next `rm`.
    async fn put_away(&self, sandbox: &Arc<Sandbox>, reason: Reason) {
        if let Err(error) = self.destroy(sandbox, reason).await {
            tracing::error!(%error, "what another daemon has left could not be removed");
        }
    }

    async fn finish_stopping(&self, sandbox: &Arc<Sandbox>) {
        let record = sandbox.snapshot();
        if let Ok(Some(vm)) = self.driver.adopt(&record.id).await {
            let _ = vm.stop(std::time::Duration::from_secs(5)).await;
        }
        let failed = record.reason.as_ref().is_some_and(|reason| {
            !matches!(reason.code, ReasonCode::Stopped | ReasonCode::GuestShutdown) && reason.exit_code != Some(0)
        });
        let status = if failed { Status::Failed } else { Status::Stopped };
        let reason = record.reason.clone();
        let _ = self.save(sandbox, |record| record.enter(status, reason)).await;
    }

    /// The daemon ended while a stopped one was being started again: its disk is kept.
    async fn give_up_start(&self, sandbox: &Arc<Sandbox>) {
        let id = sandbox.record().id.clone();
        if let Ok(Some(vm)) = self.driver.adopt(&id).await {
            let _ = vm.stop(std::time::Duration::from_secs(5)).await;
        }
        let reason =
            record::reason(ReasonCode::DaemonRestarted, "the daemon ended while the sandbox was being started");
        let _ = self.save(sandbox, |record| record.enter(Status::Stopped, Some(reason))).await;
    }

    /// What the driver has and no record claims.
    async fn remove_strays(&self) -> Result<(), ApiError> {
        let known: HashSet<String> = self
            .all()
            .iter()
            .map(|sandbox| sandbox.snapshot())
            .filter(|record| record.status != Status::Removed)
            .map(|record| record.id)
            .collect();
        for id in self.driver.list().await.map_err(errors::vm)? {
            if !known.contains(&id) {
                self.driver.destroy(&id).await.map_err(errors::vm)?;
            }
        }
        Ok(())
    }

    fn prepare_directories(&self) -> Result<(), ApiError> {
        for dir in ["archives", "logs"] {
            std::fs::create_dir_all(self.config.home.join(dir))
                .map_err(|error| errors::io("making a directory", &error))?;
        }
        Ok(())
    }
}
