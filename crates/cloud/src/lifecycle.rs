//! What may be done with a sandbox that is there: the region does it, and what it answers is written down.

use heyvm_api::{
    ApiError,
    sandbox::{BindRequest, BoundPort, SandboxInfo, Status},
};
use heyvm_control_plane::ProgressSink;
use serde::Serialize;

use crate::{Cloud, Place, quotas, quotas::Needs};

impl Cloud {
    /// Ends the VM and keeps the disk.
    pub async fn stop(&self, account: &str, who: &str) -> Result<SandboxInfo, ApiError> {
        let place = self.find(account, who).await?;
        self.post(&place, "/stop", &()).await
    }

    /// Destroys a sandbox with its disk and URLs. Removing a removed one succeeds.
    pub async fn remove(&self, account: &str, who: &str) -> Result<SandboxInfo, ApiError> {
        let place = self.find(account, who).await?;
        let removed = place.client()?.delete(&place.path("")).await;
        match removed {
            Ok(info) => self.answer(&place, info).await,
            // The region has forgotten it, or never had it.
            Err(error) if error.code == heyvm_api::ErrorCode::SandboxNotFound => {
                let info = SandboxInfo { status: Status::Removed, urls: Vec::new(), ..self.last_known(&place.row) };
                self.answer(&place, info).await
            }
            Err(error) => Err(place.region.explain(error)),
        }
    }

    /// Goes on from the disk, if the account has room for one more that runs.
    pub async fn start(&self, account: &str, who: &str, progress: ProgressSink) -> Result<SandboxInfo, ApiError> {
        let place = self.find(account, who).await?;
        self.make_room(&place, None).await?;
        self.long(&place, "/start", progress).await
    }

    /// Stop, then start.
    pub async fn restart(&self, account: &str, who: &str, progress: ProgressSink) -> Result<SandboxInfo, ApiError> {
        let place = self.find(account, who).await?;
        self.make_room(&place, None).await?;
        self.long(&place, "/restart", progress).await
    }

    /// Sets the time-to-live anew, from now on, within the account's ceiling.
    pub async fn set_ttl(&self, account: &str, who: &str, ttl: Option<i64>) -> Result<SandboxInfo, ApiError> {
        let place = self.find(account, who).await?;
        let ttl_seconds = self.quotas_of(account).await?.ttl(ttl)?;
        self.post(&place, "/ttl", &heyvm_api::sandbox::TtlRequest { ttl_seconds }).await
    }

    /// Another size class, or a larger disk, if the account has room for it.
    pub async fn resize(
        &self,
        account: &str,
        who: &str,
        request: &heyvm_api::sandbox::ResizeRequest,
    ) -> Result<SandboxInfo, ApiError> {
        let place = self.find(account, who).await?;
        let known = self.last_known(&place.row);
        let size_class = match &request.size_class {
            Some(text) => heyvm_api::names::parse_size_class(text)?,
            None => known.size_class,
        };
        let needs = Needs { size_class, disk_gb: request.disk_size_gb.unwrap_or(place.row.disk_gb) };
        self.make_room(&place, Some(needs)).await?;
        self.post(&place, "/resize", request).await
    }

    /// Keeps a copy of the disk as it is now.
    pub async fn checkpoint(&self, account: &str, who: &str) -> Result<SandboxInfo, ApiError> {
        let place = self.find(account, who).await?;
        self.post(&place, "/checkpoint", &()).await
    }

    /// Goes back to that copy.
    pub async fn restore(&self, account: &str, who: &str) -> Result<SandboxInfo, ApiError> {
        let place = self.find(account, who).await?;
        self.post(&place, "/restore", &()).await
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

    pub(crate) async fn post(
        &self,
        place: &Place<'_>,
        what: &str,
        body: &impl Serialize,
    ) -> Result<SandboxInfo, ApiError> {
        let outcome = place.client()?.post(&place.path(what), body).await;
        self.settled(place, outcome).await
    }

    async fn long(&self, place: &Place<'_>, what: &str, progress: ProgressSink) -> Result<SandboxInfo, ApiError> {
        let told = |event| drop(progress.send(event));
        let outcome = place.client()?.post_with_progress(&place.path(what), &(), None, told).await;
        self.settled(place, outcome).await
    }

    /// Writes down what a change came to; after one that failed, what the sandbox is now.
    pub(crate) async fn settled(
        &self,
        place: &Place<'_>,
        outcome: Result<SandboxInfo, ApiError>,
    ) -> Result<SandboxInfo, ApiError> {
        match outcome {
            Ok(info) => self.answer(place, info).await,
            Err(error) => {
                self.look_again(place).await.ok();
                Err(place.region.explain(error))
            }
        }
    }

    async fn answer(&self, place: &Place<'_>, info: SandboxInfo) -> Result<SandboxInfo, ApiError> {
        self.learned(&place.row, &info).await?;
        Ok(self.told(&place.row, info))
    }

    /// After a change that did not answer with the sandbox itself.
    async fn look_again(&self, place: &Place<'_>) -> Result<(), ApiError> {
        let info: SandboxInfo = place.region.ask(&place.account, &place.path("")).await?;
        self.learned(&place.row, &info).await
    }

    /// Counts it as running with these needs, or says which limit stands in the way.
    async fn make_room(&self, place: &Place<'_>, needs: Option<Needs>) -> Result<(), ApiError> {
        let size_class = self.last_known(&place.row).size_class;
        let (needs, runs) = match needs {
            None => (Needs { size_class, disk_gb: place.row.disk_gb }, true),
            Some(needs) => (needs, place.row.running),
        };
        let quotas = self.quotas_of(&place.account).await?;
        let wanted = heyvm_store::placements::PlacementRow {
            running: runs,
            vcpu_millis: needs.size_class.cpu_millis().into(),
            memory_mib: needs.size_class.memory_mib().into(),
            disk_gb: needs.disk_gb,
            ..place.row.clone()
        };
        match self.store.make_room(&wanted, &quotas.limits()).await? {
            None => Ok(()),
            Some(usage) => Err(quotas::refused(usage, needs, quotas)),
        }
    }
}
