//! Images and guest kernels on this machine: from registries, archives and packages to one read-only EROFS root file
//! per image, and from a distribution's kernel package to a kernel and an initramfs with the agent in it.
//!
//! - [`store`]: what is here, by name and digest.  [`prune`]: what goes.  [`packages`]: the default image, built from the host's distribution.
//! - [`registry`], [`import`]: images from registries and files.  [`credentials`]: mirrors, and who we are to them.
//!   [`reach`]: addresses that a pull may connect to.
//! - [`archive`]: tars of unknown origin.  [`layers`]: one over the other.  [`work`]: directories for what is half-made.
//! - [`erofs`]: a directory as an EROFS file.  [`kernel`], [`modules`], [`cpio`]: guest kernels and their
//!   initramfs.
#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test may block its own thread"))]

mod archive;
mod cpio;
mod credentials;
mod erofs;
mod import;
mod kernel;
mod layers;
mod modules;
mod packages;
mod prune;
mod reach;
mod registry;
mod store;
mod work;

use std::{
    collections::HashMap,
    io,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Instant,
};

use serde::{Deserialize, Serialize};

pub use credentials::{ALLOWED as DEFAULT_ALLOWED_REGISTRIES, Registry, RegistryConfig};
pub use packages::Variant;
pub use prune::{Extent, Prune, Removed};
pub use reach::Requester;

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
    /// `sha256:…` of `rootfs` itself: the same manifest can give other bytes on another day. Unknown for those that an
    /// earlier version has kept.
    #[serde(default)]
    pub root_digest: Option<String>,
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
    /// Whether the operator's credentials were used to get it: then no account of a server runs it.
    #[serde(default)]
    pub private: bool,
    /// What a built image was built from: another version may build another.
    #[serde(default)]
    pub recipe: Option<String>,
}

/// What an image says about running it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// Environment, `NAME=value`.
    pub env: Vec<(String, String)>,
    /// Working directory, if any.
    pub working_dir: Option<String>,
    /// Program and arguments that an image is made for.
    #[serde(default)]
    pub entrypoint: Vec<String>,
    /// Arguments of the entry point, or a command where there is none.
    #[serde(default)]
    pub cmd: Vec<String>,
    /// Whose its commands are, if not root's: `name` or `uid`, and a group behind a colon.
    #[serde(default)]
    pub user: Option<String>,
    /// TCP ports that it says it listens on, in order.
    #[serde(default)]
    pub exposed_ports: Vec<u16>,
    /// Signal that ends its command in order, if not SIGTERM: a name or a number.
    #[serde(default)]
    pub stop_signal: Option<String>,
}

impl ImageConfig {
    /// What the image runs by itself: entry point and arguments.
    pub fn command(&self) -> Vec<String> {
        self.entrypoint.iter().chain(&self.cmd).cloned().collect()
    }
}

/// Tells what a long step is doing: words, and bytes done and in all where known.
pub type Progress = std::sync::Arc<dyn Fn(&str, Option<u64>, Option<u64>) + Send + Sync>;

/// Everything under `images/` and `kernels/` of heyvm's home. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ImageStore {
    images: PathBuf,
    kernels: PathBuf,
    registries: RegistryConfig,
    /// Default images whose registry did not answer, and when.
    silent: Arc<Mutex<HashMap<String, Instant>>>,
}

/// What can go wrong with an image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nobody has an image of this name.
    #[error("no image {0}")]
    NotFound(String),
    /// The bytes are no image, or not the one they should be.
    #[error("{0}")]
    Invalid(String),
    /// The server's accounts may not pull from this registry.
    #[error("images from {0} are not allowed on this server")]
    RegistryNotAllowed(String),
    /// A registry does not answer, or does not let us.
    #[error("no registry gave {name}: {why}")]
    Registry {
        /// The image.
        name: String,
        /// The registry's or the network's words.
        why: String,
    },
    /// A program or a permission is missing.
    #[error("{what}")]
    HostNotReady {
        /// What is missing.
        what: String,
        /// What to do about it.
        hint: String,
    },
    /// No space or other resource.
    #[error("the host is out of {0}")]
    OutOfResources(&'static str),
    /// A file operation failed.
    #[error("{doing} ({path})", path = path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::OutOfResources("disk space"),
            _ => Self::Io { doing, path, source },
        }
    }

    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Self::Invalid(text.into())
    }
}

/// The image that a sandbox is to run.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The one that the request names, if it names one.
    pub named: Option<String>,
    /// The one for requests that name none.
    pub default_image: String,
    /// Whether one with compilers is wanted where the request names none.
    pub full: bool,
    /// Whose request it is.
    pub requester: Requester,
}

impl Wanted {
    /// The note is for those who have named an image.
    fn substituted(&self, image: Image) -> Resolved {
        let sentence =
            |named: &String| format!("could not pull {named} (no registry reachable); using {} instead", image.name);
        Resolved { substituted: self.named.as_ref().map(sentence), stands_in: true, image }
    }
}

/// What was asked for and what is run.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The image that is run.
    pub image: Image,
    /// Whether it is not the one that `Wanted` means.
    pub stands_in: bool,
    /// Set where it stands in for one that was named: a sentence that says so.
    pub substituted: Option<String>,
}
