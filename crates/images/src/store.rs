//! What is here: `images/index.json` (name → digest) and `images/<digest>/{root.erofs,image.json}`; `kernels/<version>/`.
//! An image whose name has moved on to another stays until [`ImageStore::prune`]: whoever calls it knows who runs what.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

use crate::{
    Error, Image, ImageStore, Kernel, Progress, Prune, RegistryConfig, Removed, Requester, Resolved, Variant, Wanted,
    erofs,
    import::{self, Parts},
    kernel,
    layers::{self, Budget},
    packages, registry,
    work::Work,
};

/// What is known of an image, in its directory.
const TOLD: &str = "image.json";
/// Held by whoever changes the index, and what it names.
const CHANGES: &str = "lock";
/// Its time says when the image was last used.
const USED: &str = "used";
/// A registry that did not answer for the default image is not asked for it again this long.
const SILENCE: Duration = Duration::from_secs(300);

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
    pub fn list(&self) -> Vec<Image> {
        self.index().into_iter().filter_map(|(name, digest)| self.read(&name, &digest)).collect()
    }

    /// The image known by this name, written as Docker lets one write it, or digest.
    pub fn get(&self, reference: &str) -> Option<Image> {
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
    pub fn with_digest(&self, digest: &str) -> Option<Image> {
        let image = self.read("", digest)?;
        let index = self.index();
        let name = index.iter().find(|(_, named)| *named == digest).map(|(name, _)| name.clone());
        Some(Image { name: name.unwrap_or_else(|| digest.to_owned()), ..image })
    }

    /// Forgets a name, written as it is listed, and removes the image when it has no other.
    pub async fn remove(&self, reference: &str) -> Result<(), Error> {
        let (store, reference) = (self.clone(), reference.to_owned());
        blocking(move || store.remove_now(&reference)).await
    }

    /// Removes the images that `rule` gives up. Once this returns none of them can be found any more; their bytes go when
    /// [`Removed`] is told to, which may take long.
    pub async fn prune(&self, rule: Prune) -> Result<Removed, Error> {
        let store = self.clone();
        blocking(move || store.prune_now(&rule)).await
    }

    fn prune_now(&self, rule: &Prune) -> Result<Removed, Error> {
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
    pub async fn touch(&self, digest: &str) {
        let path = self.used(digest);
        let touched = blocking(move || File::create(&path).map(drop).map_err(Error::io("writing", path))).await;
        if let Err(error) = touched {
            tracing::debug!(%error, "the image may be evicted earlier than it should");
        }
    }

    fn used(&self, digest: &str) -> PathBuf {
        self.images.join(dir_name(digest)).join(USED)
    }

    fn last_used(&self, digest: &str) -> Option<SystemTime> {
        let described = || fs::metadata(self.images.join(dir_name(digest)).join(TOLD));
        fs::metadata(self.used(digest)).or_else(|_| described()).and_then(|meta| meta.modified()).ok()
    }

    fn remove_now(&self, reference: &str) -> Result<(), Error> {
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

    /// The image to run: one that is here, else from its registry, else what stands in for the default one.
    pub async fn resolve(&self, wanted: &Wanted, progress: Progress) -> Result<Resolved, Error> {
        if wanted.full && wanted.named.is_none() {
            return Ok(wanted.substituted(self.build_default(Variant::Full, progress).await?));
        }
        let reference = wanted.named.as_ref().unwrap_or(&wanted.default_image);
        let is_default = *reference == wanted.default_image;
        let may_run = |image: &Image| is_default || !image.private || wanted.requester == Requester::Operator;
        if let Some(image) = self.get(reference).filter(may_run) {
            return Ok(Resolved { image, stands_in: false, substituted: None });
        }
        let stand_in = is_default.then(|| self.stand_in(Variant::Base)).flatten();
        // A registry that is silent would hold up each create. One that was not named need not be asked at all.
        if let Some(image) = stand_in
            && (wanted.named.is_none() || self.is_silent(reference))
        {
            return Ok(wanted.substituted(image));
        }
        // What accounts run by default is the operator's choice.
        let requester = if is_default { Requester::Operator } else { wanted.requester };
        match self.pull(reference, requester, Arc::clone(&progress)).await {
            Ok(image) => return Ok(Resolved { image, stands_in: false, substituted: None }),
            Err(Error::Registry { .. }) if is_default => self.note_silence(reference),
            Err(error) => return Err(error),
        }
        let image = match self.stand_in(Variant::Base) {
            Some(image) => image,
            None => self.build_default(Variant::Base, progress).await?,
        };
        Ok(wanted.substituted(image))
    }

    /// An image that was built here: in place of the default one, or the one with compilers.
    pub fn stand_in(&self, variant: Variant) -> Option<Image> {
        self.get(&packages::Distribution::of_host().ok()?.image_name(variant))
    }

    fn is_silent(&self, reference: &str) -> bool {
        let silent = self.silent.lock().unwrap_or_else(PoisonError::into_inner);
        silent.get(reference).is_some_and(|since| since.elapsed() < SILENCE)
    }

    fn note_silence(&self, reference: &str) {
        let mut silent = self.silent.lock().unwrap_or_else(PoisonError::into_inner);
        silent.insert(reference.to_owned(), Instant::now());
    }

    /// Fetches an image from its registry; one that is here already is fetched again.
    pub async fn pull(&self, reference: &str, requester: Requester, progress: Progress) -> Result<Image, Error> {
        let work = self.work().await?;
        let parts = match registry::fetch(reference, &self.registries, requester, work.path(), &progress).await {
            Ok(parts) => parts,
            Err(error) => {
                // It may be large.
                blocking(move || {
                    drop(work);
                    Ok(())
                })
                .await?;
                return Err(error);
            }
        };
        self.assemble(parts, reference.to_owned(), "registry", work, progress).await
    }

    /// Takes an image from a `docker save` tar, an OCI layout or a root tar.
    pub async fn import(&self, path: &Path, name: Option<&str>, progress: Progress) -> Result<Image, Error> {
        let work = self.work().await?;
        let (from, told) = (path.to_owned(), Arc::clone(&progress));
        // The directory goes with what writes into it: a caller who no longer waits must not remove it meanwhile.
        let (work, parts) =
            blocking(move || import::open(&from, work.path(), &told).map(|parts| (work, parts))).await?;
        let name = match name {
            Some(name) => registry::checked(name).map(|_| name.to_owned())?,
            None => import_name(path, &parts).ok_or_else(|| Error::invalid("the image needs a name"))?,
        };
        self.assemble(parts, name, "import", work, progress).await
    }

    async fn work(&self) -> Result<Work, Error> {
        let images = self.images.clone();
        blocking(move || Work::new_in(&images)).await
    }

    /// Layers over layers, then one file.
    async fn assemble(
        &self,
        parts: Parts,
        name: String,
        source: &'static str,
        work: Work,
        progress: Progress,
    ) -> Result<Image, Error> {
        let store = self.clone();
        blocking(move || {
            let (root, half) = (work.path().join("root"), work.path().join("image"));
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
            store.keep(&root, &half, name, source, parts)
        })
        .await
    }

    /// Builds an image from the host's distribution, or gives the one that is here if it holds what this version puts in.
    /// Runs detached: the lock must not depend on how fast a client reads its progress.
    pub async fn build_default(&self, variant: Variant, progress: Progress) -> Result<Image, Error> {
        let store = self.clone();
        let built = tokio::spawn(async move { store.build_default_now(variant, progress).await }).await;
        built.map_err(|error| Error::io("running a task", "")(io::Error::other(error)))?
    }

    async fn build_default_now(&self, variant: Variant, progress: Progress) -> Result<Image, Error> {
        let distribution = packages::Distribution::of_host()?;
        let name = distribution.image_name(variant);
        // Two would do the same work twice; others may pull meanwhile.
        let store = self.clone();
        let _building = blocking(move || store.lock("build.lock")).await?;
        let recipe = packages::recipe(variant);
        if let Some(image) = self.get(&name).filter(|image| image.recipe.as_deref() == Some(&recipe)) {
            return Ok(image);
        }
        let work = self.work().await?;
        progress(&format!("building {name} from packages"), None, None);
        let told = Arc::clone(&progress);
        let (work, tar) = blocking(move || {
            let tar = work.path().join("root.tar");
            packages::build(&distribution, variant, &tar, &told).map(|()| (work, tar))
        })
        .await?;
        let parts = Parts { recipe: Some(recipe), ..Parts::root(tar) };
        self.assemble(parts, name, "packages", work, progress).await
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

    /// The newest guest kernel with the agent that belongs to this program.
    pub async fn kernel(&self) -> Result<Kernel, Error> {
        let kernels = self.kernels.clone();
        blocking(move || kernel::newest_with_agent(&kernels)).await
    }

    /// Takes a kernel from an unpacked package, or from `/`; answers its version.
    pub fn import_kernel(&self, tree: &Path) -> Result<String, Error> {
        kernel::import(tree, &self.kernels)
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
    fn lock(&self, name: &str) -> Result<Flock<File>, Error> {
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

/// What the archive calls its image, else what it is called itself; what is no name is none.
fn import_name(path: &Path, parts: &Parts) -> Option<String> {
    let own = parts.name.clone().filter(|name| registry::checked(name).is_ok());
    own.or_else(|| {
        let stem = path.file_name()?.to_str()?.split('.').next()?;
        let tagged = parts.tag.as_ref().map(|tag| format!("{stem}:{tag}"));
        tagged.into_iter().chain([stem.to_owned()]).find(|name| registry::checked(name).is_ok())
    })
}

fn dir_name(digest: &str) -> String {
    digest.replace(':', "-")
}

fn remove_dir(dir: &Path) -> Result<(), Error> {
    heyvm_trees::remove(dir).map_err(|error| Error::io("removing", dir)(error.into()))
}

pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Error::io("running a task", "")(io::Error::other(error)))?
}
