//! Images from OCI registries: names as Docker has them, mirrors and credentials from the configuration, digests verified.

use std::{collections::BTreeMap, path::Path, sync::Once, time::Duration};

use oci_client::{
    Client, Reference,
    client::{ClientConfig, ClientProtocol},
    errors::{OciDistributionError, OciErrorCode},
    manifest::OciImageManifest,
    secrets::RegistryAuth,
};
use serde::Deserialize;
use tokio::io::AsyncWriteExt;

use crate::{
    Error, Progress,
    import::{self, Parts},
};

/// What the user says about registries, by registry name (`docker.io`).
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(transparent)]
pub struct RegistryConfig {
    registries: BTreeMap<String, Registry>,
}

/// One registry.
#[derive(Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Registry {
    /// Asked first, in order; `http://host:port` or `https://host`.
    mirrors: Vec<String>,
    /// Speak plain HTTP to the registry itself.
    insecure: bool,
    username: Option<String>,
    password: Option<String>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry")
            .field("mirrors", &self.mirrors)
            .field("insecure", &self.insecure)
            .finish_non_exhaustive()
    }
}

/// A registry that does not answer is not there.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
const READ_DEADLINE: Duration = Duration::from_secs(60);
const TRIES: usize = 3;

/// The parts of an image, its layers as files in `work`.
pub async fn fetch(name: &str, config: &RegistryConfig, work: &Path, progress: &Progress) -> Result<Parts, Error> {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
    let reference: Reference =
        name.parse().map_err(|error| Error::invalid(format!("{name:?} is no image name: {error}")))?;
    let registry = config.registries.get(reference.registry()).cloned().unwrap_or_default();
    let mut last = None;
    for source in sources(&reference, &registry) {
        match fetch_from(&source, work, progress).await {
            Ok(parts) => return Ok(parts),
            Err(error @ Error::Invalid(_)) => return Err(error),
            // An answer says more than a silence.
            Err(error) if last.as_ref().is_none_or(|known| !matches!(known, Error::NotFound(_))) => last = Some(error),
            Err(_) => {}
        }
    }
    Err(last.unwrap_or_else(|| Error::NotFound(name.into())))
}

/// One place an image can come from.
struct Source {
    reference: Reference,
    plain: bool,
    auth: RegistryAuth,
}

fn sources(reference: &Reference, registry: &Registry) -> Vec<Source> {
    let auth = match (&registry.username, &registry.password) {
        (Some(user), Some(password)) => RegistryAuth::Basic(user.clone(), password.clone()),
        _ => RegistryAuth::Anonymous,
    };
    let mirrors = registry.mirrors.iter().map(|mirror| {
        let plain = mirror.starts_with("http://");
        let host = mirror.trim_start_matches("http://").trim_start_matches("https://").trim_end_matches('/');
        let repository = reference.repository().to_owned();
        let reference = match (reference.digest(), reference.tag()) {
            (Some(digest), _) => Reference::with_digest(host.into(), repository, digest.into()),
            (None, tag) => Reference::with_tag(host.into(), repository, tag.unwrap_or("latest").into()),
        };
        Source { reference, plain, auth: auth.clone() }
    });
    let own = Source { reference: reference.clone(), plain: registry.insecure, auth: auth.clone() };
    mirrors.chain([own]).collect()
}

async fn fetch_from(source: &Source, work: &Path, progress: &Progress) -> Result<Parts, Error> {
    let protocol = if source.plain { ClientProtocol::Http } else { ClientProtocol::Https };
    let client = Client::new(ClientConfig {
        protocol,
        connect_timeout: Some(CONNECT_DEADLINE),
        read_timeout: Some(READ_DEADLINE),
        ..ClientConfig::default()
    });
    let name = source.reference.to_string();
    let pulled = client.pull_manifest_and_config(&source.reference, &source.auth).await;
    let (manifest, digest, config) = pulled.map_err(|error| refused(&name, error))?;
    let config = import::config_from(config.as_bytes())?;
    let mut layers = Vec::new();
    let total: u64 = manifest.layers.iter().map(|layer| u64::try_from(layer.size).unwrap_or(0)).sum();
    let mut done = 0;
    for (number, layer) in manifest.layers.iter().enumerate() {
        progress("pulling", Some(done), Some(total));
        let path = work.join(format!("layer-{number}"));
        fetch_layer(&client, source, &manifest, number, &path).await?;
        done += u64::try_from(layer.size).unwrap_or(0);
        layers.push(path);
    }
    Ok(Parts { layers, config, name: None, digest: Some(digest) })
}

async fn fetch_layer(
    client: &Client,
    source: &Source,
    manifest: &OciImageManifest,
    number: usize,
    path: &Path,
) -> Result<(), Error> {
    let layer = &manifest.layers[number];
    let name = source.reference.to_string();
    let mut tried = 0;
    loop {
        tried += 1;
        let mut file = tokio::fs::File::create(path).await.map_err(Error::io("making", path))?;
        let pulled = client.pull_blob(&source.reference, layer, &mut file).await;
        file.flush().await.map_err(Error::io("writing", path))?;
        match pulled {
            Ok(()) => break,
            Err(error) if tried == TRIES => return Err(refused(&name, error)),
            Err(_) => tokio::time::sleep(Duration::from_millis(300 * tried as u64)).await,
        }
    }
    let (path, digest) = (path.to_owned(), layer.digest.clone());
    tokio::task::spawn_blocking(move || import::verify(&path, &digest))
        .await
        .map_err(|error| Error::invalid(format!("checking a layer: {error}")))?
}

/// Not there, not allowed, not whole, or not answering.
fn refused(name: &str, error: OciDistributionError) -> Error {
    use OciDistributionError as E;
    match &error {
        E::ImageManifestNotFoundError(_) => Error::NotFound(name.into()),
        E::RegistryError { envelope, .. }
            if envelope.errors.iter().any(|e| {
                matches!(e.code, OciErrorCode::ManifestUnknown | OciErrorCode::NameUnknown | OciErrorCode::NotFound)
            }) =>
        {
            Error::NotFound(name.into())
        }
        E::DigestError(_) => Error::invalid(format!("{name}: {error}")),
        _ => Error::Registry { name: name.into(), why: error.to_string() },
    }
}
