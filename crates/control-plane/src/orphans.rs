//! VMs and disks that no row of the store names: a store that was lost, made again, or restored from a backup removes none.
//!
//! ```text
//!  a row names it ──▶ sandbox ◀── recover ── orphan ── rm ──▶ gone
//!                        └── its row is lost ──▶┘
//! ```
//! An orphan stays where it is, untouched, its VM running: with the right store it is a sandbox again. Beside each disk
//! lies a note with the sandbox's record and the id of the store that it is from.

use std::{collections::HashSet, sync::Arc};

use chrono::{DateTime, Utc};
use heyvm_api::{
    ApiError, ErrorCode, names,
    orphans::{OrphanInfo, OrphanStatus, RecoverRequest},
    sandbox::{ReasonCode, SandboxInfo, Status},
    system::{Check, CheckStatus},
};
use heyvm_store::Store;
use heyvm_vm::{Driver, Remains};
use serde::{Deserialize, Serialize};

use crate::{
    Account, ControlPlane, Sandbox, Who, errors,
    record::{self, Record},
    spawn_detached, validate,
};

/// What lies beside a disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Note {
    /// The store that the record is from.
    pub store: String,
    /// The sandbox, as it was last saved.
    pub record: Record,
}

impl Note {
    /// The note among what is there of a VM; `None` where there is none, or another version's.
    pub fn of(remains: &Remains) -> Option<Self> {
        serde_json::from_slice(remains.note.as_deref()?).ok()
    }
}

/// Keeps a record beside its disk. A note that cannot be kept harms nothing before the store is lost.
pub(crate) async fn keep_note(driver: &dyn Driver, store_id: &str, record: &Record) {
    let note = Note { store: store_id.to_owned(), record: record.clone() };
    let kept = match serde_json::to_vec(&note) {
        Ok(bytes) => driver.keep_note(&record.id, bytes).await.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    if let Err(error) = kept {
        tracing::warn!(error, id = record.id, "a sandbox's record could not be kept beside its disk");
    }
}

/// The record that is true: the row's, or the one beside the disk where that is newer, as after a backup of the store was
/// restored. The row is brought up to date.
pub(crate) async fn newest(driver: &dyn Driver, store: &Store, row: Record) -> Record {
    let noted = match driver.remains(&row.id).await {
        Ok(remains) => remains.as_ref().and_then(Note::of).map(|note| note.record),
        Err(error) => {
            tracing::warn!(%error, id = row.id, "the note beside a disk cannot be read now");
            None
        }
    };
    let newer = noted.filter(|noted| noted.id == row.id && noted.revision > row.revision);
    let Some(newer) = newer.filter(|_| row.status != Status::Removed) else { return row };
    tracing::warn!(
        id = row.id,
        name = newer.name,
        "the store is older than a sandbox's disk: the record beside it counts"
    );
    match store.update(&newer.row()).await {
        Ok(()) => newer,
        Err(error) => {
            // Its name may be another one's by now. What would remove it is taken from the newer record all the same.
            tracing::error!(%error, id = row.id, "the newer record of a sandbox could not be saved");
            Record { has_run: newer.has_run, ttl_seconds: newer.ttl_seconds, ..row }
        }
    }
}

impl ControlPlane {
    /// Ids of what the driver has and no row names, also none that cannot be read.
    pub(crate) async fn orphan_ids(&self) -> Result<Vec<String>, ApiError> {
        // A sandbox is known before it has a VM: of those that are listed first, none is missing from memory then.
        let mut ids = self.driver.list().await.map_err(errors::vm)?;
        ids.retain(|id| self.with_id(id).is_none() && !self.unread.contains(id) && !self.driver.is_of_the_pool(id));
        ids.sort();
        Ok(ids)
    }

    /// What no row names, with what is known of it.
    pub async fn orphans(&self) -> Result<Vec<OrphanInfo>, ApiError> {
        let mut orphans = Vec::new();
        for id in self.orphan_ids().await? {
            if let Some(remains) = self.driver.remains(&id).await.map_err(errors::vm)? {
                orphans.push(described(id, &remains));
            }
        }
        Ok(orphans)
    }

    /// Digests of the images that orphans run; `None` where one of them does not say which.
    pub(crate) async fn images_of_orphans(&self) -> Result<Option<HashSet<String>>, ApiError> {
        let mut digests = HashSet::new();
        for id in self.orphan_ids().await? {
            let Some(remains) = self.driver.remains(&id).await.map_err(errors::vm)? else { continue };
            match Note::of(&remains).and_then(|note| note.record.image_digest) {
                Some(digest) => drop(digests.insert(digest)),
                None => return Ok(None),
            }
        }
        Ok(Some(digests))
    }

    /// Makes an orphan a sandbox again: running where its VM runs, else stopped. Its disk is not touched.
    pub async fn recover(self: &Arc<Self>, who: &Who, request: RecoverRequest) -> Result<SandboxInfo, ApiError> {
        who.account.must_be_owner("recovering an orphan")?;
        if let Some(name) = &request.name {
            names::check_name(name)?;
        }
        let (plane, who) = (Arc::clone(self), who.clone());
        spawn_detached(async move { plane.recover_now(&who, request).await }).await
    }

    async fn recover_now(self: &Arc<Self>, who: &Who, request: RecoverRequest) -> Result<SandboxInfo, ApiError> {
        let _one_at_a_time = self.keys.lock().await;
        let Some((id, remains)) = self.find_orphan(&who.sandbox).await? else { return Err(self.no_orphan(who)) };
        let mut record = self.record_of(&id, &remains).await?;
        if let Some(name) = request.name {
            (record.slug, record.name) = (names::slugify(&name), name);
        }
        self.must_not_be_an_id(&record)?;
        let vm = self.find_vm(&id).await?;
        let reason = record::reason(ReasonCode::Stopped, "recovered; its VM does not run");
        match vm.is_some() {
            true => record.run(),
            false => record.enter(Status::Stopped, Some(reason)),
        }
        self.insert(&mut record, true).await.map_err(|error| match error.code {
            ErrorCode::NameTaken => error.hint(format!("Give it another name: heyvm recover {id} --name NAME")),
            _ => error,
        })?;
        let sandbox = Sandbox::new(record);
        self.add(&sandbox);
        let _one_transition = sandbox.transition.lock().await;
        if let Some(vm) = vm {
            self.take_up(&sandbox, vm).await;
        }
        let record = sandbox.snapshot();
        for port in &record.open_ports {
            if let Err(error) = self.bind_port(id.clone(), *port, record.ports_are_public).await {
                tracing::warn!(%error, id, port, "a port of a recovered sandbox could not be bound");
            }
        }
        // Its note names this store from now on.
        let record = self.save(&sandbox, |_| {}).await?;
        Ok(self.info(&record))
    }

    /// Removes an orphan with its disk. `None` where there is none of this id.
    pub(crate) async fn remove_orphan(self: &Arc<Self>, who: &Who) -> Result<Option<SandboxInfo>, ApiError> {
        let Some((id, remains)) = self.find_orphan(&who.sandbox).await? else { return Ok(None) };
        let mut record = self.record_of(&id, &remains).await?;
        let plane = Arc::clone(self);
        spawn_detached(async move {
            plane.driver.destroy(&id).await.map_err(errors::vm)?;
            plane.forget_mounts(&id).await;
            plane.remove_log(&id).await;
            record.enter(Status::Removed, Some(record::reason(ReasonCode::Removed, "removed by a request")));
            Ok(Some(record.info(Vec::new())))
        })
        .await
    }

    /// By id, or the beginning of it.
    async fn find_orphan(&self, id: &str) -> Result<Option<(String, Remains)>, ApiError> {
        let ids = self.orphan_ids().await?;
        let id = match ids.iter().find(|known| *known == id) {
            Some(id) => Some(id.clone()),
            None => names::only_one_with(id, ids.into_iter())?,
        };
        let Some(id) = id else { return Ok(None) };
        let remains = self.driver.remains(&id).await.map_err(errors::vm)?;
        Ok(remains.map(|remains| (id, remains)))
    }

    fn no_orphan(&self, who: &Who) -> ApiError {
        match self.find(who) {
            Ok(sandbox) => {
                let record = sandbox.snapshot();
                ApiError::new(ErrorCode::InvalidState, format!("{} is a sandbox, and no orphan", record.name))
                    .hint(format!("Run `heyvm start {}` if it is stopped.", record.name))
                    .sandbox(record.id)
            }
            Err(_) => ApiError::new(ErrorCode::SandboxNotFound, format!("there is no orphan {:?}", who.sandbox))
                .hint("Run `heyvm list --all`: it lists orphans with their ids."),
        }
    }

    /// The record of an orphan: from its note, else from what its files say.
    async fn record_of(&self, id: &str, remains: &Remains) -> Result<Record, ApiError> {
        let mut record = match Note::of(remains) {
            Some(note) => note.record,
            None => self.guessed(remains).await?,
        };
        record.id = id.to_owned();
        (record.removing, record.waiting_to_replace, record.has_run) = (false, false, true);
        // One whose time has run out meanwhile would be removed the moment it is recovered.
        if record.expires_at().is_some_and(|at| at <= Utc::now()) {
            record.ttl_seconds = None;
            record.warnings.push("its time-to-live had run out: it has none now".into());
        }
        Ok(record)
    }

    async fn guessed(&self, remains: &Remains) -> Result<Record, ApiError> {
        let mut record = validate::record(&Default::default(), &Account::owner(), &self.config)?;
        record.created_at = remains.changed_at.into();
        record.disk_gib = remains.disk_gib.max(1);
        let default = match self.images.get(&self.config.default_image).await {
            Some(image) => Some(image),
            None => self.images.list().await.into_iter().next(),
        };
        if let Some(image) = default {
            record.warnings.push(format!("nothing says which image it was made from: {} is assumed", image.name));
            (record.image, record.image_digest) = (image.name, Some(image.digest));
        }
        Ok(record)
    }

    /// What `doctor` says of orphans.
    pub(crate) async fn orphan_check(&self) -> Check {
        let name = "orphans".to_owned();
        let orphans = match self.orphans().await {
            Ok(orphans) => orphans,
            Err(error) => {
                return Check { name, status: CheckStatus::Warn, message: error.message, hint: error.hint };
            }
        };
        if orphans.is_empty() {
            return Check {
                name,
                status: CheckStatus::Ok,
                message: "every disk belongs to a sandbox".into(),
                hint: None,
            };
        }
        let listed = orphans.iter().map(|orphan| {
            let age = (Utc::now() - orphan.changed_at).num_hours().max(0);
            let running = if orphan.running { ", running" } else { "" };
            format!("{} ({} MiB, {age} h old{running})", orphan.id, orphan.size_bytes >> 20)
        });
        Check {
            name,
            status: CheckStatus::Warn,
            message: format!("no record names {}", listed.collect::<Vec<_>>().join(", ")),
            hint: Some("Run `heyvm recover ID` to make one a sandbox again, `heyvm rm ID` to remove it.".into()),
        }
    }
}

fn described(id: String, remains: &Remains) -> OrphanInfo {
    let note = Note::of(remains);
    let record = note.as_ref().map(|note| &note.record);
    OrphanInfo {
        id,
        name: record.map(|record| record.name.clone()),
        status: OrphanStatus::Orphaned,
        running: remains.running,
        size_bytes: remains.size_bytes,
        changed_at: DateTime::<Utc>::from(remains.changed_at),
        image: record.map(|record| record.image.clone()),
        store_id: note.as_ref().map(|note| note.store.clone()),
    }
}
