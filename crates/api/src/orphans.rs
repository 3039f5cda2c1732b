//! Orphans: VMs and disks that no record names, kept until they are recovered or removed.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A VM's directory that no record of the daemon's store names, as after a store was lost or restored from a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OrphanInfo {
    /// The id that it had as a sandbox.
    pub id: String,
    /// The name that it had, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `orphaned`.
    pub status: OrphanStatus,
    /// Whether its VM runs.
    pub running: bool,
    /// What it takes on the host's disk, in bytes.
    pub size_bytes: u64,
    /// When its disk was last written to.
    pub changed_at: DateTime<Utc>,
    /// The image it runs, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// The id of the store that knew it, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store_id: Option<String>,
}

/// The one status of an [`OrphanInfo`], so that lists of sandboxes and orphans can be read alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum OrphanStatus {
    /// No record names it.
    Orphaned,
}

/// Body of `POST /sandboxes/{id}/recover`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RecoverRequest {
    /// Its name from now on; the one it had when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}
