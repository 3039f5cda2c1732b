//! Archives of a cloud's accounts: tar.gz files to deploy from.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Answer of `POST /sandbox-archives/presign`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct PresignedUpload {
    /// The new archive.
    pub archive_id: String,
    /// Where to PUT the tar.gz; the URL itself is the credential.
    pub upload_url: String,
    /// Seconds for which the URL is good.
    pub expires_in: u64,
}

/// Body of `POST /sandbox-archives/{id}/finalize`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FinalizeArchiveRequest {
    /// What the archive was made from; its name, where there is no other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox_id: Option<String>,
    /// What to call it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// An archive that can be deployed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AccountArchive {
    /// `ar-` and 32 hex digits.
    pub id: String,
    /// What its owner calls it.
    pub name: Option<String>,
    /// Bytes, compressed.
    pub size_bytes: u64,
    /// When it was asked for.
    pub created_at: DateTime<Utc>,
    /// Names of the sandboxes that were made from it and are not removed; only where all archives are listed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub used_by: Vec<String>,
}
