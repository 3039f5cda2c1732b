//! What may be done with a sandbox that is there: the region does it, and what it answers is written down.

use std::{sync::Arc, time::Duration};

use chrono::Utc;
use heyvm_api::{
    ApiError, ErrorCode,
    sandbox::{BindRequest, BoundPort, ReplaceMountRequest, ResizeRequest, SandboxInfo, Status, TtlRequest},
};
use heyvm_control_plane::ProgressSink;
use serde_json::Value;
use tokio::sync::mpsc;

use crate::{Cloud, Place, quotas, quotas::Needs};

/// How long what an operation asked for counts where the server dies before the operation ends: longer than any takes.
const LONGEST_OPERATION: Duration = Duration::from_secs(1800);

/// Everything that changes a sandbox that is there. [`Cloud::operate`] is the one way to the region for all of them, and
/// [`Operation::wants`] the one place that says which of them need room in the account's quotas.
pub(crate) enum Operation {
    Stop,
    Start,
    Restart,
    SetTtl(TtlRequest),
    Resize(ResizeRequest),
    Checkpoint,
    Restore,
    ReplaceMount(ReplaceMountRequest),
}

/// What an operation takes from the account's quotas.
enum Wants {
    /// Nothing that it does not have.
    Nothing,
    /// To run, as large as it is.
    ToRun,
    /// To be as large as this; it runs if it does already.
    ToBe(Needs),
}

impl Operation {
    fn path(&self) -> &'static str {
        match self {
            Self::Stop => "/stop",
            Self::Start => "/start",
            Self::Restart => "/restart",
            Self::SetTtl(_) => "/ttl",
            Self::Resize(_) => "/resize",
            Self::Checkpoint => "/checkpoint",
            Self::Restore => "/restore",
            Self::ReplaceMount(_) => "/replace-mount",
        }
    }

    fn body(&self) -> Value {
        match self {
            Self::Stop | Self::Start | Self::Restart | Self::Checkpoint | Self::Restore => Value::Null,
            Self::SetTtl(request) => serde_json::json!(request),
            Self::Resize(request) => serde_json::json!(request),
            Self::ReplaceMount(request) => serde_json::json!(request),
        }
    }

    fn wants(&self, place: &Place<'_>, now: &SandboxInfo) -> Result<Wants, ApiError> {
        Ok(match self {
            // What is replaced runs: it has its room.
            Self::Stop | Self::SetTtl(_) | Self::Checkpoint | Self::ReplaceMount(_) => Wants::Nothing,
            Self::Start | Self::Restart | Self::Restore => Wants::ToRun,
            Self::Resize(request) => {
                let size_class = match &request.size_class {
                    Some(text) => heyvm_api::names::parse_size_class(text)?,
                    None => now.size_class,
                };
                Wants::ToBe(Needs { size_class, disk_gb: request.disk_size_gb.unwrap_or(place.row.disk_gb) })
            }
        })
    }
}

impl Cloud {
    /// Ends the VM and keeps the disk.
    pub async fn stop(self: &Arc<Self>, account: &str, who: &str) -> Result<SandboxInfo, ApiError> {
        self.operate(self.find(account, who).await?, Operation::Stop, None).await
    }

    /// Destroys a sandbox with its disk and URLs. Removing a removed one succeeds.
    pub async fn remove(&self, account: &str, who: &str) -> Result<SandboxInfo, ApiError> {
        let place = self.find(account, who).await?;
        let removed = place.client()?.delete(&place.path("")).await;
        match removed {
            Ok(info) => self.answer(&place, info).await,
            // The region has forgotten it, or never had it.
            Err(error) if error.code == ErrorCode::SandboxNotFound => {
                let info = SandboxInfo { status: Status::Removed, urls: Vec::new(), ..self.last_known(&place.row) };
                self.answer(&place, info).await
            }
            Err(error) => Err(place.region.explain(error)),
        }
    }

    /// Goes on from the disk, if the account has room for one more that runs.
    pub async fn start(
        self: &Arc<Self>,
        account: &str,
        who: &str,
        progress: ProgressSink,
    ) -> Result<SandboxInfo, ApiError> {
        self.operate(self.find(account, who).await?, Operation::Start, Some(progress)).await
    }

    /// Stop, then start.
    pub async fn restart(
        self: &Arc<Self>,
        account: &str,
        who: &str,
        progress: ProgressSink,
    ) -> Result<SandboxInfo, ApiError> {
        self.operate(self.find(account, who).await?, Operation::Restart, Some(progress)).await
    }

    /// Sets the time-to-live anew, from now on, within the account's ceiling.
    pub async fn set_ttl(
        self: &Arc<Self>,
        account: &str,
        who: &str,
        ttl: Option<i64>,
    ) -> Result<SandboxInfo, ApiError> {
        let place = self.find(account, who).await?;
        let ttl_seconds = self.quotas_of(account).await?.ttl(ttl)?;
        self.operate(place, Operation::SetTtl(TtlRequest { ttl_seconds }), None).await
    }

    /// Another size class, or a larger disk, if the account has room for it.
    pub async fn resize(
        self: &Arc<Self>,
        account: &str,
        who: &str,
        request: &ResizeRequest,
    ) -> Result<SandboxInfo, ApiError> {
        self.operate(self.find(account, who).await?, Operation::Resize(request.clone()), None).await
    }

    /// Keeps a copy of the disk as it is now.
    pub async fn checkpoint(self: &Arc<Self>, account: &str, who: &str) -> Result<SandboxInfo, ApiError> {
        self.operate(self.find(account, who).await?, Operation::Checkpoint, None).await
    }

    /// Goes back to that copy and runs from there, if the account has room for it.
    pub async fn restore(self: &Arc<Self>, account: &str, who: &str) -> Result<SandboxInfo, ApiError> {
        self.operate(self.find(account, who).await?, Operation::Restore, None).await
    }

    /// Gives a port a URL, or makes a bound one public or private.
    pub async fn bind(&self, account: &str, who: &str, request: &BindRequest) -> Result<BoundPort, ApiError> {
        let place = self.find(account, who).await?;
        let bound: Result<BoundPort, _> = place.client()?.post(&place.path("/proxy"), request).await;
        let bound = bound.map_err(|error| place.region.explain(error))?;
        self.look_again(&place).await?;
        Ok(BoundPort { endpoint: self.url(bound.endpoint), ..bound })
    }

    /// The bound ports.
    pub async fn endpoints(&self, account: &str, who: &str) -> Result<Vec<BoundPort>, ApiError> {
        let place = self.find(account, who).await?;
        let bound: Vec<BoundPort> = place.region.ask(&place.account, &place.path("/proxy")).await?;
        Ok(bound.into_iter().map(|bound| BoundPort { endpoint: self.url(bound.endpoint), ..bound }).collect())
    }

    /// Takes a port's URL away.
    pub async fn unbind(&self, account: &str, who: &str, port: i64) -> Result<(), ApiError> {
        let place = self.find(account, who).await?;
        let gone = place.client()?.delete_quietly(&place.path(&format!("/proxy/{port}"))).await;
        gone.map_err(|error| place.region.explain(error))?;
        self.look_again(&place).await
    }

    /// Has the region do it, once the account has room for it, and writes down what it came to. Runs to its end whatever
    /// becomes of the caller, so that what it holds of the account's quotas is given back.
    pub(crate) async fn operate(
        self: &Arc<Self>,
        place: Place<'_>,
        operation: Operation,
        progress: Option<ProgressSink>,
    ) -> Result<SandboxInfo, ApiError> {
        let (cloud, row) = (Arc::clone(self), place.row);
        let operating = tokio::spawn(async move {
            let place = cloud.place(row)?;
            cloud.operate_to_its_end(&place, &operation, progress).await
        });
        operating
            .await
            .unwrap_or_else(|error| Err(ApiError::new(ErrorCode::Internal, format!("the server failed: {error}"))))
    }

    async fn operate_to_its_end(
        &self,
        place: &Place<'_>,
        operation: &Operation,
        progress: Option<ProgressSink>,
    ) -> Result<SandboxInfo, ApiError> {
        let holds = self.make_room(place, operation).await?;
        let progress = progress.unwrap_or_else(|| mpsc::unbounded_channel().0);
        let outcome = self.ask_region(place, operation, progress).await;
        if holds {
            self.store.release_room(&place.id).await?;
        }
        match outcome {
            Ok(info) => self.answer(place, info).await,
            Err(error) => {
                if let Err(unknown) = self.look_again(place).await {
                    tracing::debug!(error = %unknown, id = place.id, "the region cannot say how the sandbox is now");
                }
                Err(place.region.explain(error))
            }
        }
    }

    async fn ask_region(
        &self,
        place: &Place<'_>,
        operation: &Operation,
        progress: ProgressSink,
    ) -> Result<SandboxInfo, ApiError> {
        let told = |event| drop(progress.send(event));
        place.client()?.post_with_progress(&place.path(operation.path()), &operation.body(), None, told).await
    }

    pub(crate) async fn answer(&self, place: &Place<'_>, info: SandboxInfo) -> Result<SandboxInfo, ApiError> {
        self.learned(&place.row, &info).await?;
        Ok(self.told(&place.row, info))
    }

    /// After a change that did not answer with the sandbox itself.
    async fn look_again(&self, place: &Place<'_>) -> Result<(), ApiError> {
        let info: SandboxInfo = place.region.ask(&place.account, &place.path("")).await?;
        self.learned(&place.row, &info).await
    }

    /// Counts what the operation asks for until it ends, or says which limit stands in the way. Whether it is held.
    async fn make_room(&self, place: &Place<'_>, operation: &Operation) -> Result<bool, ApiError> {
        let known = self.last_known(&place.row);
        let (needs, runs) = match operation.wants(place, &known)? {
            Wants::Nothing => return Ok(false),
            Wants::ToRun => (Needs { size_class: known.size_class, disk_gb: place.row.disk_gb }, true),
            Wants::ToBe(needs) => (needs, place.row.running),
        };
        let quotas = self.quotas_of(&place.account).await?;
        let wanted = heyvm_store::placements::PlacementRow {
            running: runs,
            vcpu_millis: needs.size_class.cpu_millis().into(),
            memory_mib: needs.size_class.memory_mib().into(),
            disk_gb: needs.disk_gb,
            ..place.row.clone()
        };
        let now = Utc::now().timestamp_millis();
        let until = now.saturating_add(i64::try_from(LONGEST_OPERATION.as_millis()).unwrap_or(i64::MAX));
        match self.store.make_room(&wanted, &quotas.limits(), now, until).await? {
            None => Ok(true),
            Some(usage) => Err(quotas::refused(usage, needs, quotas)),
        }
    }
}
