//! A new sandbox: its place in the store first, then the region makes it.
//!
//! ```text
//! begin: quotas, name, id ─▶ placement (provisioning) ─▶ carry out: archive to the region, POST /sandboxes with the id
//!                                                            │ made              │ failed             │ nobody knows
//!                                                            ▼                   ▼                    ▼
//!                                                         as told         gone, with its reason    left to the sync
//! ```

use std::sync::Arc;

use chrono::Utc;
use heyvm_api::{
    ApiError, ErrorCode, names,
    sandbox::{CreateRequest, Reason, ReasonCode, SandboxInfo, Status},
};
use heyvm_control_plane::{DEFAULT_WORKING_DIRECTORY, ProgressSink};
use heyvm_store::{
    ContentRow, KeyRow,
    placements::{Placed, PlacementRow},
};
use tokio::sync::oneshot;

use crate::{
    Cloud, placements,
    quotas::{self, Needs},
};

/// How often a slug that nobody asked for may give way to another.
const SLUG_TRIES: u32 = 8;
const DEFAULT_DISK_GB: i64 = 10;

/// A sandbox that has its place and is not made yet.
pub struct Begun {
    /// Its row.
    row: PlacementRow,
    /// What the region is asked for.
    request: CreateRequest,
    /// The archive's content, where there is one.
    archive: Option<ContentRow>,
    /// The one whose place it takes.
    replaces: Option<PlacementRow>,
}

impl Begun {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.row.id
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.row.name
    }
}

impl Cloud {
    /// Makes a sandbox and returns when it is running. Dropping the future without an idempotency key undoes it.
    pub async fn create(
        self: &Arc<Self>,
        account: &str,
        request: CreateRequest,
        key: Option<String>,
        progress: ProgressSink,
    ) -> Result<SandboxInfo, ApiError> {
        let begun = self.begin(account, request, key.as_deref()).await?;
        let (has_its_answer, caller) = oneshot::channel();
        if key.is_none() {
            self.undo_without(caller, account.to_owned(), begun.id().to_owned());
        }
        let cloud = Arc::clone(self);
        // Apart: what is begun is never nobody's, wherever the caller leaves.
        let made = tokio::spawn(async move { cloud.carry_out(begun, progress).await }).await;
        has_its_answer.send(()).ok();
        made.unwrap_or_else(|error| Err(ApiError::new(ErrorCode::Internal, format!("the server failed: {error}"))))
    }

    /// A caller who goes away without its answer takes its sandbox along, half-made or not.
    fn undo_without(self: &Arc<Self>, caller: oneshot::Receiver<()>, account: String, id: String) {
        let cloud = Arc::clone(self);
        tokio::spawn(async move {
            if caller.await.is_err()
                && let Err(error) = cloud.remove(&account, &id).await
            {
                tracing::error!(%error, id, "what a client has left behind could not be removed");
            }
        });
    }

    /// Gives a sandbox its place, or says why it cannot have one: a region that is cut off gets none. Nothing has been made
    /// yet.
    pub async fn begin(
        self: &Arc<Self>,
        account: &str,
        mut request: CreateRequest,
        key: Option<&str>,
    ) -> Result<Begun, ApiError> {
        let asking = heyvm_control_plane::Account::of_cloud(account)?;
        heyvm_control_plane::check(&request, &asking)?;
        let key = key.map(|key| Key::new(account, key, &request));
        if let Some(key) = &key
            && let Some(known) = self.store.key(&key.key).await?
            && let Some(begun) = self.begun_before(account, key, &known, &request).await?
        {
            return Ok(begun);
        }
        let asked = key.is_some().then(|| request.clone());
        let quotas = self.quotas_of(account).await?;
        if request.ttl_seconds.is_none() && quotas.max_ttl_seconds.is_some() {
            tracing::debug!(account, "the account's ceiling stands in for a time-to-live");
        }
        request.ttl_seconds = quotas.ttl(request.ttl_seconds)?;
        let archive_id = request.archive_id.clone();
        let archive = self.archive_of(account, &mut request).await?;
        let name = request.name.get_or_insert_with(heyvm_control_plane::made_up_name).clone();
        let replaces = match request.replace {
            true => self.store.placement_named(account, &name).await?.filter(|row| row.holds_name),
            false => None,
        };
        let region = self.region_for(&request, replaces.as_ref())?;
        self.region_of(&region)?.reach().await?;
        let mut row = new_row(account, &region, &name, &request)?;
        (row.holds_name, row.archive_id) = (replaces.is_none(), archive_id);
        if let Some(old) = &replaces {
            row.slug.clone_from(request.slug.as_ref().unwrap_or(&old.slug));
        }
        if let Some(known) = self.insert(&mut row, &request, quotas, key.as_ref()).await? {
            // Another request with this key was faster.
            return match (&key, &asked) {
                (Some(key), Some(asked)) => {
                    self.begun_before(account, key, &known, asked).await?.ok_or_else(gone_already)
                }
                _ => Err(gone_already()),
            };
        }
        request.slug = Some(row.slug.clone());
        request.region = None;
        Ok(Begun { row, request, archive, replaces })
    }

    /// What this key has begun before, as long as that is not gone: the region is asked once more for the same id.
    async fn begun_before(
        &self,
        account: &str,
        key: &Key,
        known: &KeyRow,
        request: &CreateRequest,
    ) -> Result<Option<Begun>, ApiError> {
        let row = self.store.placement(&known.sandbox_id).await?.filter(|row| !row.gone);
        let Some(row) = row else { return Ok(None) };
        if known.request != key.fingerprint {
            let message = "this idempotency key came with another request";
            return Err(ApiError::new(ErrorCode::IdempotencyKeyReused, message).hint("use a new key for a new request"));
        }
        let mut request = request.clone();
        request.ttl_seconds = self.quotas_of(account).await?.ttl(request.ttl_seconds)?;
        let archive = self.archive_of(account, &mut request).await?;
        (request.name, request.slug, request.region) = (Some(row.name.clone()), Some(row.slug.clone()), None);
        // Without its name yet, it is still to take another one's place.
        let replaces = match request.replace && !row.holds_name {
            true => self.store.placement_named(account, &row.name).await?.filter(|old| old.holds_name),
            false => None,
        };
        Ok(Some(Begun { row, request, archive, replaces }))
    }

    /// The archive's content; the request then names it as the region does.
    async fn archive_of(&self, account: &str, request: &mut CreateRequest) -> Result<Option<ContentRow>, ApiError> {
        let Some(id) = &request.archive_id else { return Ok(None) };
        let (row, stored) = self.archive(account, id).await?;
        if request.archive_root.is_none() {
            let directory = request.working_directory.as_deref().unwrap_or(DEFAULT_WORKING_DIRECTORY);
            request.archive_root = self.root_in(&row, &stored, directory).await?;
        }
        request.archive_id = Some(heyvm_control_plane::archive_id(&stored.hash));
        Ok(Some(stored))
    }

    /// What takes another's place takes it where that one is.
    fn region_for(&self, request: &CreateRequest, replaces: Option<&PlacementRow>) -> Result<String, ApiError> {
        let Some(old) = replaces else { return Ok(self.choose_region(request.region.as_deref())?.name.clone()) };
        match request.region.as_deref() {
            Some(asked) if !asked.eq_ignore_ascii_case(&old.region) => {
                let message =
                    format!("sandbox {} is in region {}, and keeps its URLs only there", old.name, old.region);
                Err(ApiError::new(ErrorCode::InvalidArgument, message).hint("leave --region or --replace out"))
            }
            _ => Ok(old.region.clone()),
        }
    }

    /// Into the store, which knows whose name and slug are taken, how much the account has, and what the key stands for
    /// already: that is returned. A slug that was not asked for gives way.
    async fn insert(
        &self,
        row: &mut PlacementRow,
        request: &CreateRequest,
        quotas: crate::Quotas,
        key: Option<&Key>,
    ) -> Result<Option<KeyRow>, ApiError> {
        let made_up = row.slug.clone();
        let stands_for = key.map(|key| KeyRow { request: key.fingerprint.clone(), sandbox_id: row.id.clone() });
        let with_key = key.zip(stands_for.as_ref()).map(|(key, row)| (key.key.as_str(), row));
        for _ in 0..SLUG_TRIES {
            row.info = serde_json::to_string(&provisional(row, request).without_values()).unwrap_or_default();
            match self.store.place(row, &quotas.limits(), with_key).await {
                Ok(Placed::Added) => return Ok(None),
                Ok(Placed::Known(known)) => return Ok(Some(known)),
                Ok(Placed::Full(usage)) => return Err(quotas::refused(usage, needs(request)?, quotas)),
                Err(heyvm_store::Error::SlugTaken) if request.slug.is_none() => {
                    row.slug = names::another_slug(&made_up, rand::random());
                }
                Err(heyvm_store::Error::NameTaken | heyvm_store::Error::SlugTaken) => break,
                Err(error) => return Err(error.into()),
            }
        }
        let message = format!("a living sandbox has the name {:?} (slug {:?})", row.name, row.slug);
        Err(ApiError::new(ErrorCode::NameTaken, message)
            .hint("choose another --name, or take its place with --replace, or remove it with heyvm rm"))
    }

    /// Has the region make it, and writes down what became of it.
    pub async fn carry_out(&self, begun: Begun, progress: ProgressSink) -> Result<SandboxInfo, ApiError> {
        let region = self.region_of(&begun.row.region)?;
        match self.ask_for(region, &begun, &progress).await {
            Ok(info) => {
                if let Some(old) = &begun.replaces {
                    self.give_way(old, &placements::with(&begun.row, &info)).await?;
                }
                self.learned(&begun.row, &info).await?;
                Ok(self.told(&begun.row, info))
            }
            Err(error) => {
                let error = region.explain(error);
                self.failed(&begun, &error).await;
                Err(error)
            }
        }
    }

    async fn ask_for(
        &self,
        region: &crate::Region,
        begun: &Begun,
        progress: &ProgressSink,
    ) -> Result<SandboxInfo, ApiError> {
        let id = begun.row.id.parse().map_err(|_| ApiError::new(ErrorCode::Internal, "the sandbox's id is no UUID"))?;
        let client = region.client(&begun.row.account_id)?.with_sandbox_id(id);
        let post = || {
            let told = |event| drop(progress.send(event));
            client.post_with_progress("/sandboxes", &begun.request, None, told)
        };
        match (post().await, &begun.archive) {
            (Err(error), Some(content)) if error.code == ErrorCode::ArchiveNotFound => {
                self.bring(region, &begun.row.account_id, content).await?;
                post().await
            }
            (outcome, _) => outcome,
        }
    }

    /// The old one is gone, and its name is the new one's.
    async fn give_way(&self, old: &PlacementRow, new: &PlacementRow) -> Result<(), ApiError> {
        let info = SandboxInfo { status: Status::Removed, urls: Vec::new(), ..self.last_known(old) };
        self.store.replace_placement(&placements::with(old, &info), new).await.map_err(Into::into)
    }

    /// Writes down that it is not there, and why. Where the region was cut off meanwhile, nobody knows: the sync will.
    async fn failed(&self, begun: &Begun, error: &ApiError) {
        if error.code == ErrorCode::RegionUnavailable {
            return;
        }
        let known = begun.replaces.is_none() && error.sandbox_id.is_some();
        let info = SandboxInfo {
            status: if known { Status::Failed } else { Status::Removed },
            error_message: Some(error.message.clone()),
            reason: Some(Reason {
                code: ReasonCode::FailedStep,
                message: error.message.clone(),
                exit_code: error.exit_code,
                log_tail: error.log_tail.clone(),
            }),
            ..self.last_known(&begun.row)
        };
        let row = PlacementRow { failed: true, ..placements::with(&begun.row, &info) };
        let written = self.store.update_placement(&row).await;
        if let (Err(error), _) | (_, Err(error)) = (written, self.store.remove_keys(&row.id).await) {
            tracing::error!(%error, id = row.id, "the failure of a sandbox could not be written down");
        }
    }
}

/// An idempotency key and the request that it came with.
struct Key {
    /// As it stands in the store: accounts do not share keys.
    key: String,
    fingerprint: String,
}

impl Key {
    fn new(account: &str, key: &str, request: &CreateRequest) -> Self {
        Self { key: format!("{account} {key}"), fingerprint: heyvm_control_plane::fingerprint(request) }
    }
}

/// The sandbox of a key was removed between two questions to the store.
fn gone_already() -> ApiError {
    ApiError::new(ErrorCode::InvalidState, "the sandbox of this idempotency key was removed at this moment")
        .hint("send the request again")
}

fn needs(request: &CreateRequest) -> Result<Needs, ApiError> {
    let size_class = request.size_class.as_deref().map(names::parse_size_class).transpose()?.unwrap_or_default();
    Ok(Needs { size_class, disk_gb: request.disk_size_gb.unwrap_or(DEFAULT_DISK_GB) })
}

fn new_row(account: &str, region: &str, name: &str, request: &CreateRequest) -> Result<PlacementRow, ApiError> {
    let needs = needs(request)?;
    let now = Utc::now().timestamp_millis();
    Ok(PlacementRow {
        id: uuid::Uuid::new_v4().to_string(),
        account_id: account.to_owned(),
        region: region.to_owned(),
        name: name.to_owned(),
        slug: request.slug.clone().unwrap_or_else(|| names::slugify(name)),
        holds_name: true,
        running: true,
        gone: false,
        failed: false,
        created_at: now,
        changed_at: now,
        vcpu_millis: needs.size_class.cpu_millis().into(),
        memory_mib: needs.size_class.memory_mib().into(),
        disk_gb: needs.disk_gb,
        archive_id: None,
        info: String::new(),
    })
}

/// A sandbox of which the region has not told yet.
pub(crate) fn provisional(row: &PlacementRow, request: &CreateRequest) -> SandboxInfo {
    let created_at = chrono::DateTime::from_timestamp_millis(row.created_at).unwrap_or_default();
    let needs = needs(request).unwrap_or(Needs { size_class: Default::default(), disk_gb: row.disk_gb });
    let ttl = request.ttl_seconds.and_then(chrono::Duration::try_seconds);
    SandboxInfo {
        id: row.id.clone(),
        name: row.name.clone(),
        slug: row.slug.clone(),
        status: Status::Provisioning,
        image: request.image.clone().unwrap_or_default(),
        image_requested: None,
        backend_type: "qemu".into(),
        region: row.region.clone(),
        size_class: needs.size_class,
        disk_size_gb: u32::try_from(needs.disk_gb).unwrap_or_default(),
        is_deployed: request.archive_id.is_some(),
        archive_id: request.archive_id.clone(),
        created_at,
        status_changed_at: created_at,
        uptime_secs: 0,
        ttl_seconds: request.ttl_seconds,
        expires_at: ttl.and_then(|ttl| created_at.checked_add_signed(ttl)),
        env_vars: request.env_vars.clone(),
        start_command: request.start_command.clone(),
        image_command: Vec::new(),
        exposed_ports: Vec::new(),
        working_directory: request.working_directory.clone().unwrap_or_else(|| DEFAULT_WORKING_DIRECTORY.into()),
        setup_hooks: request.setup_hooks.clone(),
        error_message: None,
        reason: None,
        urls: Vec::new(),
        mounts: Vec::new(),
        response_timeout_seconds: request.response_timeout_seconds.and_then(|seconds| u32::try_from(seconds).ok()),
        checkpoint_at: None,
        warnings: Vec::new(),
        agent: None,
        step: None,
        restart: request.restart.unwrap_or_default(),
        restart_count: 0,
        next_start_at: None,
        account_id: None,
    }
}
