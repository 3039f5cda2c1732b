//! Images and guest kernels on this machine: from registries, archives and packages to one read-only EROFS root file
//! per image, and from a distribution's kernel package to a kernel and an initramfs with the agent in it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A guest kernel with the initramfs that starts the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    /// For example `6.1.0-35-cloud-amd64`.
    pub version: String,
    /// Compressed kernel image.
    pub vmlinuz: PathBuf,
    /// Gzipped cpio archive: agent and modules.
    pub initramfs: PathBuf,
    /// Hex SHA-256 over both files: templates are made anew when it changes.
    pub digest: String,
}

/// An image that is ready to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Reference it is known by, for example `ubuntu:24.04`.
    pub name: String,
    /// `sha256:…` of the manifest, or of the root for one built or imported from a tar.
    pub digest: String,
    /// EROFS file, read-only, shared by all sandboxes of the image.
    pub rootfs: PathBuf,
    /// Bytes of `rootfs`.
    pub size_bytes: u64,
    /// What the image says about running it.
    pub config: ImageConfig,
    /// When it came here, in seconds since 1970.
    pub created_at: i64,
    /// `registry`, `import` or `packages`.
    pub source: String,
}

/// What an image says about running it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// Environment, `NAME=value`.
    pub env: Vec<(String, String)>,
    /// Working directory, if any.
    pub working_dir: Option<String>,
}

/// Tells what a long step is doing: words, and bytes done and in all where known.
pub type Progress = std::sync::Arc<dyn Fn(&str, Option<u64>, Option<u64>) + Send + Sync>;

/// Everything under `images/` and `kernels/` of heyvm's home.
pub struct ImageStore {}

/// What was asked for and what is run.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The image that is run.
    pub image: Image,
    /// Set where another image stands in for the one asked for: a sentence that says so.
    pub substituted: Option<String>,
}
