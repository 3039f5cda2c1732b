//! Images and the host's fitness, as the API tells of them.

use std::{
    path::PathBuf,
    sync::{Arc, PoisonError},
};

use chrono::{TimeZone, Utc};
use heyvm_api::{
    ApiError, ErrorCode,
    images::{ImageInfo, ImportRequest, PruneRequest, PruneResponse, PullRequest},
    sandbox::{CreateRequest, Status},
    system::{Check, CheckStatus, DoctorReport},
};
use heyvm_images::{Extent, Image, Prune, Requester, Resolved, Variant, Wanted};

use crate::{
    Account, ControlPlane, GuestDefaults, ProgressSink, Sandbox, errors, record::Record, resolver, tell, validate,
};

/// Less than this under the home makes sandboxes fail before long.
const LOW_DISK: u64 = 2 << 30;

impl ControlPlane {
    async fn image_info(&self, image: &Image) -> ImageInfo {
        self.described(image, self.images.get(&self.config.default_image).await.is_some())
    }

    fn described(&self, image: &Image, default_is_here: bool) -> ImageInfo {
        let stands_in = !default_is_here && image.source == "packages";
        ImageInfo {
            name: image.name.clone(),
            digest: image.digest.clone(),
            size_bytes: image.size_bytes,
            created_at: Utc.timestamp_opt(image.created_at, 0).single().unwrap_or_default(),
            source: image.source.clone(),
            is_default: image.name == self.config.default_image || stands_in,
        }
    }

    /// Images here that an account may run.
    pub async fn images(&self, account: &Account) -> Result<Vec<ImageInfo>, ApiError> {
        let (all, default) = (self.images.list().await, self.images.get(&self.config.default_image).await);
        let may_run = |image: &&Image| account.is_owner() || !image.private || image.name == self.config.default_image;
        Ok(all.iter().filter(may_run).map(|image| self.described(image, default.is_some())).collect())
    }

    /// Fetches an image from its registry.
    pub async fn pull_image(
        &self,
        request: PullRequest,
        account: &Account,
        progress: ProgressSink,
    ) -> Result<ImageInfo, ApiError> {
        self.pulls.admit(account)?;
        tell(&progress, "image", "pulling");
        let pulled = self.images.pull(&request.image, requester(account), self.forward(&progress, "image")).await;
        let image = pulled.map_err(errors::image)?;
        self.prune_images().await;
        Ok(self.image_info(&image).await)
    }

    /// Takes an image from a file on this machine.
    pub async fn import_image(&self, request: ImportRequest, progress: ProgressSink) -> Result<ImageInfo, ApiError> {
        let path = on_this_machine(&request.path)?;
        tell(&progress, "image", "importing");
        let forward = self.forward(&progress, "image");
        let image = self.images.import(&path, request.name.as_deref(), forward).await.map_err(errors::image)?;
        self.prune_images().await;
        Ok(self.image_info(&image).await)
    }

    /// Removes an image that no sandbox runs.
    pub async fn remove_image(&self, name: &str) -> Result<(), ApiError> {
        let _no_other = self.image_use.lock().await;
        let digest = self.images.get(name).await.map(|image| image.digest);
        if let Some(user) = self.living().find(|record| digest.is_some() && record.image_digest == digest) {
            return Err(ApiError::new(ErrorCode::InvalidState, format!("sandbox {} runs image {name}", user.name))
                .hint(format!("heyvm rm {} first", user.name)));
        }
        let orphans = self.images_of_orphans().await?;
        if digest.is_some_and(|digest| orphans.is_none_or(|orphans| orphans.contains(&digest))) {
            return Err(ApiError::new(ErrorCode::InvalidState, format!("an orphan may run image {name}"))
                .hint("Run `heyvm list --all`, then `heyvm recover ID` or `heyvm rm ID`."));
        }
        self.images.remove(name).await.map_err(errors::image)
    }

    /// The image a new sandbox runs. From here on it is not removed.
    pub(crate) async fn claim_image(
        &self,
        sandbox: &Arc<Sandbox>,
        request: &CreateRequest,
        progress: &ProgressSink,
    ) -> Result<Resolved, ApiError> {
        let named = request.image.as_deref();
        let account = sandbox.record().account.clone();
        let wanted = Wanted {
            named: named.map(str::to_owned),
            default_image: self.config.default_image.clone(),
            full: request.sandbox_type.as_deref() == Some("full"),
            requester: requester(&account),
        };
        if let Some(named) = named.filter(|named| *named != wanted.default_image)
            && self.images.get(named).await.is_none()
        {
            self.pulls.admit(&account)?;
        }
        loop {
            let forward = self.forward(progress, "image");
            let mut resolved = self.images.resolve(&wanted, forward).await.map_err(errors::image)?;
            let _no_other = self.image_use.lock().await;
            // It may have been removed just now.
            if self.images.with_digest(&resolved.image.digest).await.is_some() {
                let digest = resolved.image.digest.clone();
                self.images.touch(&digest).await;
                self.save(sandbox, |record| record.image_digest = Some(digest)).await?;
                resolved.substituted = resolved.substituted.filter(|sentence| self.is_news(sentence));
                return Ok(resolved);
            }
        }
    }

    /// Whether a substitution is reported for the first time: `image_requested` says it of each sandbox.
    fn is_news(&self, sentence: &str) -> bool {
        let mut reported = self.substitutions.lock().unwrap_or_else(PoisonError::into_inner);
        reported.insert(sentence.to_owned())
    }

    /// Removes images that neither a name nor a sandbox means any more, and those beyond the budget.
    pub(crate) async fn prune_images(&self) {
        if let Err(error) = self.prune_to(Extent::Budget(self.config.images.budget_bytes)).await {
            tracing::error!(%error, "images that nobody runs could not be removed");
        }
    }

    /// Removes images that no sandbox uses.
    pub async fn prune_unused_images(&self, request: PruneRequest) -> Result<PruneResponse, ApiError> {
        self.prune_to(if request.all { Extent::All } else { Extent::Unused }).await
    }

    async fn prune_to(&self, extent: Extent) -> Result<PruneResponse, ApiError> {
        let mut removed = {
            let _no_other = self.image_use.lock().await;
            // What cannot be read, and what no record names, may need any of them.
            let orphans = match self.images_of_orphans().await? {
                Some(digests) if self.unread.is_empty() => digests,
                _ => return Ok(PruneResponse::default()),
            };
            let used = self.living().filter_map(|record| record.image_digest).chain(orphans).collect();
            let mut kept = vec![self.config.default_image.clone()];
            for variant in [Variant::Base, Variant::Full] {
                kept.extend(self.images.stand_in(variant).await.map(|image| image.name));
            }
            self.images.prune(Prune { used, kept, extent }).await.map_err(errors::image)?
        };
        // Gigabytes may take a while: creates go on meanwhile.
        removed.delete().await.map_err(errors::image)?;
        Ok(PruneResponse { removed: std::mem::take(&mut removed.names), freed_bytes: removed.bytes })
    }

    fn living(&self) -> impl Iterator<Item = Record> {
        let records = self.all().into_iter().map(|sandbox| sandbox.snapshot());
        records.filter(|record| record.status != Status::Removed)
    }

    /// Takes a guest kernel from an unpacked package.
    pub async fn import_kernel(&self, tree: &str) -> Result<String, ApiError> {
        let (images, tree) = (&self.images, on_this_machine(tree)?);
        images.import_kernel(&tree).await.map_err(errors::image)
    }

    /// Makes sure that kernel, default image and the small template are there.
    pub async fn prepare_default(&self, progress: ProgressSink) -> Result<ImageInfo, ApiError> {
        let record = validate::record(&CreateRequest::default(), &Account::owner(), &self.config)?;
        let sandbox = Sandbox::new(record);
        let spec = self.default_spec(&sandbox.snapshot(), &progress).await?;
        self.driver.prepare(&spec, self.forward(&progress, "template")).await.map_err(errors::vm)?;
        Ok(self.image_info(&spec.image).await)
    }

    /// What every sandbox takes over from the host.
    pub fn guest_defaults(&self) -> &GuestDefaults {
        &self.config.guest
    }

    /// Checks of the host.
    pub async fn doctor(&self) -> Result<DoctorReport, ApiError> {
        let kernel = self.images.kernel().await;
        let mut checks: Vec<Check> = self.driver.doctor(kernel.as_ref().ok()).await.into_iter().map(check).collect();
        checks.push(match kernel {
            Ok(kernel) => ok("kernel", format!("guest kernel {}", kernel.version)),
            Err(error) => failed("kernel", errors::image(error)),
        });
        checks.push(match self.images.list().await.as_slice() {
            [] => Check {
                name: "image".into(),
                status: CheckStatus::Warn,
                message: "no image yet: the first sandbox has to wait for one".into(),
                hint: Some("heyvm images prepare fetches or builds the default one".into()),
            },
            all => ok("image", all.iter().map(|image| image.name.as_str()).collect::<Vec<_>>().join(", ")),
        });
        checks.push(self.disk_space());
        checks.push(self.orphan_check().await);
        checks.extend(resolver::check(&self.config.base_domain).await);
        let kvm = checks.iter().any(|check| check.name == "kvm" && check.status == CheckStatus::Ok);
        Ok(DoctorReport {
            ok: checks.iter().all(|check| check.status != CheckStatus::Fail),
            acceleration: if kvm { "kvm" } else { "tcg" }.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            checks,
        })
    }

    fn disk_space(&self) -> Check {
        match nix::sys::statvfs::statvfs(&self.config.home) {
            Ok(space) => {
                let free = space.blocks_available() * space.fragment_size();
                let message = format!("{:.1} GiB free", free as f64 / (1_u64 << 30) as f64);
                let hint = "remove sandboxes (heyvm list --all) or images, or point HEYO_HOME to a larger disk";
                let status = if free < LOW_DISK { CheckStatus::Warn } else { CheckStatus::Ok };
                Check { name: "disk".into(), status, message, hint: (free < LOW_DISK).then(|| hint.into()) }
            }
            Err(error) => failed("disk", errors::io("looking at the disk", &error.into())),
        }
    }
}

/// An account of a server is a tenant of the host.
fn requester(account: &Account) -> Requester {
    if account.is_owner() { Requester::Operator } else { Requester::Tenant }
}

/// A path as a request names it: what directory the daemon is in means nothing to whoever asks.
fn on_this_machine(path: &str) -> Result<PathBuf, ApiError> {
    if path.starts_with('/') && !path.contains('\0') {
        return Ok(path.into());
    }
    Err(ApiError::new(ErrorCode::InvalidArgument, format!("path {path:?} is not an absolute path"))
        .hint("begin it with /: a file or directory on the daemon's machine"))
}

fn ok(name: &str, message: String) -> Check {
    Check { name: name.into(), status: CheckStatus::Ok, message, hint: None }
}

fn failed(name: &str, error: ApiError) -> Check {
    Check { name: name.into(), status: CheckStatus::Fail, message: error.message, hint: error.hint }
}

fn check(check: heyvm_vm::HostCheck) -> Check {
    let status = match check.status {
        heyvm_vm::CheckStatus::Ok => CheckStatus::Ok,
        heyvm_vm::CheckStatus::Warn => CheckStatus::Warn,
        heyvm_vm::CheckStatus::Fail => CheckStatus::Fail,
    };
    Check { name: check.name.into(), status, message: check.message, hint: check.hint }
}
