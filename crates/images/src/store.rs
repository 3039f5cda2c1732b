//! What is here: `images/index.json` (name → digest) and `images/<digest>/{root.erofs,image.json}`; `kernels/<version>/`.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

use crate::{Error, Image, ImageConfig, ImageStore, Kernel, Progress, Resolved, erofs, kernel, packages};

impl ImageStore {
    /// The store below heyvm's home.
    pub fn open(home: &Path) -> Result<Self, Error> {
        let store = Self { images: home.join("images"), kernels: home.join("kernels") };
        for dir in [&store.images, &store.kernels] {
            fs::create_dir_all(dir).map_err(Error::io("making", dir))?;
        }
        Ok(store)
    }

    /// Every image, by name.
    pub fn list(&self) -> Vec<Image> {
        self.index().into_iter().filter_map(|(name, digest)| self.read(&name, &digest)).collect()
    }

    /// The image known by this name or digest.
    pub fn get(&self, reference: &str) -> Option<Image> {
        let index = self.index();
        let (name, digest) = index.iter().find(|(name, digest)| *name == reference || *digest == reference)?;
        self.read(name, digest)
    }

    /// Forgets a name, and removes the image when it has no other.
    pub fn remove(&self, reference: &str) -> Result<(), Error> {
        let _lock = self.lock()?;
        let image = self.get(reference).ok_or_else(|| Error::NotFound(reference.into()))?;
        let mut index = self.index();
        index.retain(|name, _| *name != image.name);
        self.write_index(&index)?;
        if !index.values().any(|digest| *digest == image.digest) {
            let dir = self.images.join(dir_name(&image.digest));
            fs::remove_dir_all(&dir).map_err(Error::io("removing", dir))?;
        }
        Ok(())
    }

    /// The image that `reference` means here, or what stands in for the default one where no registry gives it.
    pub async fn resolve(&self, reference: &str, default_image: &str, progress: Progress) -> Result<Resolved, Error> {
        if let Some(image) = self.get(reference) {
            return Ok(Resolved { image, substituted: None });
        }
        if reference != default_image {
            return Err(Error::NotFound(reference.into()));
        }
        let name = packages::Distribution::of_host()?.image_name();
        let image = match self.get(&name) {
            Some(image) => image,
            None => self.build_default(progress).await?,
        };
        let substituted = format!("{reference} is not here and no registry gave it: the sandbox runs {name}");
        Ok(Resolved { image, substituted: Some(substituted) })
    }

    /// Builds the default image from the host's distribution.
    pub async fn build_default(&self, progress: Progress) -> Result<Image, Error> {
        let store = Self { images: self.images.clone(), kernels: self.kernels.clone() };
        tokio::task::spawn_blocking(move || store.build_default_now(&progress))
            .await
            .map_err(|error| Error::io("building the default image", "")(io::Error::other(error)))?
    }

    fn build_default_now(&self, progress: &Progress) -> Result<Image, Error> {
        let distribution = packages::Distribution::of_host()?;
        let name = distribution.image_name();
        let _lock = self.lock()?;
        if let Some(image) = self.get(&name) {
            return Ok(image);
        }
        let work = tempfile::tempdir_in(&self.images).map_err(Error::io("making a directory in", &self.images))?;
        let root = work.path().join("root");
        progress(&format!("building {name} from packages"), None, None);
        packages::build(&distribution, &root, progress)?;
        progress("compressing", None, None);
        let half = work.path().join("image");
        fs::create_dir(&half).map_err(Error::io("making", &half))?;
        erofs::write(&root, &half.join("root.erofs"))?;
        self.keep(&half, name, ImageConfig::default(), "packages")
    }

    fn keep(&self, half: &Path, name: String, config: ImageConfig, source: &str) -> Result<Image, Error> {
        let rootfs = half.join("root.erofs");
        let mut hash = Sha256::new();
        let mut file = File::open(&rootfs).map_err(Error::io("reading", &rootfs))?;
        let size_bytes = io::copy(&mut file, &mut hash).map_err(Error::io("reading", &rootfs))?;
        let digest = format!("sha256:{}", hex::encode(hash.finalize()));
        let created_at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
        let target = self.images.join(dir_name(&digest));
        let image = Image {
            name: name.clone(),
            digest: digest.clone(),
            rootfs: target.join("root.erofs"),
            size_bytes,
            config,
            created_at,
            source: source.into(),
        };
        let told = serde_json::to_vec(&image).map_err(|error| Error::io("writing", half)(error.into()))?;
        fs::write(half.join("image.json"), told).map_err(Error::io("writing", half))?;
        let _ = fs::remove_dir_all(&target);
        fs::rename(half, &target).map_err(Error::io("keeping the image", &target))?;
        let mut index = self.index();
        index.insert(name, digest);
        self.write_index(&index)?;
        Ok(image)
    }

    /// The newest guest kernel with the agent that belongs to this program.
    pub async fn kernel(&self) -> Result<Kernel, Error> {
        let kernels = self.kernels.clone();
        tokio::task::spawn_blocking(move || kernel::newest_with_agent(&kernels))
            .await
            .map_err(|error| Error::io("preparing the kernel", "")(io::Error::other(error)))?
    }

    /// Takes a kernel from an unpacked package, or from `/`; answers its version.
    pub fn import_kernel(&self, tree: &Path) -> Result<String, Error> {
        kernel::import(tree, &self.kernels)
    }

    fn read(&self, name: &str, digest: &str) -> Option<Image> {
        let dir = self.images.join(dir_name(digest));
        let mut image: Image = serde_json::from_slice(&fs::read(dir.join("image.json")).ok()?).ok()?;
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
            let half = tempfile::NamedTempFile::new_in(&self.images)?;
            serde_json::to_writer(half.as_file(), index)?;
            half.persist(&path)?;
            Ok(())
        };
        write().map_err(Error::io("writing", &path))
    }

    /// One process at a time changes the store.
    fn lock(&self) -> Result<Flock<File>, Error> {
        let path = self.images.join("lock");
        let file = File::create(&path).map_err(Error::io("making", &path))?;
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| Error::io("locking", path)(errno.into()))
    }
}

fn dir_name(digest: &str) -> String {
    digest.replace(':', "-")
}
