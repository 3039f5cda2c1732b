//! Images on this machine.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One image.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ImageInfo {
    /// Reference it is known by, for example `ubuntu:24.04`.
    pub name: String,
    /// `sha256:…` of its manifest, or of its root for one that was built or imported from a tar.
    pub digest: String,
    /// Bytes of its root file system.
    pub size_bytes: u64,
    /// When it came here.
    pub created_at: DateTime<Utc>,
    /// `registry`, `import` or `packages`.
    pub source: String,
    /// Whether it is what sandboxes run that ask for no image.
    pub is_default: bool,
}

/// Body of `POST /images/pull`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PullRequest {
    /// For example `ubuntu:24.04` or `registry.example/app@sha256:…`.
    pub image: String,
}

/// Body of `POST /images/prune`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PruneRequest {
    /// Also those that no registry can give again: imported ones.
    #[serde(default)]
    pub all: bool,
}

/// Answer of `POST /images/prune`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct PruneResponse {
    /// Names of the images that are gone.
    pub removed: Vec<String>,
    /// Bytes that are free again.
    pub freed_bytes: u64,
}

/// Body of `POST /images/import`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportRequest {
    /// A `docker save` tar, an OCI layout (directory or tar) or a root tar, on the daemon's machine.
    pub path: String,
    /// Reference to know it by; from the archive when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Body of `POST /kernels/import`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct KernelRequest {
    /// An unpacked kernel package on the daemon's machine, or `/`: holds `boot/vmlinuz-…` and `lib/modules/…`.
    pub path: String,
}

/// Answer of `POST /kernels/import`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct KernelInfo {
    /// For example `6.1.0-35-cloud-amd64`.
    pub version: String,
}
