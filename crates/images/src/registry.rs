//! Images from OCI registries: names as Docker has them, digests verified, no more bytes taken than the manifest says.

use std::{
    io,
    path::Path,
    pin::Pin,
    sync::Once,
    task::{Context, Poll},
    time::Duration,
};

use oci_client::{
    Client, Reference,
    client::{ClientConfig, ClientProtocol, linux_amd64_resolver},
    errors::{OciDistributionError, OciErrorCode},
    manifest::{OciDescriptor, OciImageManifest},
    secrets::RegistryAuth,
};
use tokio::io::AsyncWrite;

use crate::{
    Error, Progress,
    credentials::{Credentials, Host, RegistryConfig},
    import::{self, Parts},
    layers,
};

/// A registry that does not answer is not there.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
const READ_DEADLINE: Duration = Duration::from_secs(60);
const TRIES: u32 = 3;
/// What an image may say about itself.
const MAX_CONFIG: u64 = 4 << 20;
/// Progress is told anew after so many bytes.
const STEP: u64 = 256 << 10;
/// As much of a registry's words as goes into an error.
const MAX_WORDS: usize = 300;

/// The name as it is when nothing is left out: `docker.io/library/ubuntu:24.04`.
pub fn canonical(name: &str) -> Option<String> {
    Some(checked(name).ok()?.whole())
}

/// Whether an image can be called so.
pub fn checked(name: &str) -> Result<Reference, Error> {
    name.parse().map_err(|error| Error::invalid(format!("{name:?} is no image name: {error}")))
}

/// The parts of an image, its layers as files in `work`.
pub async fn fetch(name: &str, config: &RegistryConfig, work: &Path, progress: &Progress) -> Result<Parts, Error> {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
    let reference = checked(name)?;
    let (mut answers, mut missing) = (Vec::new(), false);
    for host in config.hosts(reference.registry())? {
        let source = Source::new(&reference, &host, config.credentials(&host.name));
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

/// One place an image can come from.
struct Source {
    client: Client,
    reference: Reference,
    auth: RegistryAuth,
}

impl Source {
    fn new(reference: &Reference, host: &Host, credentials: Option<Credentials>) -> Self {
        let client = Client::new(ClientConfig {
            protocol: if host.plain { ClientProtocol::Http } else { ClientProtocol::Https },
            platform_resolver: Some(Box::new(linux_amd64_resolver)),
            connect_timeout: Some(CONNECT_DEADLINE),
            read_timeout: Some(READ_DEADLINE),
            ..ClientConfig::default()
        });
        let (name, repository) = (host.name.clone(), reference.repository().to_owned());
        let reference = match (reference.digest(), reference.tag()) {
            (Some(digest), _) => Reference::with_digest(name, repository, digest.into()),
            (None, tag) => Reference::with_tag(name, repository, tag.unwrap_or("latest").into()),
        };
        let auth = credentials.map_or(RegistryAuth::Anonymous, |known| RegistryAuth::Basic(known.user, known.password));
        Self { client, reference, auth }
    }

    async fn fetch(&self, work: &Path, progress: &Progress) -> Result<Parts, Error> {
        let pulled = self.client.pull_image_manifest(&self.reference, &self.auth).await;
        let (manifest, digest) = pulled.map_err(|error| self.refused(error))?;
        let total = checked_size(&manifest)?;
        let mut config = Vec::new();
        self.fetch_blob(&manifest.config, Bounded::new(&mut config, &manifest.config, &|_| {})).await?;
        let config = import::config_from(&config)?;
        let mut layers = Vec::new();
        let mut done = 0;
        for (number, layer) in manifest.layers.iter().enumerate() {
            let path = work.join(format!("layer-{number}"));
            self.fetch_layer(layer, &path, &|bytes| progress("pulling", Some(done + bytes), Some(total))).await?;
            done += size(layer);
            layers.push(path);
        }
        Ok(Parts { layers, config, name: None, tag: None, digest: Some(digest) })
    }

    /// Tries again what the network may have broken.
    async fn fetch_layer(&self, layer: &OciDescriptor, path: &Path, told: &Told<'_>) -> Result<(), Error> {
        let mut tried = 0;
        loop {
            tried += 1;
            told(0);
            let mut file = tokio::fs::File::create(path).await.map_err(Error::io("making", path))?;
            match self.fetch_blob(layer, Bounded::new(&mut file, layer, told)).await {
                Err(Error::Registry { .. }) if tried < TRIES => {
                    tokio::time::sleep(Duration::from_millis(300) * tried).await
                }
                done => return done,
            }
        }
    }

    /// Its digest is verified on the way.
    async fn fetch_blob(&self, blob: &OciDescriptor, mut out: impl AsyncWrite + Unpin) -> Result<(), Error> {
        // Only from the registry: a manifest that sends us to other hosts may mean hosts that it cannot reach itself.
        let blob = OciDescriptor { urls: None, ..blob.clone() };
        self.client.pull_blob(&self.reference, &blob, &mut out).await.map_err(|error| self.refused(error))?;
        Ok(())
    }

    /// Not there, not allowed, not whole, or not answering.
    fn refused(&self, error: OciDistributionError) -> Error {
        use OciDistributionError as E;
        let name = self.reference.to_string();
        let why = match error {
            E::ImageManifestNotFoundError(_) => {
                return Error::invalid(format!("{name} holds no image for linux/amd64"));
            }
            E::DigestError(error) => return Error::invalid(format!("{name}: {error}")),
            E::IoError(error) => return broken(&name, error),
            E::RegistryError { envelope, .. } => {
                let codes: Vec<_> = envelope.errors.iter().map(|error| &error.code).collect();
                use OciErrorCode as C;
                if codes.iter().any(|code| matches!(code, C::ManifestUnknown | C::NameUnknown | C::NotFound)) {
                    return Error::NotFound(name);
                }
                if codes.iter().any(|code| matches!(code, C::Unauthorized | C::Denied)) {
                    self.unknown_here()
                } else {
                    envelope.to_string()
                }
            }
            E::ServerError { code: 404, .. } => return Error::NotFound(name),
            E::ServerError { code: 401 | 403, .. } | E::UnauthorizedError { .. } | E::AuthenticationFailure(_) => {
                self.unknown_here()
            }
            E::ServerError { code, message, .. } => format!("it answered with HTTP {code}: {message}"),
            // The address may carry a signature.
            E::RequestError(error) => with_causes(&error.without_url()),
            other => with_causes(&other),
        };
        Error::Registry { name, why: self.presentable(&why) }
    }

    fn unknown_here(&self) -> String {
        match self.auth {
            RegistryAuth::Basic(..) => "it refuses the user name and password that are configured for it".into(),
            _ => "it wants a user name and password, or has no such image".into(),
        }
    }

    /// One short line, which repeats no password even where the registry does.
    fn presentable(&self, words: &str) -> String {
        let words = match &self.auth {
            RegistryAuth::Basic(_, password) if !password.is_empty() => words.replace(password, "…"),
            _ => words.to_owned(),
        };
        words.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_WORDS).collect()
    }
}

/// What writing a blob ended with.
fn broken(name: &str, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::InvalidData => Error::invalid(format!("{name}: {error}")),
        _ => Error::io("writing a layer of", name)(error),
    }
}

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
fn checked_size(manifest: &OciImageManifest) -> Result<u64, Error> {
    let negative = manifest.layers.iter().chain([&manifest.config]).any(|blob| blob.size < 0);
    let total = manifest.layers.iter().map(size).fold(0, u64::saturating_add);
    if negative || total > layers::MAX_BYTES || size(&manifest.config) > MAX_CONFIG {
        return Err(Error::invalid("the image says that it is larger than is allowed"));
    }
    Ok(total)
}

fn size(blob: &OciDescriptor) -> u64 {
    u64::try_from(blob.size).unwrap_or(0)
}

/// Is told how many bytes of a blob are here.
type Told<'a> = dyn Fn(u64) + Sync + 'a;

/// Takes as many bytes as a blob should have, and tells of them.
struct Bounded<'a, W> {
    to: &'a mut W,
    size: u64,
    done: u64,
    told: &'a Told<'a>,
    told_at: u64,
}

impl<'a, W> Bounded<'a, W> {
    fn new(to: &'a mut W, blob: &OciDescriptor, told: &'a Told<'a>) -> Self {
        Self { to, size: size(blob), done: 0, told, told_at: 0 }
    }
}

impl<W: AsyncWrite + Unpin> AsyncWrite for Bounded<'_, W> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if bytes.len() as u64 > self.size - self.done {
            let problem = "a blob has more bytes than the manifest says";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, problem)));
        }
        let written = std::task::ready!(Pin::new(&mut *self.to).poll_write(cx, bytes))?;
        self.done += written as u64;
        if self.done - self.told_at >= STEP || self.done == self.size {
            (self.told)(self.done);
            self.told_at = self.done;
        }
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.to).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.to).poll_shutdown(cx)
    }
}
