//! Images from files: `docker save` tars, OCI layouts (directory or tar) and root tars, told apart by what is in them.
#![expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, de::IgnoredAny};
use sha2::{Digest, Sha256};

use crate::{
    Error, ImageConfig, Progress, archive,
    layers::{self, Budget},
};

/// Layer files, bottom first, with what the image says about itself.
pub struct Parts {
    /// Paths of the layers.
    pub layers: Vec<PathBuf>,
    /// Environment and directory.
    pub config: ImageConfig,
    /// The name it has in its archive.
    pub name: Option<String>,
    /// Its tag there, where that is all the archive says.
    pub tag: Option<String>,
    /// Digest of its manifest.
    pub digest: Option<String>,
    /// Whether the operator's credentials were used to get it.
    pub private: bool,
    /// What it was built from, where it was built here.
    pub recipe: Option<String>,
}

impl Parts {
    /// A root tar, which is its own only layer.
    pub fn root(tar: PathBuf) -> Self {
        Self {
            layers: vec![tar],
            config: ImageConfig::default(),
            name: None,
            tag: None,
            digest: None,
            private: false,
            recipe: None,
        }
    }
}

/// Finds the parts; a tar is unpacked to `work`, unless it is a root tar, which is its own only layer.
pub fn open(path: &Path, work: &Path, progress: &Progress) -> Result<Parts, Error> {
    if !path.exists() {
        return Err(Error::NotFound(path.display().to_string()));
    }
    if path.is_dir() {
        return open_dir(path);
    }
    if !path.is_file() {
        return Err(Error::invalid(format!("{} is neither a file nor a directory", path.display())));
    }
    if !is_bundle(path)? {
        return Ok(Parts::root(path.to_owned()));
    }
    progress("unpacking the archive", None, None);
    let dir = work.join("bundle");
    fs::create_dir(&dir).map_err(Error::io("making", &dir))?;
    layers::apply(path, &dir, &mut Budget::default())?;
    open_dir(&dir)
}

/// Whether a tar holds an image in layers rather than a root.
fn is_bundle(path: &Path) -> Result<bool, Error> {
    let not_tar = |error: io::Error| Error::invalid(format!("{} is no tar: {error}", path.display()));
    let (mut found, mut seen) = (None, false);
    archive::each(path, not_tar, |entry| {
        seen = true;
        let name = entry.path().map_err(not_tar)?.to_string_lossy().into_owned();
        let name = name.trim_start_matches("./").trim_end_matches('/');
        found = match name.split('/').next() {
            Some("manifest.json" | "oci-layout" | "index.json") if !name.contains('/') => Some(true),
            Some("bin" | "usr" | "etc" | "sbin" | "lib") => Some(false),
            _ => None,
        };
        Ok(found.is_none())
    })?;
    match found {
        Some(bundle) => Ok(bundle),
        None if seen => Err(Error::invalid(format!("{} holds neither an image nor a root", path.display()))),
        None => Err(Error::invalid(format!("{} is empty", path.display()))),
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerManifest {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// A part of an image, as its manifest names it.
#[derive(Deserialize)]
pub struct Blob {
    /// `sha256:…`
    pub digest: String,
    /// Bytes.
    #[serde(default)]
    pub size: u64,
}

/// An entry of an index.
#[derive(Deserialize)]
pub struct Descriptor {
    /// `sha256:…`
    pub digest: String,
    #[serde(default)]
    platform: Platform,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// Images for several platforms.
#[derive(Deserialize)]
pub struct Index {
    manifests: Vec<Descriptor>,
}

/// What a descriptor leads to.
#[derive(Deserialize)]
#[serde(untagged)]
pub enum Described {
    /// Images for several platforms.
    Index(Index),
    /// One image.
    Image(Manifest),
}

/// An image: its configuration and its layers, bottom first.
#[derive(Deserialize)]
pub struct Manifest {
    /// What it says about running it.
    pub config: Blob,
    /// Bottom first.
    pub layers: Vec<Blob>,
}

#[derive(Deserialize, Default)]
struct Config {
    #[serde(default)]
    config: Option<RunConfig>,
    #[serde(flatten)]
    platform: Platform,
}

/// What an image runs on; anything, where it does not say.
#[derive(Deserialize, Default)]
struct Platform {
    #[serde(default)]
    os: Option<String>,
    #[serde(default)]
    architecture: Option<String>,
}

impl Platform {
    fn fits(&self) -> bool {
        let same =
            |said: &Option<String>, ours: &str| said.as_deref().is_none_or(|said| said.is_empty() || said == ours);
        same(&self.os, "linux") && same(&self.architecture, "amd64")
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase")]
struct RunConfig {
    #[serde(default)]
    env: Option<Vec<String>>,
    #[serde(default)]
    working_dir: Option<String>,
    #[serde(default)]
    entrypoint: Option<Vec<String>>,
    #[serde(default)]
    cmd: Option<Vec<String>>,
    #[serde(default)]
    user: Option<String>,
    /// `8080/tcp`, without a protocol TCP.
    #[serde(default)]
    exposed_ports: Option<BTreeMap<String, IgnoredAny>>,
    #[serde(default)]
    stop_signal: Option<String>,
}

/// What an image's configuration says about running it. Format: OCI image specification, "config".
pub fn config_from(bytes: &[u8]) -> Result<ImageConfig, Error> {
    let config: Config =
        serde_json::from_slice(bytes).map_err(|error| Error::invalid(format!("the image's configuration: {error}")))?;
    if !config.platform.fits() {
        return Err(Error::invalid("the image is for another platform than linux/amd64"));
    }
    let run = config.config.unwrap_or_default();
    let env = run.env.unwrap_or_default();
    let ports = run.exposed_ports.unwrap_or_default();
    let tcp = |port: &String| port.strip_suffix("/tcp").unwrap_or(port).parse().ok().filter(|port| *port != 0);
    let mut exposed_ports: Vec<u16> = ports.keys().filter_map(tcp).collect();
    exposed_ports.sort_unstable();
    exposed_ports.dedup();
    let given = |text: Option<String>| text.filter(|text| !text.is_empty() && !text.contains('\0'));
    Ok(ImageConfig {
        env: env.iter().filter_map(|v| v.split_once('=')).map(|(n, v)| (n.to_owned(), v.to_owned())).collect(),
        working_dir: given(run.working_dir),
        entrypoint: run.entrypoint.unwrap_or_default(),
        cmd: run.cmd.unwrap_or_default(),
        user: given(run.user),
        exposed_ports,
        stop_signal: given(run.stop_signal),
    })
}

fn open_dir(dir: &Path) -> Result<Parts, Error> {
    match ["index.json", "manifest.json"].map(|name| dir.join(name).is_file()) {
        [true, _] => open_layout(dir),
        [_, true] => open_docker(dir),
        _ => Err(Error::invalid(format!("{} holds neither index.json nor manifest.json: no image", dir.display()))),
    }
}

fn open_docker(dir: &Path) -> Result<Parts, Error> {
    let manifests: Vec<DockerManifest> = json(&dir.join("manifest.json"))?;
    let manifest = manifests.into_iter().next().ok_or_else(|| Error::invalid("the archive holds no image"))?;
    let config = config_from(&read(&within(dir, &manifest.config)?)?)?;
    let layers = manifest.layers.iter().map(|layer| within(dir, layer)).collect::<Result<_, _>>()?;
    let name = manifest.repo_tags.unwrap_or_default().into_iter().next();
    Ok(Parts { layers, config, name, tag: None, digest: None, private: false, recipe: None })
}

fn open_layout(dir: &Path) -> Result<Parts, Error> {
    let index: Index = json(&dir.join("index.json"))?;
    let chosen = fitting(index)?;
    // Docker and containerd write the whole name, others the tag alone.
    let name = chosen.annotations.get("io.containerd.image.name").cloned();
    let told = chosen.annotations.get("org.opencontainers.image.ref.name").cloned();
    let (told, tag) =
        if told.as_ref().is_some_and(|told| told.contains(['/', ':'])) { (told, None) } else { (None, told) };
    let (manifest, digest) = manifest(dir, chosen)?;
    let config = config_from(&read(&blob(dir, &manifest.config.digest)?)?)?;
    let layers = manifest.layers.iter().map(|layer| blob(dir, &layer.digest)).collect::<Result<_, _>>()?;
    Ok(Parts { layers, config, name: name.or(told), tag, digest: Some(digest), private: false, recipe: None })
}

/// The entry for this platform.
pub fn fitting(index: Index) -> Result<Descriptor, Error> {
    if index.manifests.is_empty() {
        return Err(Error::invalid("the index holds no image"));
    }
    let fits = index.manifests.into_iter().find(|manifest| manifest.platform.fits());
    fits.ok_or_else(|| Error::invalid("the index holds no image for linux/amd64"))
}

/// The manifest behind a descriptor and its digest, through an index if there is one.
fn manifest(dir: &Path, mut descriptor: Descriptor) -> Result<(Manifest, String), Error> {
    const DEPTH: usize = 3;
    for _ in 0..DEPTH {
        let bytes = read(&blob(dir, &descriptor.digest)?)?;
        let described: Described = serde_json::from_slice(&bytes)
            .map_err(|error| Error::invalid(format!("the layout's manifest: {error}")))?;
        match described {
            Described::Image(manifest) => return Ok((manifest, descriptor.digest)),
            Described::Index(index) => descriptor = fitting(index)?,
        }
    }
    Err(Error::invalid("the layout's indexes lead to no image"))
}

/// A blob of a layout, whose bytes are what its name says.
fn blob(dir: &Path, digest: &str) -> Result<PathBuf, Error> {
    let path = within(dir, &format!("blobs/sha256/{}", hex_of(digest)?))?;
    verify(&path, digest)?;
    Ok(path)
}

/// The digits of a digest.
pub fn hex_of(digest: &str) -> Result<&str, Error> {
    let is_hex = |hex: &&str| hex.len() == 64 && hex.bytes().all(|byte| b"0123456789abcdef".contains(&byte));
    let hex = digest.strip_prefix("sha256:").filter(is_hex);
    hex.ok_or_else(|| Error::invalid(format!("{digest:?} is no SHA-256 digest")))
}

/// Whether a file's bytes have the digest they should.
fn verify(path: &Path, digest: &str) -> Result<(), Error> {
    let mut file = fs::File::open(path).map_err(Error::io("reading", path))?;
    let mut hash = Sha256::new();
    io::copy(&mut file, &mut hash).map_err(Error::io("reading", path))?;
    let found = format!("sha256:{}", hex::encode(hash.finalize()));
    if found == digest { Ok(()) } else { Err(Error::invalid(format!("a blob has digest {found} instead of {digest}"))) }
}

fn json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, Error> {
    serde_json::from_slice(&read(path)?).map_err(|error| Error::invalid(format!("{}: {error}", path.display())))
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let meta = fs::symlink_metadata(path).map_err(Error::io("reading", path))?;
    if !meta.is_file() || meta.len() > 16 << 20 {
        return Err(Error::invalid(format!("{} is no image's metadata", path.display())));
    }
    fs::read(path).map_err(Error::io("reading", path))
}

/// A file of the bundle: a real one, and inside of it.
fn within(dir: &Path, name: &str) -> Result<PathBuf, Error> {
    let absent = |error: io::Error| Error::invalid(format!("the image lacks {name}: {error}"));
    let real = dir.join(name).canonicalize().map_err(absent)?;
    let base = dir.canonicalize().map_err(Error::io("looking for", dir))?;
    if real.starts_with(base) && real.is_file() {
        Ok(real)
    } else {
        Err(Error::invalid(format!("{name} is no file of the image")))
    }
}
