//! The files of the store: its index, and a directory per image. Synchronous: an image is large, and locks are waited for.
#![expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

use crate::{
    Error, Image, ImageStore, Progress, Prune, RegistryConfig, Removed, erofs,
    import::Parts,
    layers::{self, Budget},
    registry,
    work::Work,
};

/// What is known of an image, in its directory.
const TOLD: &str = "image.json";
/// Held by whoever changes the index, and what it names.
const CHANGES: &str = "lock";
/// Its time says when the image was last used.
const USED: &str = "used";

impl ImageStore {
    /// The store below heyvm's home.
    pub fn open(home: &Path, registries: RegistryConfig) -> Result<Self, Error> {
        let store =
            Self { images: home.join("images"), kernels: home.join("kernels"), registries, silent: Arc::default() };
        for dir in [&store.images, &store.kernels] {
            fs::create_dir_all(dir).map_err(Error::io("making", dir))?;
        }
        Ok(store)
    }

    /// Every image, by name.
    pub(super) fn list_now(&self) -> Vec<Image> {
        self.index().into_iter().filter_map(|(name, digest)| self.read(&name, &digest)).collect()
    }

    /// The image known by this name, written as Docker lets one write it, or digest.
    pub(super) fn get_now(&self, reference: &str) -> Option<Image> {
        self.exactly(reference).or_else(|| {
            let meant = Some(registry::canonical(reference)?);
            let index = self.index();
            let (name, digest) = index.iter().find(|(name, _)| registry::canonical(name) == meant)?;
            self.read(name, digest)
        })
    }

    fn exactly(&self, reference: &str) -> Option<Image> {
        let index = self.index();
        let (name, digest) = index.iter().find(|(name, digest)| *name == reference || *digest == reference)?;
        self.read(name, digest)
    }

    /// The image of this digest, also when no name means it any more.
    pub(super) fn with_digest_now(&self, digest: &str) -> Option<Image> {
        let image = self.read("", digest)?;
        let index = self.index();
        let name = index.iter().find(|(_, named)| *named == digest).map(|(name, _)| name.clone());
        Some(Image { name: name.unwrap_or_else(|| digest.to_owned()), ..image })
    }

    pub(super) fn prune_now(&self, rule: &Prune) -> Result<Removed, Error> {
        let _lock = self.lock(CHANGES)?;
        let mut index = self.index();
        let mut images: Vec<Image> = Vec::new();
        for entry in fs::read_dir(&self.images).map_err(Error::io("reading", &self.images))?.flatten() {
            let described = fs::read(entry.path().join(TOLD)).ok();
            let image: Option<Image> = described.and_then(|bytes| serde_json::from_slice(&bytes).ok());
            images.extend(image.filter(|image| entry.file_name() == *dir_name(&image.digest)));
        }
        images.sort_by_key(|image| self.last_used(&image.digest));
        let mut held: u64 = images.iter().map(|image| image.size_bytes).sum();
        let mut removed = Removed::default();
        for image in images {
            let names: Vec<String> =
                index.iter().filter(|(_, digest)| **digest == image.digest).map(|(name, _)| name.clone()).collect();
            if !rule.gives_up(&image, &names, held) {
                continue;
            }
            index.retain(|_, digest| *digest != image.digest);
            self.write_index(&index)?;
            let work = match &removed.work {
                Some(work) => work,
                None => removed.work.insert(Work::new_in(&self.images)?),
            };
            let dir = self.images.join(dir_name(&image.digest));
            fs::rename(&dir, work.path().join(dir_name(&image.digest))).map_err(Error::io("removing", &dir))?;
            held = held.saturating_sub(image.size_bytes);
            removed.bytes += image.size_bytes;
            removed.names.extend(if names.is_empty() { vec![image.digest] } else { names });
        }
        Ok(removed)
    }

    /// Notes that an image is used now.
    pub(super) fn touch_now(&self, digest: &str) -> Result<(), Error> {
        let path = self.used(digest);
        File::create(&path).map(drop).map_err(Error::io("writing", path))
    }

    fn used(&self, digest: &str) -> PathBuf {
        self.images.join(dir_name(digest)).join(USED)
    }

    fn last_used(&self, digest: &str) -> Option<SystemTime> {
        let described = || fs::metadata(self.images.join(dir_name(digest)).join(TOLD));
        fs::metadata(self.used(digest)).or_else(|_| described()).and_then(|meta| meta.modified()).ok()
    }

    pub(super) fn remove_now(&self, reference: &str) -> Result<(), Error> {
        let _lock = self.lock(CHANGES)?;
        let image = self.exactly(reference).ok_or_else(|| Error::NotFound(reference.into()))?;
        let mut index = self.index();
        index.retain(|name, _| *name != image.name);
        self.write_index(&index)?;
        if !index.values().any(|digest| *digest == image.digest) {
            let dir = self.images.join(dir_name(&image.digest));
            remove_dir(&dir)?;
        }
        Ok(())
    }

    /// Layers over layers, then one file.
    pub(super) fn assemble_now(
        &self,
        parts: Parts,
        name: String,
        source: &str,
        work: &Path,
        progress: &Progress,
    ) -> Result<Image, Error> {
        let (root, half) = (work.join("root"), work.join("image"));
        for dir in [&root, &half] {
            fs::create_dir(dir).map_err(Error::io("making", dir))?;
        }
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).map_err(Error::io("opening", &root))?;
        let mut budget = Budget::default();
        for (number, layer) in parts.layers.iter().enumerate() {
            progress(&format!("unpacking layer {}", number + 1), None, None);
            layers::apply(layer, &root, &mut budget)?;
        }
        progress("compressing", None, None);
        self.keep(&root, &half, name, source, parts)
    }

    /// Makes an image of `root` in the directory `half`, and puts it in its place.
    fn keep(&self, root: &Path, half: &Path, name: String, source: &str, parts: Parts) -> Result<Image, Error> {
        let rootfs = half.join("root.erofs");
        erofs::write(root, &rootfs)?;
        let (size_bytes, root_digest) = measured(&rootfs)?;
        let digest = parts.digest.unwrap_or_else(|| root_digest.clone());
        // What takes long is done.
        let _lock = self.lock(CHANGES)?;
        let created_at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
        let target = self.images.join(dir_name(&digest));
        let mut index = self.index();
        index.insert(name.clone(), digest.clone());
        // Sandboxes and templates may use the file that is there already: it stays, if it is whole.
        if let Some(known) = self.read(&name, &digest)
            && known.rootfs.metadata().is_ok_and(|meta| meta.len() == known.size_bytes)
        {
            // Whoever got it without credentials may have it.
            let known =
                Image { private: known.private && parts.private, config: parts.config, recipe: parts.recipe, ..known };
            write_description(&known, &target)?;
            self.write_index(&index)?;
            return Ok(known);
        }
        let image = Image {
            name,
            digest,
            root_digest: Some(root_digest),
            rootfs: target.join("root.erofs"),
            size_bytes,
            config: parts.config,
            created_at,
            source: source.into(),
            private: parts.private,
            recipe: parts.recipe,
        };
        write_description(&image, half)?;
        if target.exists() {
            remove_dir(&target)?;
        }
        fs::rename(half, &target).map_err(Error::io("keeping the image", &target))?;
        self.write_index(&index)?;
        Ok(image)
    }

    fn read(&self, name: &str, digest: &str) -> Option<Image> {
        let dir = self.images.join(dir_name(digest));
        let mut image: Image = serde_json::from_slice(&fs::read(dir.join(TOLD)).ok()?).ok()?;
        image.name = name.to_owned();
        image.rootfs = dir.join("root.erofs");
        image.rootfs.exists().then_some(image)
    }

    fn index(&self) -> BTreeMap<String, String> {
        let bytes = fs::read(self.images.join("index.json")).unwrap_or_default();
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    fn write_index(&self, index: &BTreeMap<String, String>) -> Result<(), Error> {
        let path = self.images.join("index.json");
        let write = || -> io::Result<()> {
            // One name for all: who writes holds the lock, and a killed process leaves nothing that stays.
            let half = self.images.join("index.half");
            let mut file = File::create(&half)?;
            file.write_all(&serde_json::to_vec(index)?)?;
            file.sync_all()?;
            fs::rename(half, &path)
        };
        write().map_err(Error::io("writing", &path))
    }

    /// One process at a time holds the lock of this name.
    pub(super) fn lock(&self, name: &str) -> Result<Flock<File>, Error> {
        let path = self.images.join(name);
        let file = File::create(&path).map_err(Error::io("making", &path))?;
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| Error::io("locking", path)(errno.into()))
    }
}

/// Writes what is known of an image to its directory, all or nothing.
fn write_description(image: &Image, dir: &Path) -> Result<(), Error> {
    let write = || -> io::Result<()> {
        let file = tempfile::NamedTempFile::new_in(dir)?;
        serde_json::to_writer(file.as_file(), image)?;
        file.as_file().sync_all()?;
        file.persist(dir.join(TOLD))?;
        Ok(())
    };
    write().map_err(Error::io("writing the description of the image in", dir))
}

/// Bytes and digest of a file.
fn measured(path: &Path) -> Result<(u64, String), Error> {
    let mut hash = Sha256::new();
    let mut file = File::open(path).map_err(Error::io("reading", path))?;
    let size = io::copy(&mut file, &mut hash).map_err(Error::io("reading", path))?;
    Ok((size, format!("sha256:{}", hex::encode(hash.finalize()))))
}

fn dir_name(digest: &str) -> String {
    digest.replace(':', "-")
}

fn remove_dir(dir: &Path) -> Result<(), Error> {
    heyvm_trees::remove(dir).map_err(|error| Error::io("removing", dir)(error.into()))
}
