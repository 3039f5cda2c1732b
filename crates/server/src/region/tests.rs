//! Real TLS between the typed client and the listener.

use std::{fs, net::SocketAddr, os::unix::fs::PermissionsExt, path::Path, sync::Arc, time::Duration};

use axum::{Router, routing::get};
use heyvm_api::client::{Client, Remote, Server};
use http::HeaderMap;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::{
    ClientConfig, RootCertStore, SupportedProtocolVersion,
    pki_types::{CertificateDer, PrivateKeyDer},
    version::{TLS12, TLS13},
};

use super::*;

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: rcgen::Certificate,
}

struct Leaf {
    certificate: rcgen::Certificate,
    key: KeyPair,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        Self { issuer: Issuer::new(params, key), certificate }
    }

    fn leaf(&self, change: impl FnOnce(&mut CertificateParams)) -> Leaf {
        let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        Leaf { certificate: params.signed_by(&key, &self.issuer).unwrap(), key }
    }
}

/// A region's files, and the authorities behind them.
struct Place {
    dir: tempfile::TempDir,
    own: Authority,
    clients: Authority,
}

impl Place {
    fn new() -> Self {
        let place = Self { dir: tempfile::tempdir().unwrap(), own: Authority::new(), clients: Authority::new() };
        place.certify(&place.own.leaf(|_| {}));
        place.write("ca.pem", &place.clients.certificate.pem());
        place
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.dir.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn certify(&self, leaf: &Leaf) {
        self.write("cert.pem", &leaf.certificate.pem());
        self.write("key.pem", &leaf.key.serialize_pem());
    }

    fn config(&self) -> RegionConfig {
        let path = |name: &str| self.dir.path().join(name);
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        RegionConfig { listen, certificate: path("cert.pem"), key: path("key.pem"), client_ca: path("ca.pem") }
    }

    async fn serve(&self) -> u16 {
        let region = Region::listen(&self.config()).await.unwrap();
        let port = region.listener.local_addr().unwrap().port();
        let whom = |headers: HeaderMap| async move { format!("{:?}", headers[headers::ACCOUNT].to_str().unwrap()) };
        let api = Router::new().route("/health", get(|| async { "\"ok\"" })).route("/whom", get(whom));
        tokio::spawn(region.serve(api, CancellationToken::new()));
        port
    }

    fn client(&self, port: u16, leaf: Option<&Leaf>, version: &'static SupportedProtocolVersion) -> Client {
        client(port, &self.own.certificate, leaf, version)
    }
}

fn client(
    port: u16,
    trusted: &rcgen::Certificate,
    leaf: Option<&Leaf>,
    version: &'static SupportedProtocolVersion,
) -> Client {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.der().clone()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
    let builder = builder.with_protocol_versions(&[version]).unwrap().with_root_certificates(roots);
    let tls = match leaf {
        None => builder.with_no_client_auth(),
        Some(leaf) => {
            let chain: Vec<CertificateDer> = vec![leaf.certificate.der().clone()];
            let key = PrivateKeyDer::try_from(leaf.key.serialize_der()).unwrap();
            builder.with_client_auth_cert(chain, key).unwrap()
        }
    };
    let url = format!("https://localhost:{port}").parse().unwrap();
    Client::new(Server::Remote(Remote { url, tls: Some(Arc::new(tls)) }))
}

#[tokio::test]
async fn who_has_a_certificate_of_the_authority_asks_for_an_account() {
    let place = Place::new();
    let port = place.serve().await;
    let client = place.client(port, Some(&place.clients.leaf(|_| {})), &TLS13);
    assert_eq!(client.get::<String>("/health").await.unwrap(), "ok");
    let unnamed = client.get::<String>("/whom").await.unwrap_err();
    assert!(unnamed.message.contains("account") && unnamed.hint.unwrap().contains("heyvm-account"));
    let named = client.for_account("acme").unwrap();
    assert_eq!(named.get::<String>("/whom").await.unwrap(), "acme");
}

#[tokio::test]
async fn nobody_else_gets_as_far_as_http() {
    let place = Place::new();
    let port = place.serve().await;
    let good = place.clients.leaf(|_| {});
    let others = Authority::new().leaf(|_| {});
    let expired = place.clients.leaf(|params| params.not_after = date_time_ymd(2020, 1, 1));
    let not_yet = place.clients.leaf(|params| params.not_before = date_time_ymd(4000, 1, 1));
    let own = place.own.leaf(|_| {});
    let strangers = [
        (None, &TLS13),
        (Some(&others), &TLS13),
        (Some(&expired), &TLS13),
        (Some(&not_yet), &TLS13),
        (Some(&own), &TLS13),
        (Some(&good), &TLS12),
    ];
    for (number, (leaf, version)) in strangers.into_iter().enumerate() {
        let answer = place.client(port, leaf, version).get::<String>("/health").await;
        assert!(answer.is_err(), "{number}: {answer:?}");
    }
    let plain = Remote { url: format!("http://localhost:{port}").parse().unwrap(), tls: None };
    assert!(Client::new(Server::Remote(plain)).get::<String>("/health").await.is_err());
    assert!(place.client(port, Some(&good), &TLS13).get::<String>("/health").await.is_ok());
}

#[tokio::test]
async fn a_rotated_certificate_needs_no_restart() {
    let place = Place::new();
    let port = place.serve().await;
    let leaf = place.clients.leaf(|_| {});
    let newer = Authority::new();
    assert!(place.client(port, Some(&leaf), &TLS13).get::<String>("/health").await.is_ok());
    // A file that is half written leaves the last good one in use.
    place.write("cert.pem", "-----BEGIN CERT");
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert!(place.client(port, Some(&leaf), &TLS13).get::<String>("/health").await.is_ok());
    place.certify(&newer.leaf(|_| {}));
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert!(place.client(port, Some(&leaf), &TLS13).get::<String>("/health").await.is_err());
    assert!(client(port, &newer.certificate, Some(&leaf), &TLS13).get::<String>("/health").await.is_ok());
    // And an authority that is no longer trusted is not, from the next connection on.
    place.write("ca.pem", &newer.certificate.pem());
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert!(client(port, &newer.certificate, Some(&leaf), &TLS13).get::<String>("/health").await.is_err());
}

#[tokio::test]
async fn what_cannot_be_used_is_named() {
    type Breaking = fn(&Place, &Path);
    let broken: [(&str, Breaking); 6] = [
        ("region.certificate", |_, dir| fs::remove_file(dir.join("cert.pem")).unwrap()),
        ("region.key", |place, _| place.write("key.pem", "no key")),
        ("region.key", |_, dir| fs::set_permissions(dir.join("key.pem"), fs::Permissions::from_mode(0o644)).unwrap()),
        ("region.client_ca", |place, _| place.write("ca.pem", "")),
        ("region.certificate", |place, _| place.write("key.pem", &place.own.leaf(|_| {}).key.serialize_pem())),
        ("region.client_ca", |_, dir| fs::remove_file(dir.join("ca.pem")).unwrap()),
    ];
    for (key, breaking) in broken {
        let place = Place::new();
        breaking(&place, place.dir.path());
        let error = Region::listen(&place.config()).await.err().unwrap().to_string();
        assert!(error.contains(key), "{key}: {error}");
    }
}
