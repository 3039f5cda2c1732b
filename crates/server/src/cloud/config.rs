//! `server.toml`: what an operator decides. A key nobody knows is an error that names it.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use heyvm_cloud::{Quotas, RegionConfig, Way};
use heyvm_edge::{AcmeSettings, IpNet, TlsSettings};
use serde::Deserialize;
use url::Url;

use crate::Error;

/// The whole file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[cfg_attr(test, derive(serde::Serialize))]
pub struct ServerConfig {
    /// `postgres://…`, or the path of an SQLite database; `server.db` in the home when absent.
    pub store: Option<String>,
    /// Where the API listens in plain HTTP. Clients elsewhere reach it through the edge, at `api.BASE_DOMAIN`.
    pub listen: SocketAddr,
    /// How clients reach the API, where it is neither of these.
    pub public_url: Option<Url>,
    /// Whether something in front of it speaks TLS: then it may listen for others, too.
    pub behind_proxy: bool,
    /// Name of a region made of this machine's own daemon, used where no other region is named.
    pub local_region: String,
    /// The proxy in front of sandboxes.
    pub edge: EdgeConfig,
    /// Where archives are kept; in `server-archives` in the home when absent.
    #[cfg_attr(test, serde(skip_serializing))]
    pub archives: Option<heyvm_archives::Settings>,
    /// Limits of accounts that have none of their own.
    #[cfg_attr(test, serde(skip_serializing))]
    pub quotas: Quotas,
    /// The regions; the first is the default.
    #[serde(rename = "region")]
    pub regions: Vec<RegionTable>,
    /// Tokens.
    pub tokens: TokensConfig,
}

/// A certificate chain and its key, PEM.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(serde::Serialize))]
pub struct TlsFiles {
    /// The chain.
    pub certificate: PathBuf,
    /// The key.
    pub key: PathBuf,
}

/// `[edge]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[cfg_attr(test, derive(serde::Serialize))]
pub struct EdgeConfig {
    /// Address to listen at.
    pub listen: IpAddr,
    /// Port to listen at; 0 lets the system choose one.
    pub port: u16,
    /// Host names of sandboxes end with a dot and this.
    pub base_domain: String,
    /// Port in URLs, where it is not the one that is listened at.
    pub public_port: Option<u16>,
    /// With TLS: a plain port beside it that leads there, and at which a certificate authority looks.
    pub http_port: Option<u16>,
    /// Proxies in front, whose word on who asks is taken: addresses or ranges.
    pub trusted_proxies: Vec<IpNet>,
    /// How long an app may take until the head of its answer.
    pub timeout_seconds: f64,
    /// TLS with a certificate for the base domain and `*.` below it.
    pub tls: Option<TlsFiles>,
    /// TLS with a certificate that an authority gives.
    pub acme: Option<AcmeConfig>,
}

/// `[edge.acme]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(serde::Serialize))]
pub struct AcmeConfig {
    /// URL of the authority's directory; Let's Encrypt's when absent.
    #[serde(default)]
    directory: Option<String>,
    /// A PEM file of the root that the authority's own certificate comes from; the system's when absent.
    #[serde(default)]
    trusted_root: Option<PathBuf>,
    /// `mailto:` URLs for its warnings.
    #[serde(default)]
    contacts: Vec<String>,
    /// That you agree to its terms of service.
    terms_agreed: bool,
    /// Run as `PROGRAM add|remove NAME VALUE` to make DNS records, without which there is no wildcard.
    dns_hook: PathBuf,
}

/// `[[region]]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(serde::Serialize))]
pub struct RegionTable {
    /// `US`, `EU` or a word of the operator's.
    pub name: String,
    /// `https://HOST:PORT` of its daemon's trusted listener.
    pub url: Url,
    /// Who may be that daemon.
    pub ca: PathBuf,
    /// Who we are to it.
    pub certificate: PathBuf,
    /// The key to that.
    pub key: PathBuf,
}

/// `[tokens]`
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[cfg_attr(test, derive(serde::Serialize))]
pub struct TokensConfig {
    /// How long an access token is valid, in seconds.
    pub lifetime_seconds: u64,
    /// How long a login lasts without being used.
    pub session_seconds: u64,
    /// How often the signing key changes.
    pub key_rotation_seconds: u64,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            store: None,
            listen: SocketAddr::from(([127, 0, 0, 1], 4445)),
            public_url: None,
            behind_proxy: false,
            local_region: "US".into(),
            edge: EdgeConfig::default(),
            archives: None,
            quotas: Quotas::default(),
            regions: Vec::new(),
            tokens: TokensConfig::default(),
        }
    }
}

impl Default for EdgeConfig {
    fn default() -> Self {
        Self {
            listen: IpAddr::from([127, 0, 0, 1]),
            port: 8490,
            base_domain: "localhost".into(),
            public_port: None,
            http_port: None,
            trusted_proxies: Vec::new(),
            timeout_seconds: 60.0,
            tls: None,
            acme: None,
        }
    }
}

impl Default for TokensConfig {
    fn default() -> Self {
        Self { lifetime_seconds: 3600, session_seconds: 30 * 24 * 3600, key_rotation_seconds: 30 * 24 * 3600 }
    }
}

impl ServerConfig {
    /// Reads the file at `path`; without one, `server.toml` of the home, or the defaults where there is none.
    pub fn read(home: &Path, path: Option<&Path>) -> Result<Self, Error> {
        let file = path.map_or_else(|| home.join("server.toml"), Path::to_owned);
        let config = crate::config::read_toml(&file, path.is_some())?;
        Self::checked(config).map_err(|problem| Error::Config { path: file, problem })
    }

    fn checked(self) -> Result<Self, String> {
        crate::config::check_domain(&self.edge.base_domain)?;
        if self.edge.tls.is_some() && self.edge.acme.is_some() {
            return Err("edge.tls and edge.acme exclude each other".into());
        }
        if !(self.edge.timeout_seconds > 0.0 && self.edge.timeout_seconds <= 86_400.0) {
            return Err("edge.timeout_seconds must be more than 0 and at most 86400".into());
        }
        if !self.listen.ip().is_loopback() && !self.behind_proxy {
            return Err(format!(
                "listen = \"{}\" would send tokens in the clear: use a loopback address (the edge serves the API over TLS \
                 at api.{}), or set behind_proxy = true where a proxy in front speaks TLS",
                self.listen, self.edge.base_domain
            ));
        }
        let mut names: Vec<_> = self.regions.iter().map(|region| region.name.to_ascii_uppercase()).collect();
        names.sort();
        names.dedup();
        if names.len() != self.regions.len() || names.iter().any(String::is_empty) || self.local_region.is_empty() {
            return Err("every region needs a name of its own".into());
        }
        if let Some(region) = self.regions.iter().find(|region| region.url.scheme() != "https") {
            return Err(format!("the url of region {} does not begin with https://", region.name));
        }
        Ok(self)
    }

    /// Where the store is.
    pub fn store_location(&self, home: &Path) -> String {
        self.store.clone().unwrap_or_else(|| home.join("server.db").display().to_string())
    }

    /// Where archives are kept.
    pub fn archive_settings(&self, home: &Path) -> heyvm_archives::Settings {
        let own = || heyvm_archives::Settings::Directory(home.join("server-archives"));
        self.archives.clone().unwrap_or_else(own)
    }

    /// The regions as the cloud takes them: those named, else this machine.
    pub fn regions(&self, home: &Path) -> Vec<RegionConfig> {
        if self.regions.is_empty() {
            let way = Way::Local(home.join("run/daemon.sock"));
            return vec![RegionConfig { name: self.local_region.clone(), way }];
        }
        let each = |region: &RegionTable| RegionConfig {
            name: region.name.clone(),
            way: Way::Remote {
                url: region.url.clone(),
                ca: region.ca.clone(),
                certificate: region.certificate.clone(),
                key: region.key.clone(),
            },
        };
        self.regions.iter().map(each).collect()
    }
}

impl EdgeConfig {
    /// Whether URLs begin with `https`.
    pub fn is_secure(&self) -> bool {
        self.tls.is_some() || self.acme.is_some()
    }

    /// Where the certificate comes from.
    pub fn tls_settings(&self, home: &Path) -> TlsSettings {
        match (&self.tls, &self.acme) {
            (Some(files), _) => TlsSettings::Certificate { chain: files.certificate.clone(), key: files.key.clone() },
            (None, Some(acme)) => {
                let names = vec![self.base_domain.clone(), format!("*.{}", self.base_domain)];
                let mut settings = AcmeSettings::new(names, home.join("acme"));
                if let Some(directory) = &acme.directory {
                    settings.directory.clone_from(directory);
                }
                TlsSettings::Acme(AcmeSettings {
                    trusted_root: acme.trusted_root.clone(),
                    contacts: acme.contacts.clone(),
                    terms_agreed: acme.terms_agreed,
                    dns_hook: Some(acme.dns_hook.clone()),
                    ..settings
                })
            }
            (None, None) => TlsSettings::Off,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<ServerConfig, String> {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("server.toml"), text).unwrap();
        ServerConfig::read(home.path(), None).map_err(|error| error.to_string())
    }

    #[test]
    fn everything_is_optional() {
        let config = read("").unwrap();
        assert_eq!((config.listen.port(), config.edge.base_domain.as_str()), (4445, "localhost"));
        let home = Path::new("/home");
        assert!(matches!(&config.regions(home)[..], [RegionConfig { name, way: Way::Local(_) }] if name == "US"));
        assert_eq!(config.store_location(home), "/home/server.db");
        assert!(ServerConfig::read(home, Some(Path::new("/nonexistent.toml"))).is_err());
    }

    #[test]
    fn what_would_give_secrets_away_is_refused() {
        assert!(read("listen = \"0.0.0.0:80\"").unwrap_err().contains("behind_proxy"));
        assert!(read("listen = \"0.0.0.0:80\"\nbehind_proxy = true").is_ok());
        let region = |url: &str| {
            read(&format!("[[region]]\nname = \"US\"\nurl = \"{url}\"\nca = \"a\"\ncertificate = \"b\"\nkey = \"c\""))
        };
        assert!(region("http://10.0.0.1").unwrap_err().contains("https"));
        assert!(region("https://10.0.0.1:7443").is_ok());
        let error = read("store = \"postgres://user:secret@db\"\nstroe = 1").unwrap_err();
        assert!(error.contains("stroe") && !error.contains("secret"), "{error}");
    }

    #[test]
    fn regions_have_names_of_their_own() {
        let one = "[[region]]\nname = \"US\"\nurl = \"https://a\"\nca = \"a\"\ncertificate = \"b\"\nkey = \"c\"\n";
        assert!(read(&format!("{one}{}", one.replace("US", "us"))).unwrap_err().contains("name of its own"));
        assert_eq!(read(&format!("{one}{}", one.replace("US", "EU"))).unwrap().regions.len(), 2);
    }
}
