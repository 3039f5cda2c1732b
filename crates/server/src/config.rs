//! `config.toml`: the user's settings. All of them are optional; an unknown key is an error that names it. docs/settings.md is
//! made from these types and those of `server.toml`.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
    path::{Path, PathBuf},
};

use heyvm_control_plane::ImageLimits;
use heyvm_images::{DEFAULT_ALLOWED_REGISTRIES, RegistryConfig};
use serde::{Deserialize, de::DeserializeOwned};

use crate::Error;

/// The whole file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[cfg_attr(test, derive(serde::Serialize))]
pub struct Config {
    /// Image of sandboxes that ask for none.
    pub default_image: String,
    /// Regions this daemon serves; the first is the default.
    pub regions: Vec<String>,
    /// Whether sandboxes begin as clones of a template; without, each boots its kernel.
    pub templates: bool,
    /// How many VMs of one kind the warm pool holds at most; 0: none.
    pub reserve: usize,
    /// Memory for templates that are loaded, in MiB; those that VMs run on count and are never evicted. A quarter of the
    /// host's when absent.
    pub template_memory_mib: Option<u64>,
    /// Disk for templates, in GiB; 20 when absent.
    pub template_disk_gib: Option<u64>,
    /// The proxy in front of sandboxes.
    pub edge: EdgeConfig,
    /// What sandboxes may reach.
    pub network: NetworkConfig,
    /// One table for each registry, by its name, for example `[registries."docker.io"]`: mirrors, credentials.
    #[cfg_attr(test, serde(skip_serializing))]
    pub registries: RegistryConfig,
    /// Limits on images.
    pub images: ImagesConfig,
    /// Present: this daemon is a region of a cloud.
    pub region: Option<RegionConfig>,
}

/// `[edge]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[cfg_attr(test, derive(serde::Serialize))]
pub struct EdgeConfig {
    /// Address to listen at.
    pub listen: IpAddr,
    /// First port to try; 0 lets the system choose one, which is then kept.
    pub port: u16,
    /// Host names of sandboxes end with a dot and this.
    pub base_domain: String,
    /// How long an app may take until the head of its answer.
    pub timeout_seconds: f64,
    /// Proxies in front of the edge, as addresses with prefix lengths, whose word on who asks is taken.
    pub trusted_proxies: Vec<String>,
}

/// `[network]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[cfg_attr(test, derive(serde::Serialize))]
pub struct NetworkConfig {
    /// Whether sandboxes have a network at all.
    pub enabled: bool,
    /// Private ranges that sandboxes may reach all the same.
    pub allow: Vec<String>,
    /// Whether sandboxes take over the certificate authorities that were added to this host and its proxy variables;
    /// when absent they do, unless this daemon is a region.
    pub take_over_host_settings: Option<bool>,
    /// Files with further certificate authorities for sandboxes, in PEM.
    pub certificates: Vec<PathBuf>,
}

/// `[images]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[cfg_attr(test, derive(serde::Serialize))]
pub struct ImagesConfig {
    /// Registries that accounts of a server may pull from; `*` allows all at public addresses.
    pub allowed_registries: Vec<String>,
    /// Unused images from registries are evicted while all images together are larger than this, in GiB.
    pub budget_gib: u32,
    /// Pulls of one account in an hour.
    pub pulls_per_hour: NonZeroU32,
}

/// `[region]`: where a cloud's servers are listened to, and how the two know each other. Every key is needed; paths are
/// absolute, or begin at the home.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(serde::Serialize))]
pub struct RegionConfig {
    /// Address and port to listen at.
    pub listen: SocketAddr,
    /// Our certificate and what leads to its authority, in PEM.
    pub certificate: PathBuf,
    /// Its private key, in PEM.
    pub key: PathBuf,
    /// Authorities whose clients may ask for accounts, in PEM.
    pub client_ca: PathBuf,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            default_image: "ubuntu:24.04".into(),
            regions: vec!["US".into()],
            templates: true,
            reserve: heyvm_vm::qemu::Settings::default().reserve,
            template_memory_mib: None,
            template_disk_gib: None,
            edge: EdgeConfig::default(),
            network: NetworkConfig::default(),
            registries: RegistryConfig::default(),
            images: ImagesConfig::default(),
            region: None,
        }
    }
}

impl Default for ImagesConfig {
    fn default() -> Self {
        let limits = ImageLimits::default();
        Self {
            allowed_registries: DEFAULT_ALLOWED_REGISTRIES.map(str::to_owned).to_vec(),
            budget_gib: u32::try_from(limits.budget_bytes >> 30).unwrap_or(u32::MAX),
            pulls_per_hour: limits.pulls_per_hour,
        }
    }
}

impl ImagesConfig {
    /// As the control plane counts.
    pub fn limits(&self) -> ImageLimits {
        ImageLimits { budget_bytes: u64::from(self.budget_gib) << 30, pulls_per_hour: self.pulls_per_hour }
    }
}

impl Default for EdgeConfig {
    fn default() -> Self {
        Self {
            listen: IpAddr::from([127, 0, 0, 1]),
            port: 8480,
            base_domain: "localhost".into(),
            timeout_seconds: 60.0,
            trusted_proxies: Vec::new(),
        }
    }
}

impl EdgeConfig {
    /// The ranges of `trusted_proxies`; `None` if one of them is none.
    pub fn trusted_proxies(&self) -> Option<Vec<heyvm_edge::IpNet>> {
        self.trusted_proxies.iter().map(|range| range.parse().ok()).collect()
    }
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self { enabled: true, allow: Vec::new(), take_over_host_settings: None, certificates: Vec::new() }
    }
}

impl Config {
    /// Reads `config.toml`; the defaults where there is none.
    pub fn read(home: &Path) -> Result<Self, Error> {
        let path = home.join("config.toml");
        let problem = |problem: String| Error::Config { path: path.clone(), problem };
        let mut config: Self = read_toml(&path, false)?;
        if let Some(region) = &mut config.region {
            for file in [&mut region.certificate, &mut region.key, &mut region.client_ca] {
                *file = home.join(&file);
            }
        }
        if let Some(exposed) = config.registries.exposed_by(&path) {
            tracing::warn!("{exposed}");
        }
        config.checked().map_err(|text| problem(text.into()))
    }

    fn checked(self) -> Result<Self, &'static str> {
        check_domain(&self.edge.base_domain)?;
        if !(self.edge.timeout_seconds > 0.0 && self.edge.timeout_seconds <= 86_400.0) {
            return Err("edge.timeout_seconds must be more than 0 and at most 86400");
        }
        if self.edge.trusted_proxies().is_none() {
            return Err("edge.trusted_proxies must hold ranges such as \"10.0.0.0/8\"");
        }
        if self.regions.is_empty() || self.regions.iter().any(String::is_empty) {
            return Err("regions must name at least one region");
        }
        if self.default_image.is_empty() {
            return Err("default_image must name an image");
        }
        Ok(self)
    }
}

/// A file of settings; the defaults where there is none and none must be.
#[expect(clippy::disallowed_methods, reason = "runs at the start, before anybody is served")]
pub fn read_toml<T: DeserializeOwned + Default>(path: &Path, must_be_there: bool) -> Result<T, Error> {
    let problem = |problem: String| Error::Config { path: path.to_owned(), problem };
    let text = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && !must_be_there => return Ok(T::default()),
        other => other.map_err(|error| problem(error.to_string()))?,
    };
    // The parser's own text quotes the line, which may hold a password.
    toml::from_str(&text).map_err(|error| {
        let place = error.span().map(|span| place(&text, span.start)).unwrap_or_default();
        problem(format!("{place}{}", error.message()))
    })
}

/// A base domain, as URLs have it.
pub fn check_domain(domain: &str) -> Result<(), &'static str> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c);
    if domain.is_empty() || domain.starts_with('.') || domain.ends_with('.') || !domain.chars().all(allowed) {
        return Err("edge.base_domain is no domain name in lower case");
    }
    Ok(())
}

/// Line and key of a byte of the file, without the value.
fn place(text: &str, byte: usize) -> String {
    let before = text.get(..byte).unwrap_or_default();
    let number = before.matches('\n').count();
    let key = text.lines().nth(number).and_then(|line| line.split_once('='));
    let key = key.map(|(key, _)| format!(" ({})", key.trim())).unwrap_or_default();
    format!("line {}{key}: ", number + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, String> {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("config.toml"), text).unwrap();
        Config::read(home.path()).map_err(|error| error.to_string())
    }

    #[test]
    fn everything_is_optional() {
        let home = tempfile::tempdir().unwrap();
        assert_eq!(Config::read(home.path()).unwrap().edge.port, 8480);
        let config = read("[edge]\nport = 0\ntimeout_seconds = 2\n[network]\nallow = [\"10.0.0.0/8\"]").unwrap();
        assert_eq!((config.edge.port, config.edge.base_domain.as_str()), (0, "localhost"));
        assert!(config.network.enabled);
    }

    #[test]
    fn a_key_nobody_knows_is_named() {
        for (text, key) in [("colour = 1", "colour"), ("[edge]\nprot = 1", "prot"), ("[edge]\nport = 70000", "port")] {
            let error = read(text).unwrap_err();
            assert!(error.contains(key) && error.contains("config.toml"), "{error}");
        }
        let incomplete = read("[region]\nlisten = \"127.0.0.1:1\"\ncertificate = \"a\"\nkey = \"b\"").unwrap_err();
        assert!(incomplete.contains("client_ca"), "{incomplete}");
        assert!(read("[edge]\nbase_domain = \"Bad Domain\"").is_err());
        assert!(read("[edge]\ntimeout_seconds = 0").is_err());
        assert!(read("[edge]\ntrusted_proxies = [\"10.0.0.1\"]").unwrap_err().contains("trusted_proxies"));
        assert_eq!(
            read("[edge]\ntrusted_proxies = [\"10.0.0.0/8\"]").unwrap().edge.trusted_proxies().unwrap().len(),
            1
        );
    }
}
