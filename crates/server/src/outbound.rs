//! How this host reaches the internet: certificate authorities that were added to it, and proxies. Sandboxes take them
//! over, so that `pip install` works in them where it works on the host.
#![expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, ToSocketAddrs},
    path::{Path, PathBuf},
};

use heyvm_control_plane::GuestDefaults;
use url::{Host, Url};

use crate::config::NetworkConfig;

/// Where distributions have administrators put authorities: Debian and Ubuntu, Fedora, openSUSE, Arch.
const ADDED: [&str; 4] = [
    "/usr/local/share/ca-certificates",
    "/etc/pki/ca-trust/source/anchors",
    "/etc/pki/trust/anchors",
    "/etc/ca-certificates/trust-source/anchors",
];
/// More than this is no handful of additions.
const MAX_CERTIFICATES: usize = 256 << 10;
const MAX_DEPTH: usize = 4;
const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";
const PROXIES: [&str; 3] = ["http_proxy", "https_proxy", "all_proxy"];

/// What sandboxes take over.
#[derive(Debug, Default)]
pub struct Outbound {
    /// Certificates and variables for guests, and what does not work in them.
    pub guest: GuestDefaults,
    /// Proxies in private networks, which guests must be let through to.
    pub allow: Vec<String>,
}

impl Outbound {
    /// Looks at the host, unless that is switched off.
    pub fn of_host(config: &NetworkConfig, is_region: bool) -> Self {
        let mut outbound = Self::default();
        let mut certificates = Certificates::default();
        for path in &config.certificates {
            if certificates.read(path) == 0 {
                outbound.guest.problems.push(format!("{} (network.certificates) holds no certificate", path.display()));
            }
        }
        if config.enabled && config.take_over_host_settings.unwrap_or(!is_region) {
            for dir in ADDED {
                certificates.search(Path::new(dir), MAX_DEPTH);
            }
            outbound.take_over_proxies(|name| std::env::var(name).ok(), resolve);
        }
        outbound.guest.certificates = certificates.all;
        outbound
    }

    fn take_over_proxies(
        &mut self,
        variable: impl Fn(&str) -> Option<String>,
        resolve: impl Fn(&str, u16) -> Vec<IpAddr>,
    ) {
        let set = |name: &str| {
            let value = variable(name).or_else(|| variable(&name.to_ascii_uppercase()));
            value.filter(|value| !value.is_empty() && !value.contains('\0'))
        };
        let mut taken = BTreeMap::new();
        for name in PROXIES {
            let Some(value) = set(name) else { continue };
            // curl and others take a proxy without a scheme.
            let url = if value.contains("://") { value.clone() } else { format!("http://{value}") };
            let Ok(url) = url.parse::<Url>() else { continue };
            let port = url.port_or_known_default().unwrap_or(1080);
            let addresses = match url.host() {
                Some(Host::Ipv4(address)) => vec![IpAddr::V4(address)],
                Some(Host::Ipv6(address)) => vec![IpAddr::V6(address)],
                Some(Host::Domain(name)) => resolve(name, port),
                None => continue,
            };
            if addresses.iter().any(IpAddr::is_loopback) {
                self.guest.problems.push(format!(
                    "{name} is on this host's loopback, where sandboxes do not get: they go without a proxy"
                ));
                continue;
            }
            let private = addresses.iter().filter_map(|address| match address {
                IpAddr::V4(address) if address.is_private() || is_shared(address.octets()) => Some(address),
                _ => None,
            });
            self.allow.extend(private.map(|address| format!("{address}/32")));
            taken.insert(name.to_owned(), value);
        }
        if taken.is_empty() {
            return;
        }
        let mut direct = set("no_proxy").unwrap_or_default();
        for own in ["localhost", "127.0.0.1", "::1"] {
            if !direct.split(',').any(|known| known.trim() == own) {
                direct = if direct.is_empty() { own.into() } else { format!("{direct},{own}") };
            }
        }
        taken.insert("no_proxy".into(), direct);
        self.allow.sort();
        self.allow.dedup();
        // Some programs know the names in upper case alone, curl http_proxy in lower case alone.
        let upper: Vec<_> = taken.iter().map(|(name, value)| (name.to_ascii_uppercase(), value.clone())).collect();
        self.guest.env = taken.into_iter().chain(upper).collect();
    }
}

fn is_shared([a, b, ..]: [u8; 4]) -> bool {
    a == 100 && (64..128).contains(&b)
}

fn resolve(name: &str, port: u16) -> Vec<IpAddr> {
    (name, port).to_socket_addrs().map(|found| found.map(|address| address.ip()).collect()).unwrap_or_default()
}

/// Certificates found so far, each once.
#[derive(Debug, Default)]
struct Certificates {
    all: String,
}

impl Certificates {
    /// Takes what is in the files below a directory.
    fn search(&mut self, dir: &Path, depth: usize) {
        let mut entries: Vec<PathBuf> =
            fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        entries.sort();
        for path in entries {
            match fs::metadata(&path) {
                Ok(meta) if meta.is_dir() && depth > 0 => self.search(&path, depth - 1),
                Ok(meta) if meta.is_file() => drop(self.read(&path)),
                _ => {}
            }
        }
    }

    /// Takes the certificates of a file; answers how many it holds.
    fn read(&mut self, path: &Path) -> usize {
        let is_small = fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() <= MAX_CERTIFICATES as u64);
        let text = if is_small { fs::read(path).unwrap_or_default() } else { Vec::new() };
        let text = String::from_utf8_lossy(&text);
        let mut found = 0;
        for piece in text.split(BEGIN).skip(1) {
            let Some((body, _)) = piece.split_once(END) else { continue };
            if !body.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+/=\r\n ".contains(&byte)) {
                continue;
            }
            found += 1;
            let body: String =
                body.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n");
            let certificate = format!("{BEGIN}\n{body}\n{END}\n");
            if !self.all.contains(&certificate) && self.all.len() + certificate.len() <= MAX_CERTIFICATES {
                self.all.push_str(&certificate);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(variables: &[(&str, &str)]) -> Outbound {
        let mut outbound = Outbound::default();
        let known =
            |wanted: &str| variables.iter().find(|(name, _)| *name == wanted).map(|(_, value)| (*value).to_owned());
        outbound.take_over_proxies(known, |name, _| match name {
            "proxy.corp" => vec!["10.1.2.3".parse().unwrap()],
            _ => Vec::new(),
        });
        outbound
    }

    #[test]
    fn proxies_are_taken_over_in_both_spellings() {
        let outbound = taken(&[("HTTPS_PROXY", "http://user:pw@proxy.corp:3128"), ("no_proxy", "corp,localhost")]);
        let value =
            |name: &str| outbound.guest.env.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
        for name in ["HTTPS_PROXY", "https_proxy"] {
            assert_eq!(value(name), Some("http://user:pw@proxy.corp:3128"));
        }
        assert_eq!(value("NO_PROXY"), Some("corp,localhost,127.0.0.1,::1"));
        assert_eq!(value("http_proxy"), None);
        assert_eq!(outbound.allow, ["10.1.2.3/32"], "a private network is closed to guests otherwise");
        assert!(outbound.guest.problems.is_empty());
    }

    #[test]
    fn a_proxy_on_loopback_is_reported_and_left_out() {
        for url in ["http://127.0.0.1:3128", "127.0.0.1:3128", "http://[::1]:3128"] {
            let outbound = taken(&[("http_proxy", url)]);
            assert!(outbound.guest.env.is_empty() && outbound.guest.problems[0].contains("http_proxy"), "{url}");
        }
        assert!(taken(&[]).guest.env.is_empty());
    }

    #[test]
    fn certificates_are_found_below_a_directory_each_once() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        let certificate = |body: &str| format!("{BEGIN}\r\n{body}\r\n{END}\r\n");
        fs::write(dir.path().join("a.crt"), format!("# ours\n{}{}", certificate("AAAA"), certificate("BBBB"))).unwrap();
        fs::write(dir.path().join("sub/b.pem"), certificate("AAAA")).unwrap();
        fs::write(dir.path().join("broken.crt"), format!("{BEGIN}\n<script>\n{END}\n{BEGIN}\nCC")).unwrap();
        let mut certificates = Certificates::default();
        certificates.search(dir.path(), MAX_DEPTH);
        assert_eq!(certificates.all, certificate("AAAA").replace('\r', "") + &certificate("BBBB").replace('\r', ""));
    }

    #[test]
    fn a_region_takes_nothing_over_but_what_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.crt");
        fs::write(&file, format!("{BEGIN}\nAAAA\n{END}\n")).unwrap();
        let config = NetworkConfig { certificates: vec![file, "/nowhere.crt".into()], ..NetworkConfig::default() };
        let outbound = Outbound::of_host(&config, true);
        assert_eq!(outbound.guest.certificates.matches(BEGIN).count(), 1);
        assert!(outbound.guest.env.is_empty() && outbound.guest.problems.len() == 1);
    }
}
