//! Images from OCI registries: names as Docker has them, digests verified, no more bytes taken than the manifest says.
//! What a registry says in words is repeated to nobody: they may be those of another host, behind a redirect.
//!
//! [`session`]: requests to one registry, with redirects and tokens.

mod session;

use std::{path::Path, time::Duration};

use oci_spec::distribution::Reference;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncWrite, AsyncWriteExt};

use crate::{
    Error, Progress, Requester,
    credentials::{Host, RegistryConfig},
    import::{self, Blob, Described, Manifest, Parts},
    layers,
    store::blocking,
};
use session::{Refused, Session, body};

const TRIES: u32 = 3;
/// What an image may say about itself.
const MAX_CONFIG: u64 = 4 << 20;
const MAX_MANIFEST: u64 = 4 << 20;
/// An index that leads to an index may do so this often.
const DEPTH: usize = 3;
/// Progress is reported again after so many bytes.
const STEP: u64 = 256 << 10;
const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
                         application/vnd.docker.distribution.manifest.list.v2+json, \
                         application/vnd.docker.distribution.manifest.v2+json";

/// The name as it is when nothing is left out: `docker.io/library/ubuntu:24.04`.
pub fn canonical(name: &str) -> Option<String> {
    Some(checked(name).ok()?.whole())
}

/// Whether an image can be called so.
pub fn checked(name: &str) -> Result<Reference, Error> {
    name.parse().map_err(|error| Error::invalid(format!("{name:?} is no image name: {error}")))
}

/// The parts of an image, its layers as files in `work`.
pub async fn fetch(
    name: &str,
    config: &RegistryConfig,
    requester: Requester,
    work: &Path,
    progress: &Progress,
) -> Result<Parts, Error> {
    let reference = checked(name)?;
    let (mut answers, mut missing) = (Vec::new(), false);
    for host in config.hosts(reference.registry(), requester)? {
        let source = Source::new(&reference, &host, config, requester).await?;
        match source.fetch(work, progress).await {
            Ok(parts) => return Ok(parts),
            Err(Error::NotFound(_)) => {
                missing = true;
                answers.push(format!("{} has no such image", host.name));
            }
            Err(Error::Registry { why, .. }) => {
                missing = false;
                answers.push(format!("{}: {why}", host.name));
            }
            Err(error) => return Err(error),
        }
    }
    // The registry itself is asked last. Where it is silent, what its mirrors lack may still be there.
    Err(if missing {
        Error::NotFound(name.into())
    } else {
        Error::Registry { name: name.into(), why: answers.join("; ") }
    })
}

/// A host that an image may come from.
struct Source {
    session: Session,
    name: String,
    /// Tag or digest.
    version: String,
    requester: Requester,
}

impl Source {
    async fn new(
        reference: &Reference,
        host: &Host,
        config: &RegistryConfig,
        requester: Requester,
    ) -> Result<Self, Error> {
        let (repository, name) = (reference.repository(), &host.name);
        let credentials = match requester {
            Requester::Operator => {
                let (config, name) = (config.clone(), name.clone());
                blocking(move || Ok(config.credentials(&name))).await?
            }
            Requester::Tenant => None,
        };
        let session = Session::new(host, repository, credentials, config.realms(name), requester)
            .ok_or_else(|| Error::invalid(format!("{name:?} is no registry")))?;
        let (separator, version) = match (reference.digest(), reference.tag()) {
            (Some(digest), _) => ('@', digest),
            (None, tag) => (':', tag.unwrap_or("latest")),
        };
        let name = format!("{name}/{repository}{separator}{version}");
        Ok(Self { session, name, version: version.to_owned(), requester })
    }

    async fn fetch(&self, work: &Path, progress: &Progress) -> Result<Parts, Error> {
        let (manifest, digest) = self.manifest().await?;
        let total = checked_size(&manifest)?;
        let mut config = Vec::new();
        self.fetch_blob(&manifest.config, &mut config, &|_| {}).await?;
        let config = import::config_from(&config)?;
        let mut layers = Vec::new();
        let mut done = 0;
        for (number, layer) in manifest.layers.iter().enumerate() {
            let path = work.join(format!("layer-{number}"));
            self.fetch_layer(layer, &path, &|bytes| progress("pulling", Some(done + bytes), Some(total))).await?;
            done += layer.size;
            layers.push(path);
        }
        let private = self.session.has_credentials();
        Ok(Parts { layers, config, name: None, tag: None, digest: Some(digest), private, recipe: None })
    }

    /// The manifest for this platform, and its digest.
    async fn manifest(&self) -> Result<(Manifest, String), Error> {
        let mut version = self.version.clone();
        for _ in 0..DEPTH {
            let path = format!("manifests/{version}");
            let response = self.session.get(&path, MANIFESTS).await.map_err(|refused| self.refused(refused))?;
            let claimed = response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
            let claimed = claimed.filter(|digest| digest.starts_with("sha256:")).map(str::to_owned);
            let bytes = body(response, MAX_MANIFEST).await.map_err(|refused| self.refused(refused))?;
            let digest = format!("sha256:{}", hex::encode(Sha256::digest(&bytes)));
            let wanted = if version.contains(':') { Some(version) } else { claimed };
            if wanted.is_some_and(|wanted| wanted != digest) {
                return Err(Error::invalid(format!("{}: the manifest has another digest than it should", self.name)));
            }
            let described: Described = serde_json::from_slice(&bytes)
                .map_err(|_| Error::invalid(format!("{}: its manifest is not one of an image", self.name)))?;
            match described {
                Described::Image(manifest) => return Ok((manifest, digest)),
                Described::Index(index) => version = import::fitting(index)?.digest,
            }
        }
        Err(Error::invalid(format!("{}: its indexes lead to no image", self.name)))
    }

    /// Tries again what the network may have broken.
    async fn fetch_layer(&self, layer: &Blob, path: &Path, told: &Told<'_>) -> Result<(), Error> {
        let mut tried = 0;
        loop {
            tried += 1;
            told(0);
            let mut file = tokio::fs::File::create(path).await.map_err(Error::io("making", path))?;
            match self.fetch_blob(layer, &mut file, told).await {
                Err(Error::Registry { .. }) if tried < TRIES => {
                    tokio::time::sleep(Duration::from_millis(300) * tried).await
                }
                done => return done,
            }
        }
    }

    /// Only from the registry: the URLs that a manifest names for its layers may mean hosts that the registry cannot reach
    /// itself.
    async fn fetch_blob(&self, blob: &Blob, out: &mut (impl AsyncWrite + Unpin), told: &Told<'_>) -> Result<(), Error> {
        let path = format!("blobs/{}", blob.digest);
        let mut response = self.session.get(&path, "*/*").await.map_err(|refused| self.refused(refused))?;
        let (mut hash, mut done, mut told_at) = (Sha256::new(), 0, 0);
        while let Some(piece) = response.chunk().await.map_err(|error| self.refused(error.into()))? {
            done += piece.len() as u64;
            if done > blob.size {
                return Err(Error::invalid(format!("{}: a blob has more bytes than the manifest says", self.name)));
            }
            hash.update(&piece);
            out.write_all(&piece).await.map_err(Error::io("writing a layer of", &self.name))?;
            if done - told_at >= STEP || done == blob.size {
                told(done);
                told_at = done;
            }
        }
        out.flush().await.map_err(Error::io("writing a layer of", &self.name))?;
        let found = format!("sha256:{}", hex::encode(hash.finalize()));
        if done < blob.size {
            let why = format!("a blob ends after {done} of {} bytes", blob.size);
            return Err(Error::Registry { name: self.name.clone(), why });
        }
        if found != blob.digest {
            return Err(Error::invalid(format!("{}: a blob has digest {found} instead of {}", self.name, blob.digest)));
        }
        Ok(())
    }

    fn refused(&self, refused: Refused) -> Error {
        let why = match refused {
            Refused::Missing => return Error::NotFound(self.name.clone()),
            // How a connection fails says what is there.
            Refused::Http(_) if self.requester == Requester::Tenant => "it does not answer".into(),
            other => with_causes(&other),
        };
        Error::Registry { name: self.name.clone(), why }
    }
}

/// An error with what caused it.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

/// Bytes of all layers together.
fn checked_size(manifest: &Manifest) -> Result<u64, Error> {
    let total = manifest.layers.iter().map(|blob| blob.size).fold(0, u64::saturating_add);
    if total > layers::MAX_BYTES || manifest.config.size > MAX_CONFIG {
        return Err(Error::invalid("the manifest says sizes that cannot be"));
    }
    // Digests become parts of paths.
    for blob in manifest.layers.iter().chain([&manifest.config]) {
        import::hex_of(&blob.digest)?;
    }
    Ok(total)
}

type Told<'a> = dyn Fn(u64) + Sync + 'a;
