//! Images as an OCI layout, written entry by entry, so that a test can say what no tool would write.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};
use tempfile::TempDir;

/// One entry of a layer.
pub struct Item {
    header: Header,
    data: Vec<u8>,
}

fn item(name: &str, kind: EntryType, mode: u32, link: &str, data: &[u8]) -> Item {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    // By hand: the crate's own functions refuse names that leave the root.
    let gnu = header.as_gnu_mut().unwrap();
    gnu.name[..name.len()].copy_from_slice(name.as_bytes());
    gnu.linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_600_000_000);
    header.set_size(data.len() as u64);
    Item { header, data: data.to_owned() }
}

pub fn file(name: &str, content: impl AsRef<[u8]>) -> Item {
    item(name, EntryType::Regular, 0o644, "", content.as_ref())
}

pub fn dir(name: &str) -> Item {
    item(name, EntryType::Directory, 0o755, "", &[])
}

pub fn symlink(name: &str, target: &str) -> Item {
    item(name, EntryType::Symlink, 0o777, target, &[])
}

pub fn hard_link(name: &str, existing: &str) -> Item {
    item(name, EntryType::Link, 0o644, existing, &[])
}

pub fn device(name: &str, major: u32, minor: u32) -> Item {
    let mut item = item(name, EntryType::Char, 0o666, "", &[]);
    item.header.set_device_major(major).unwrap();
    item.header.set_device_minor(minor).unwrap();
    item
}

impl Item {
    pub fn owned_by(mut self, user: u64, group: u64) -> Self {
        self.header.set_uid(user);
        self.header.set_gid(group);
        self
    }

    pub fn mode(mut self, mode: u32) -> Self {
        self.header.set_mode(mode);
        self
    }

    /// Another size than that of the data which follows.
    pub fn declaring(mut self, size: u64) -> Self {
        self.header.set_size(size);
        self
    }

    pub fn kind(mut self, kind: EntryType) -> Self {
        self.header.set_entry_type(kind);
        self
    }
}

/// The entries as a plain tar.
pub fn tar(items: Vec<Item>) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for mut item in items {
        item.header.set_cksum();
        builder.append(&item.header, item.data.as_slice()).unwrap();
    }
    builder.into_inner().unwrap()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A layer: its entries as gzip has them, as most registries do.
pub fn layer(items: Vec<Item>) -> Blob {
    let plain = tar(items);
    Blob { bytes: gzip(&plain), media: "application/vnd.oci.image.layer.v1.tar+gzip", plain: digest(&plain) }
}

pub fn zstd_layer(items: Vec<Item>) -> Blob {
    let plain = tar(items);
    let bytes = zstd::encode_all(plain.as_slice(), 3).unwrap();
    Blob { bytes, media: "application/vnd.oci.image.layer.v1.tar+zstd", plain: digest(&plain) }
}

/// A layer of an image.
pub struct Blob {
    bytes: Vec<u8>,
    media: &'static str,
    plain: String,
}

impl Blob {
    pub fn digest(&self) -> String {
        digest(&self.bytes)
    }
}

pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// A directory with one image, or one for each of several architectures.
pub struct Layout {
    dir: TempDir,
    /// Digest that the index names.
    pub digest: String,
}

impl Layout {
    /// An image for amd64.
    pub fn new(layers: &[Blob], run: Value) -> Self {
        let layout = Self::empty();
        let manifest = layout.manifest(layers, &run, "amd64");
        layout.finished(manifest)
    }

    /// Images behind one index, in the order given.
    pub fn multi(platforms: &[(&str, &[Blob])]) -> Self {
        let layout = Self::empty();
        let manifests: Vec<Value> =
            platforms.iter().map(|(architecture, layers)| layout.manifest(layers, &json!({}), architecture)).collect();
        let media = "application/vnd.oci.image.index.v1+json";
        let index = json!({"schemaVersion": 2, "mediaType": media, "manifests": manifests});
        let index = layout.blob(index.to_string().as_bytes(), media);
        layout.finished(index)
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn blob_path(&self, digest: &str) -> PathBuf {
        self.path().join("blobs").join(digest.replace(':', "/"))
    }

    fn empty() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion": "1.0.0"}"#).unwrap();
        Self { dir, digest: String::new() }
    }

    fn blob(&self, bytes: &[u8], media: &str) -> Value {
        let digest = digest(bytes);
        fs::write(self.blob_path(&digest), bytes).unwrap();
        json!({"mediaType": media, "digest": digest, "size": bytes.len()})
    }

    fn manifest(&self, layers: &[Blob], run: &Value, architecture: &str) -> Value {
        let plain: Vec<&String> = layers.iter().map(|layer| &layer.plain).collect();
        let config = json!({
            "architecture": architecture, "os": "linux", "config": run,
            "rootfs": {"type": "layers", "diff_ids": plain},
        });
        let config = self.blob(config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json");
        let layers: Vec<Value> = layers.iter().map(|layer| self.blob(&layer.bytes, layer.media)).collect();
        let media = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({"schemaVersion": 2, "mediaType": media, "config": config, "layers": layers});
        let mut descriptor = self.blob(manifest.to_string().as_bytes(), media);
        descriptor["platform"] = json!({"os": "linux", "architecture": architecture});
        descriptor
    }

    fn finished(mut self, descriptor: Value) -> Self {
        let index = json!({"schemaVersion": 2, "manifests": [descriptor]});
        fs::write(self.path().join("index.json"), index.to_string()).unwrap();
        self.digest = descriptor["digest"].as_str().unwrap().to_owned();
        self
    }
}
