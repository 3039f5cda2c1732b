//! TLS: handshakes, certificates that change, the plain port beside it.

use std::{
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{SinkExt, StreamExt};
use heyvm_edge::{Edge, Settings, Tls, TlsSettings};
use http::Request;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{
    ClientConfig, RootCertStore, SupportedProtocolVersion,
    crypto::ring,
    pki_types::{CertificateDer, ServerName},
    version,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::tungstenite::Message;
use tokio_util::sync::CancellationToken;

use crate::{protocols::mirror, support::*};

/// A certificate authority of our own.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn issue(&self, directory: &Path) -> TlsSettings {
        let key = KeyPair::generate().unwrap();
        let names = ["app.localhost", "other.localhost", "localhost"].map(str::to_owned);
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &self.0).unwrap();
        std::fs::write(directory.join("chain.pem"), certificate.pem() + &self.0.pem()).unwrap();
        std::fs::write(directory.join("key.pem"), key.serialize_pem()).unwrap();
        TlsSettings::Certificate { chain: directory.join("chain.pem"), key: directory.join("key.pem") }
    }

    fn root(&self) -> CertificateDer<'static> {
        self.0.der().clone()
    }
}

/// A client that trusts `root`, speaks these versions and wants this protocol.
pub fn client(
    root: CertificateDer<'static>,
    versions: &[&'static SupportedProtocolVersion],
    alpn: &str,
) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(root).unwrap();
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
    TlsConnector::from(Arc::new(config))
}

pub const ALL: &[&SupportedProtocolVersion] = &[&version::TLS13, &version::TLS12];

pub async fn handshake(
    connector: &TlsConnector,
    address: SocketAddr,
    name: &str,
) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    connector.connect(ServerName::try_from(name.to_owned()).unwrap(), stream).await
}

pub fn serial(stream: &TlsStream<TcpStream>) -> Vec<u8> {
    let certificate = &stream.get_ref().1.peer_certificates().unwrap()[0];
    x509_parser::parse_x509_certificate(certificate).unwrap().1.raw_serial().to_vec()
}

/// A TLS listener, and a plain one beside it.
pub struct Served {
    pub tls: SocketAddr,
    pub plain: SocketAddr,
    pub ending: CancellationToken,
}

impl Served {
    pub async fn start(edge: Arc<Edge>, tls: Arc<Tls>, plain: TcpListener) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, plain_address) = (listener.local_addr().unwrap(), plain.local_addr().unwrap());
        let ending = CancellationToken::new();
        let (e, t, stop) = (Arc::clone(&edge), Arc::clone(&tls), ending.clone());
        tokio::spawn(async move { e.serve_tls(listener, t, stop).await });
        let (t, stop) = (Arc::clone(&tls), ending.clone());
        tokio::spawn(async move { edge.serve_redirects(plain, t, address.port(), stop).await });
        let stop = ending.clone();
        tokio::spawn(async move { tls.maintain(stop).await });
        Self { tls: address, plain: plain_address, ending }
    }
}

struct Site {
    served: Served,
    authority: Authority,
    files: tempfile::TempDir,
}

async fn site(app: SocketAddr, settings: Settings) -> Site {
    let (authority, files) = (Authority::new(), tempfile::tempdir().unwrap());
    let tls = Tls::open(authority.issue(files.path())).unwrap().unwrap();
    let (edge, _) = edge(&[("app", Place::At(app, "s1"))], None, None, settings);
    let served = Served::start(edge, tls, TcpListener::bind("127.0.0.1:0").await.unwrap()).await;
    Site { served, authority, files }
}

async fn http1(stream: TlsStream<TcpStream>) -> hyper::client::conn::http1::SendRequest<Body> {
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection.with_upgrades());
    sender
}

#[tokio::test]
async fn both_versions_and_both_protocols_are_served_and_the_app_is_told() {
    let site = site(app(mirror).await, Settings::default()).await;
    for (versions, version) in [(&[&version::TLS12][..], "TLSv1_2"), (&[&version::TLS13], "TLSv1_3")] {
        for protocol in ["h2", "http/1.1"] {
            let connector = client(site.authority.root(), versions, protocol);
            let stream = handshake(&connector, site.served.tls, "app.localhost").await.unwrap();
            assert_eq!(format!("{:?}", stream.get_ref().1.protocol_version().unwrap()), version);
            assert_eq!(stream.get_ref().1.alpn_protocol(), Some(protocol.as_bytes()));
            let (status, told) = if protocol == "h2" {
                let (mut sender, connection) =
                    hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
                tokio::spawn(connection);
                let request = Request::get("https://app.localhost/").body(empty()).unwrap();
                text(sender.send_request(request).await.unwrap()).await
            } else {
                text(http1(stream).await.send_request(get("app.localhost", "/")).await.unwrap()).await
            };
            assert_eq!(status, 200);
            for line in ["x-forwarded-proto: https", "x-forwarded-port: 443", "proto=https"] {
                assert!(told.contains(line), "{told}");
            }
        }
    }
}

#[tokio::test]
async fn the_host_decides_whatever_name_the_handshake_had() {
    let site = site(app(mirror).await, Settings::default()).await;
    let connector = client(site.authority.root(), ALL, "http/1.1");
    for (name, host, status) in [
        ("other.localhost", "app.localhost", 200),
        ("app.localhost", "other.localhost", 404),
        ("app.localhost", "app.example.org", 404),
    ] {
        let mut sender = http1(handshake(&connector, site.served.tls, name).await.unwrap()).await;
        assert_eq!(sender.send_request(get(host, "/")).await.unwrap().status(), status, "{name} {host}");
    }
}

#[tokio::test]
async fn websockets_go_through_tls() {
    let echo = bare(|stream| async move {
        let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
        while let Some(Ok(message)) = socket.next().await {
            if message.is_close() || socket.send(message).await.is_err() {
                break;
            }
        }
    })
    .await;
    let site = site(echo, Settings::default()).await;
    let connector = client(site.authority.root(), ALL, "http/1.1");
    let stream = handshake(&connector, site.served.tls, "app.localhost").await.unwrap();
    let (mut socket, _) = tokio_tungstenite::client_async("wss://app.localhost/", stream).await.unwrap();
    socket.send(Message::text("hello")).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::text("hello"));
}

#[tokio::test]
async fn a_changed_certificate_is_served_and_a_broken_one_is_not() {
    let site = site(app(mirror).await, Settings::default()).await;
    let connector = client(site.authority.root(), ALL, "http/1.1");
    let now = async || serial(&handshake(&connector, site.served.tls, "app.localhost").await.unwrap());
    let stream = handshake(&connector, site.served.tls, "app.localhost").await.unwrap();
    let (first, mut kept) = (serial(&stream), http1(stream).await);
    assert_eq!(kept.send_request(get("app.localhost", "/")).await.unwrap().status(), 200);

    std::fs::write(site.files.path().join("chain.pem"), "not a certificate").unwrap();
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(now().await, first);

    site.authority.issue(site.files.path());
    let end = Instant::now() + Duration::from_secs(15);
    while now().await == first {
        assert!(Instant::now() < end, "the new certificate is served");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    kept.ready().await.unwrap();
    assert_eq!(kept.send_request(get("app.localhost", "/")).await.unwrap().status(), 200, "connections go on");
}

#[tokio::test]
async fn a_certificate_that_cannot_be_used_is_an_error_that_names_the_file() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let authority = Authority::new();
    authority.issue(one.path());
    authority.issue(two.path());
    let chain = one.path().join("chain.pem");
    let error = |key| {
        let opened = Tls::open(TlsSettings::Certificate { chain: chain.clone(), key });
        opened.err().expect("this cannot be used").to_string()
    };
    let text = error(two.path().join("key.pem"));
    assert!(text.contains("chain.pem") && text.contains("cannot be used"), "{text}");
    let text = error(one.path().join("missing.pem"));
    assert!(text.contains("missing.pem"), "{text}");
    std::fs::write(one.path().join("key.pem"), "-----BEGIN NONSENSE-----").unwrap();
    assert!(error(one.path().join("key.pem")).contains("no private key"));
    assert!(Tls::open(TlsSettings::Off).unwrap().is_none());
}

#[tokio::test]
async fn handshakes_that_do_not_end_take_little_room_and_not_for_long() {
    let settings = Settings { handshake_timeout: Duration::from_millis(600), handshakes: 2, ..Settings::default() };
    let site = site(app(mirror).await, settings).await;
    let started = Instant::now();
    let mut slow = Vec::new();
    // Those who say nothing take no room at all.
    let silent = [&b""[..]; 4];
    let begun = [&b"GET / HTTP/1.1\r\nhost: app.localhost\r\n\r\n"[..], b"\x16\x03\x01", b"\x16\x03\x01"];
    for beginning in silent.into_iter().chain(begun) {
        let mut stream = TcpStream::connect(site.served.tls).await.unwrap();
        stream.write_all(beginning).await.unwrap();
        slow.push(stream);
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let connector = client(site.authority.root(), ALL, "http/1.1");
    let mut sender = http1(handshake(&connector, site.served.tls, "app.localhost").await.unwrap()).await;
    assert!(started.elapsed() >= Duration::from_millis(500), "its turn comes when a slow one's time is over");
    assert_eq!(sender.send_request(get("app.localhost", "/")).await.unwrap().status(), 200);
    for mut stream in slow {
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "the connection ends");
        assert!(!rest.starts_with(b"HTTP"), "plain HTTP is not answered here");
    }
}

#[tokio::test]
async fn the_plain_port_leads_to_tls() {
    let site = site(app(mirror).await, Settings::default()).await;
    let port = site.served.tls.port();
    for (host, path, status, location) in [
        ("app.localhost", "/a?b=c", 308, format!("https://app.localhost:{port}/a?b=c")),
        ("App.Localhost:8080", "/", 308, format!("https://app.localhost:{port}/")),
        ("localhost", "/", 308, format!("https://localhost:{port}/")),
        ("example.org", "/", 404, String::new()),
        ("a.b.localhost", "/", 404, String::new()),
        ("app.localhost/x", "/", 400, String::new()),
        ("app.localhost", "//example.org", 308, format!("https://app.localhost:{port}//example.org")),
        (
            "app.localhost",
            "/.well-known/acme-challenge/unknown",
            308,
            format!("https://app.localhost:{port}/.well-known/acme-challenge/unknown"),
        ),
    ] {
        let mut stream = TcpStream::connect(site.served.plain).await.unwrap();
        let request = format!("POST {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{host}{path}: {answer}");
        let led = answer.lines().find_map(|line| line.strip_prefix("location: ")).unwrap_or_default();
        assert_eq!(led, location);
    }
}

#[tokio::test]
async fn a_shutdown_ends_both_ports() {
    let site = site(app(mirror).await, Settings::default()).await;
    site.served.ending.cancel();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(TcpStream::connect(site.served.tls).await.is_err());
    assert!(TcpStream::connect(site.served.plain).await.is_err());
}
