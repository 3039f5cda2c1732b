//! `config.toml`: what the user may decide. All of it is optional; a key nobody knows is an error that names it.

use std::{io, net::IpAddr, path::Path};

use heyvm_images::RegistryConfig;
use serde::Deserialize;

use crate::Error;

/// The whole file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Image of sandboxes that ask for none.
    pub default_image: String,
    /// Regions this daemon serves; the first is the default.
    pub regions: Vec<String>,
    /// Whether sandboxes begin as clones of a template; without, each boots its kernel.
    pub templates: bool,
    /// How many VMs of the kind last asked for are kept in reserve.
    pub reserve: usize,
    /// The proxy in front of sandboxes.
    pub edge: EdgeConfig,
    /// What sandboxes may reach.
    pub network: NetworkConfig,
    /// Registries: mirrors, credentials.
    pub registries: RegistryConfig,
}

/// `[edge]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EdgeConfig {
    /// Address to listen at.
    pub listen: IpAddr,
    /// First port to try; 0 lets the system choose one, which is then kept.
    pub port: u16,
    /// Host names of sandboxes end with a dot and this.
    pub base_domain: String,
    /// How long an app may take until the head of its answer.
    pub timeout_seconds: f64,
}

/// `[network]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkConfig {
    /// Whether sandboxes have a network at all.
    pub enabled: bool,
    /// Private ranges that sandboxes may reach all the same.
    pub allow: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            default_image: "ubuntu:24.04".into(),
            regions: vec!["US".into()],
            templates: true,
            reserve: heyvm_vm::qemu::Settings::default().reserve,
            edge: EdgeConfig::default(),
            network: NetworkConfig::default(),
            registries: RegistryConfig::default(),
        }
    }
}

impl Default for EdgeConfig {
    fn default() -> Self {
        Self {
            listen: IpAddr::from([127, 0, 0, 1]),
            port: 8480,
            base_domain: "localhost".into(),
            timeout_seconds: 60.0,
        }
    }
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self { enabled: true, allow: Vec::new() }
    }
}

impl Config {
    /// Reads `config.toml`; the defaults where there is none.
    pub fn read(home: &Path) -> Result<Self, Error> {
        let path = home.join("config.toml");
        let problem = |problem: String| Error::Config { path: path.clone(), problem };
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            other => other.map_err(|error| problem(error.to_string()))?,
        };
        // The parser's own text quotes the line, which may hold a password.
        let config: Self = toml::from_str(&text).map_err(|error| {
            let place = error.span().map(|span| place(&text, span.start)).unwrap_or_default();
            problem(format!("{place}{}", error.message()))
        })?;
        if let Some(exposed) = config.registries.exposed_by(&path) {
            tracing::warn!("{exposed}");
        }
        config.checked().map_err(|text| problem(text.into()))
    }

    fn checked(self) -> Result<Self, &'static str> {
        let domain = &self.edge.base_domain;
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c);
        if domain.is_empty() || domain.starts_with('.') || domain.ends_with('.') || !domain.chars().all(allowed) {
            return Err("edge.base_domain is no domain name in lower case");
        }
        if !(self.edge.timeout_seconds > 0.0 && self.edge.timeout_seconds <= 86_400.0) {
            return Err("edge.timeout_seconds must be more than 0 and at most 86400");
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
        assert!(read("[edge]\nbase_domain = \"Bad Domain\"").is_err());
        assert!(read("[edge]\ntimeout_seconds = 0").is_err());
    }
}
