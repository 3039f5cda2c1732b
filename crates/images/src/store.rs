//! What is here: `images/index.json` (name → digest) and `images/<digest>/{root.erofs,image.json}`; `kernels/<version>/`.
//! An image whose name has moved on to another stays until [`ImageStore::prune`]: whoever calls it knows who runs what.

use std::{
    io,
    path::Path,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use crate::{
    Error, Image, ImageStore, Kernel, Progress, Prune, Removed, Requester, Resolved, Variant, Wanted,
    import::{self, Parts},
    kernel, packages, registry,
    work::Work,
};

mod files;

/// A registry that did not answer for the default image is not asked for it again this long.
const SILENCE: Duration = Duration::from_secs(300);

impl ImageStore {
    /// Every image, by name.
    pub async fn list(&self) -> Vec<Image> {
        self.look(Self::list_now).await.unwrap_or_default()
    }

    /// The image known by this name, written as Docker lets one write it, or digest.
    pub async fn get(&self, reference: &str) -> Option<Image> {
        let reference = reference.to_owned();
        self.look(move |store| store.get_now(&reference)).await.flatten()
    }

    /// The image of this digest, also when no name means it any more.
    pub async fn with_digest(&self, digest: &str) -> Option<Image> {
        let digest = digest.to_owned();
        self.look(move |store| store.with_digest_now(&digest)).await.flatten()
    }

    async fn look<T: Send + 'static>(&self, look: impl FnOnce(&Self) -> T + Send + 'static) -> Option<T> {
        let store = self.clone();
        let looked = blocking(move || Ok(look(&store))).await;
        looked.inspect_err(|error| tracing::error!(%error, "the images could not be looked at")).ok()
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

    /// Notes that an image is used now.
    pub async fn touch(&self, digest: &str) {
        let (store, owned) = (self.clone(), digest.to_owned());
        let touched = blocking(move || store.touch_now(&owned)).await;
        if let Err(error) = touched {
            tracing::debug!(%error, "the image may be evicted earlier than it should");
        }
    }

    /// The image to run: one that is here, else from its registry, else what stands in for the default one.
    pub async fn resolve(&self, wanted: &Wanted, progress: Progress) -> Result<Resolved, Error> {
        if wanted.full && wanted.named.is_none() {
            return Ok(wanted.substituted(self.build_default(Variant::Full, progress).await?));
        }
        let reference = wanted.named.as_ref().unwrap_or(&wanted.default_image);
        let is_default = *reference == wanted.default_image;
        let may_run = |image: &Image| is_default || !image.private || wanted.requester == Requester::Operator;
        if let Some(image) = self.get(reference).await.filter(may_run) {
            return Ok(Resolved { image, stands_in: false, substituted: None });
        }
        let stand_in = if is_default { self.stand_in(Variant::Base).await } else { None };
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
        let image = match self.stand_in(Variant::Base).await {
            Some(image) => image,
            None => self.build_default(Variant::Base, progress).await?,
        };
        Ok(wanted.substituted(image))
    }

    /// An image that was built here: in place of the default one, or the one with compilers.
    pub async fn stand_in(&self, variant: Variant) -> Option<Image> {
        let name = move |_: &Self| packages::Distribution::of_host().ok().map(|host| host.image_name(variant));
        let name = self.look(name).await.flatten()?;
        self.get(&name).await
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
                    work.remove();
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
        let (work, parts) = blocking(move || work.fill(|dir| import::open(&from, dir, &told))).await?;
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
        let assembling = move || {
            let (work, image) = work.fill(|dir| store.assemble_now(parts, name, source, dir, &progress))?;
            work.remove();
            Ok(image)
        };
        blocking(assembling).await
    }

    /// Builds an image from the host's distribution, or gives the one that is here if it holds what this version puts in.
    /// Runs detached: the lock must not depend on how fast a client reads its progress.
    pub async fn build_default(&self, variant: Variant, progress: Progress) -> Result<Image, Error> {
        let store = self.clone();
        let built = tokio::spawn(async move { store.build_default_now(variant, progress).await }).await;
        built.map_err(|error| Error::io("running a task", "")(io::Error::other(error)))?
    }

    async fn build_default_now(&self, variant: Variant, progress: Progress) -> Result<Image, Error> {
        let distribution = blocking(packages::Distribution::of_host).await?;
        let name = distribution.image_name(variant);
        // Two would do the same work twice; others may pull meanwhile.
        let store = self.clone();
        let _building = blocking(move || store.lock("build.lock")).await?;
        let recipe = packages::recipe(variant);
        if let Some(image) = self.get(&name).await.filter(|image| image.recipe.as_deref() == Some(&recipe)) {
            return Ok(image);
        }
        let work = self.work().await?;
        progress(&format!("building {name} from packages"), None, None);
        let told = Arc::clone(&progress);
        let building = move || {
            work.fill(|dir| {
                let tar = dir.join("root.tar");
                packages::build(&distribution, variant, &tar, &told).map(|()| tar)
            })
        };
        let (work, tar) = blocking(building).await?;
        let parts = Parts { recipe: Some(recipe), ..Parts::root(tar) };
        self.assemble(parts, name, "packages", work, progress).await
    }

    /// The newest guest kernel with the agent that belongs to this program.
    pub async fn kernel(&self) -> Result<Kernel, Error> {
        let kernels = self.kernels.clone();
        blocking(move || kernel::newest_with_agent(&kernels)).await
    }

    /// Takes a kernel from an unpacked package, or from `/`; answers its version.
    pub async fn import_kernel(&self, tree: &Path) -> Result<String, Error> {
        let (tree, kernels) = (tree.to_owned(), self.kernels.clone());
        blocking(move || kernel::import(&tree, &kernels)).await
    }
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

pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Error::io("running a task", "")(io::Error::other(error)))?
}
