//! An edge with TLS, apps behind it, and people with accounts.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use async_trait::async_trait;
use axum::{Router, extract::Request, response::IntoResponse};
use heyvm_api::{ApiError, ErrorCode};
use heyvm_edge::{
    Access, ByteStream, ConnectError, Doorkeeper, Edge, Route, Settings, Tls, TlsSettings, Upstreams, Verdict,
};
use heyvm_server::{
    cloud::login::{Accounts, LoginPage, Session},
    pages::Pages,
};
use http::{HeaderMap, Method};
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_util::sync::CancellationToken;
use url::Url;

/// Chromium finds every name below `localhost` on this machine, and shares cookies below this one.
pub const BASE: &str = "heyo.localhost";
pub const PASSWORD: &str = "correct-horse";

const SCRIPT: &str = "<script>document.title = 'scripts run'</script>";

/// Tokens are `tok-` and the person.
#[derive(Default)]
struct People {
    ended: AtomicUsize,
}

#[async_trait]
impl Accounts for People {
    async fn log_in(&self, email: &str, password: &str, from: IpAddr) -> Result<Session, ApiError> {
        assert!(from.is_loopback());
        let person = email.strip_suffix("@example.org").unwrap_or_default();
        if person == "busy" {
            return Err(ApiError::new(ErrorCode::Forbidden, "too many logins").hint("wait a minute"));
        }
        if password != PASSWORD || !["alice", "mallory"].contains(&person) {
            return Err(ApiError::new(ErrorCode::Unauthorized, "wrong e-mail or password"));
        }
        Ok(Session { token: format!("tok-{person}"), expires_in: 3600 })
    }

    async fn log_out(&self, token: &str) -> Result<(), ApiError> {
        assert!(token.starts_with("tok-"));
        self.ended.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

struct Keeper(Arc<LoginPage>);

#[async_trait]
impl Doorkeeper for Keeper {
    async fn admit(&self, credential: &str, account: &str) -> Verdict {
        match credential.strip_prefix("tok-") {
            None => Verdict::Unknown,
            Some(person) if person == account => Verdict::Welcome,
            Some(_) => Verdict::Stranger,
        }
    }

    fn is_ours(&self, credential: &str) -> bool {
        credential.starts_with("tok-")
    }

    fn login_url(&self, return_to: &str) -> Option<String> {
        Some(self.0.login_url(return_to))
    }
}

/// One app behind all names.
struct Apps {
    routes: HashMap<&'static str, Access>,
    address: SocketAddr,
}

#[async_trait]
impl Upstreams for Apps {
    async fn route(&self, subdomain: &str) -> Result<Route, ConnectError> {
        let access = self.routes.get(subdomain).cloned().ok_or(ConnectError::UnknownSubdomain)?;
        Ok(Route { sandbox: subdomain.into(), port: self.address.port(), access, response_timeout: None })
    }

    async fn connect(&self, _: &Route) -> Result<Box<dyn ByteStream>, ConnectError> {
        let stream = TcpStream::connect(self.address).await.map_err(|e| ConnectError::Unreachable(e.to_string()))?;
        Ok(Box::new(stream))
    }
}

pub struct Cloud {
    address: SocketAddr,
    root: CertificateDer<'static>,
    people: Arc<People>,
    posted: Arc<AtomicUsize>,
    ending: CancellationToken,
}

impl Drop for Cloud {
    fn drop(&mut self) {
        self.ending.cancel();
    }
}

/// Shows the headers it got, counts what is posted, and sets cookies as far as it is let.
async fn app(posted: Arc<AtomicUsize>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let answer = move |request: Request| {
        let posted = Arc::clone(&posted);
        async move {
            if request.method() == Method::POST {
                posted.fetch_add(1, Ordering::SeqCst);
            }
            let host = request.headers()["host"].to_str().unwrap().to_owned();
            let name = host.split('.').next().unwrap_or_default().to_owned();
            let mut headers = HeaderMap::new();
            headers.insert("content-type", "text/html; charset=utf-8".parse().unwrap());
            if name == "evil" {
                for cookie in [
                    "__heyo_token=tok-mallory; Domain=heyo.localhost; Path=/",
                    "tossed=1; Domain=heyo.localhost; Path=/",
                    "own=1; Path=/",
                ] {
                    headers.append("set-cookie", cookie.parse().unwrap());
                }
                headers.insert("clear-site-data", "\"cookies\"".parse().unwrap());
            }
            (headers, format!("<h1>{name} answers</h1><pre>{:?}</pre>{SCRIPT}", request.headers())).into_response()
        }
    };
    tokio::spawn(async move { axum::serve(listener, Router::new().fallback(answer)).await });
    address
}

fn certificate(directory: &std::path::Path) -> (TlsSettings, CertificateDer<'static>) {
    let key = KeyPair::generate().unwrap();
    let names = [BASE.to_owned(), format!("*.{BASE}")];
    let certificate = CertificateParams::new(names).unwrap().self_signed(&key).unwrap();
    let (chain, path) = (directory.join("chain.pem"), directory.join("key.pem"));
    std::fs::write(&chain, certificate.pem()).unwrap();
    std::fs::write(&path, key.serialize_pem()).unwrap();
    (TlsSettings::Certificate { chain, key: path }, certificate.der().clone())
}

impl Cloud {
    pub async fn start() -> Self {
        let (posted, people) = (Arc::new(AtomicUsize::new(0)), Arc::new(People::default()));
        let address = app(Arc::clone(&posted)).await;
        let alice = || Access::Members { account: "alice".into() };
        let bob = Access::Members { account: "bob".into() };
        let routes = [("mine", alice()), ("also-mine", alice()), ("theirs", bob), ("evil", Access::Public)]
            .into_iter()
            .collect();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let here = listener.local_addr().unwrap();
        let url = Url::parse(&format!("https://login.{BASE}:{}/", here.port())).unwrap();
        let page = LoginPage::new(Arc::clone(&people) as Arc<dyn Accounts>, BASE, url);
        let site = Pages::new(vec![BASE.into(), format!("login.{BASE}")], page.router());
        let settings = Settings { base_domain: BASE.into(), ..Settings::default() };
        let edge = Edge::with_site(
            Arc::new(Apps { routes, address }),
            Some(Arc::new(Keeper(page))),
            Some(Arc::new(site)),
            settings,
        );
        let files = tempfile::tempdir().unwrap();
        let (settings, root) = certificate(files.path());
        let tls = Tls::open(settings).unwrap().unwrap();
        let ending = CancellationToken::new();
        let stop = ending.clone();
        tokio::spawn(async move { edge.serve_tls(listener, tls, stop).await });
        Self { address: here, root, people, posted, ending }
    }

    pub fn origin(&self, name: &str) -> String {
        format!("https://{name}.{BASE}:{}", self.address.port())
    }

    pub fn url(&self, name: &str, path: &str) -> String {
        format!("{}{path}", self.origin(name))
    }

    /// Sessions that were ended.
    pub fn ended(&self) -> usize {
        self.people.ended.load(Ordering::SeqCst)
    }

    /// Requests that were posted to apps.
    pub fn posted(&self) -> usize {
        self.posted.load(Ordering::SeqCst)
    }

    /// One request as it stands, and the whole answer.
    pub async fn send(&self, method: &str, name: &str, path: &str, headers: &[(&str, &str)], body: &str) -> String {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.root.clone()).unwrap();
        let config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let stream = TcpStream::connect(self.address).await.unwrap();
        let server = ServerName::try_from(format!("{name}.{BASE}")).unwrap();
        let mut stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(server, stream).await.unwrap();
        let mut request = format!(
            "{method} {path} HTTP/1.1\r\nhost: {name}.{BASE}:{}\r\nconnection: close\r\ncontent-length: {}\r\n\
             content-type: application/x-www-form-urlencoded\r\n",
            self.address.port(),
            body.len()
        );
        for (name, value) in headers {
            request += &format!("{name}: {value}\r\n");
        }
        request += &format!("\r\n{body}");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.ok();
        String::from_utf8_lossy(&answer).into_owned()
    }
}
