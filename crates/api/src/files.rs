//! Files in a sandbox.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// Body of `POST /sandboxes/{id}/files/upload`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UploadRequest {
    /// Directory the path is below; `/workspace` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mount_path: Option<String>,
    /// Path below `mount_path`; may not leave it.
    pub file_path: String,
    /// Base64.
    pub content: String,
}

/// Answer to an upload.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct UploadResponse {
    /// `created`.
    pub status: String,
    /// Absolute path in the sandbox.
    pub path: String,
    /// Bytes written.
    pub size: u64,
}

/// Query of download, list and delete.
#[derive(Debug, Clone, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct FileQuery {
    /// Directory the path is below; `/workspace` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mount_path: Option<String>,
    /// Path below `mount_path`; `.` when absent (list only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file_path: Option<String>,
}

/// Answer of `GET /sandboxes/{id}/files/download`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct DownloadResponse {
    /// Absolute path in the sandbox.
    pub path: String,
    /// Base64.
    pub content: String,
    /// Bytes.
    pub size: u64,
}

/// One entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FileEntry {
    /// Last component of its path.
    pub name: String,
    /// `file`, `directory`, `symlink` or `other`.
    pub kind: String,
    /// Bytes.
    pub size: u64,
    /// Permission bits, for example 0o644 as 420.
    pub mode: u32,
    /// Seconds since 1970.
    pub modified: i64,
    /// Where a symlink leads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

/// Answer of `GET /sandboxes/{id}/files`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ListFilesResponse {
    /// Absolute path in the sandbox.
    pub path: String,
    /// Sorted by name.
    pub entries: Vec<FileEntry>,
    /// Whether there were more than 10 000.
    pub truncated: bool,
}

/// Answer of `PUT /sandboxes/{id}/files/tar`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UnpackResponse {
    /// Bytes written.
    pub bytes: u64,
    /// Files, directories and links.
    pub entries: u64,
}
