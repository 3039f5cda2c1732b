//! A store in a directory of its own, and what its EROFS files hold.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use heyvm_images::{Extent, Image, ImageStore, Progress, Prune, RegistryConfig, Requester, Wanted};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::server::Server;

pub struct Place {
    home: TempDir,
    pub store: ImageStore,
}

impl Place {
    /// A store that knows of these registries: the table `registries` of config.toml.
    pub fn new(registries: Value) -> Self {
        // No credentials but the test's own.
        let config: RegistryConfig = serde_json::from_value(registries).unwrap();
        let home = tempfile::tempdir().unwrap();
        let store = ImageStore::open(home.path(), config).unwrap();
        Self { home, store }
    }

    /// A store that may use this registry.
    pub fn using(server: &Server) -> Self {
        Self::new(json!({ &server.host: {"insecure": true} }))
    }

    /// Everything in the store's directory but the lock and the index: an image is one name.
    pub fn kept(&self) -> Vec<String> {
        let entries = fs::read_dir(self.home.path().join("images")).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| !name.ends_with("lock") && name != "index.json");
        names.sort();
        names
    }

    pub fn home(&self) -> &Path {
        self.home.path()
    }
}

pub const OPERATOR: Requester = Requester::Operator;

/// The operator's wish for an image that the request names.
pub fn wanted(named: &str, default_image: &str) -> Wanted {
    Wanted { named: Some(named.to_owned()), default_image: default_image.to_owned(), full: false, requester: OPERATOR }
}

/// Removes what goes at this extent while these digests are used.
pub async fn prune(store: &ImageStore, used: &[&str], extent: Extent) -> Vec<String> {
    let used = used.iter().map(|digest| (*digest).to_owned()).collect();
    let mut removed = store.prune(Prune { used, kept: Vec::new(), extent }).await.unwrap();
    removed.delete().await.unwrap();
    removed.names
}

/// Tells nobody.
pub fn silent() -> Progress {
    Arc::new(|_, _, _| {})
}

/// What the image's EROFS holds, unpacked by the file system's own program.
pub struct Root(TempDir);

impl Root {
    pub fn of(image: &Image) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        let output = Command::new("fsck.erofs")
            .arg(format!("--extract={}", root.display()))
            .arg(&image.rootfs)
            .output()
            .unwrap();
        assert!(output.status.success(), "fsck.erofs: {}", String::from_utf8_lossy(&output.stderr));
        Self(dir)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join("root").join(name)
    }

    pub fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    pub fn has(&self, name: &str) -> bool {
        fs::symlink_metadata(self.path(name)).is_ok()
    }
}

/// A file's permissions in the EROFS itself: fsck.erofs drops set-user-id when it changes the owner, dump.erofs shows none.
/// Format: Linux, fs/erofs/erofs_fs.h.
pub fn mode(image: &Image, name: &str) -> u32 {
    let output = Command::new("dump.erofs").arg(format!("--path=/{name}")).arg(&image.rootfs).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let nid = text.split("NID: ").nth(1).unwrap().split_whitespace().next().unwrap();
    let bytes = fs::read(&image.rootfs).unwrap();
    let blocks = u32::from_le_bytes(bytes[1024 + 40..][..4].try_into().unwrap());
    let inode = (blocks as usize) * 4096 + nid.parse::<usize>().unwrap() * 32;
    u32::from(u16::from_le_bytes(bytes[inode + 4..][..2].try_into().unwrap())) & 0o7777
}
