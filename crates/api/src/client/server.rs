//! Where a server is, how it is connected to, and how it is told of when it does not answer.

use std::{
    fmt, io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use http::{StatusCode, Uri};
use hyper_util::{
    client::legacy::connect::{Connected, Connection as PooledConnection},
    rt::TokioIo,
};
use nix::sys::socket::{setsockopt, sockopt};
use rustls::{ClientConfig, pki_types::ServerName};
use rustls_platform_verifier::BuilderVerifierExt;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::TlsConnector;
use url::Url;

use crate::{ApiError, ErrorCode, error::ErrorBody};

/// A server that is further away does not answer.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// A server that acknowledges nothing of what it was sent for so long is cut off, in milliseconds.
const SILENCE: u32 = 10_000;

/// A byte stream to the server.
pub trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

impl PooledConnection for Box<dyn Connection> {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

/// Where the server listens.
#[derive(Debug, Clone)]
pub enum Server {
    /// A Unix socket; its path may be longer than an address holds.
    Socket(PathBuf),
    /// A server by its URL.
    Remote(Remote),
}

/// A server by its URL.
#[derive(Clone)]
pub struct Remote {
    /// `http` or `https`; its path stands before every call's. User name and password in it count for nothing.
    pub url: Url,
    /// Whom to trust and who we are; absent: whom this machine trusts (`SSL_CERT_FILE` names others), and nobody.
    pub tls: Option<Arc<ClientConfig>>,
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Remote").field("url", &self.shown()).finish_non_exhaustive()
    }
}

impl Remote {
    /// Without user name, password and query.
    fn shown(&self) -> String {
        format!("{}{}", self.url.origin().ascii_serialization(), self.url.path().trim_end_matches('/'))
    }

    async fn connect(&self) -> io::Result<Box<dyn Connection>> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
        let tls = match self.url.scheme() {
            "http" => None,
            "https" => Some(self.tls_config()?),
            _ => return Err(invalid("its URL begins with neither http:// nor https://")),
        };
        let host = self.url.host_str().ok_or_else(|| invalid("its URL names no host"))?;
        // Brackets are the URL's, not the address's.
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = self.url.port_or_known_default().unwrap_or_default();
        let stream = TcpStream::connect((host.as_str(), port)).await?;
        stream.set_nodelay(true)?;
        notice_silence(&stream)?;
        let Some(tls) = tls else { return Ok(Box::new(stream)) };
        let name = ServerName::try_from(host).map_err(|_| invalid("its URL's host is no name for TLS"))?;
        Ok(Box::new(TlsConnector::from(tls).connect(name, stream).await?))
    }

    fn tls_config(&self) -> io::Result<Arc<ClientConfig>> {
        static OF_THE_MACHINE: OnceLock<Arc<ClientConfig>> = OnceLock::new();
        let mut config = match (&self.tls, OF_THE_MACHINE.get()) {
            (Some(given), _) if given.alpn_protocols == [HTTP_1_1] => return Ok(Arc::clone(given)),
            (Some(given), _) => ClientConfig::clone(given),
            (None, Some(made)) => return Ok(Arc::clone(made)),
            (None, None) => machines_own().map_err(io::Error::other)?,
        };
        // WebSockets and byte streams are upgrades of a connection, which HTTP/2 does not have.
        config.alpn_protocols = vec![HTTP_1_1.to_vec()];
        let config = Arc::new(config);
        Ok(if self.tls.is_some() { config } else { Arc::clone(OF_THE_MACHINE.get_or_init(|| config)) })
    }
}

/// Has a connection fail some ten seconds after the other side went silent. Without it one that was cut in the middle
/// would be waited for a quarter of an hour, and for ever by a side that has nothing to say.
pub fn notice_silence(stream: &TcpStream) -> io::Result<()> {
    setsockopt(stream, sockopt::TcpUserTimeout, &SILENCE)?;
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &(SILENCE / 1000))?;
    setsockopt(stream, sockopt::TcpKeepInterval, &3)?;
    Ok(())
}

const HTTP_1_1: &[u8] = b"http/1.1";

fn machines_own() -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(builder.with_platform_verifier()?.with_no_client_auth())
}

impl Server {
    /// Connects.
    pub async fn connect(&self) -> io::Result<Box<dyn Connection>> {
        match self {
            Self::Socket(path) => Ok(Box::new(connect_unix(path).await?)),
            Self::Remote(remote) => {
                let late = |_| io::Error::new(io::ErrorKind::TimedOut, "no answer in time");
                tokio::time::timeout(CONNECT_DEADLINE, remote.connect()).await.map_err(late)?
            }
        }
    }

    /// What stands before every path: scheme, host, base path.
    pub(super) fn base(&self) -> String {
        match self {
            Self::Socket(_) => "http://localhost".into(),
            Self::Remote(remote) => remote.shown(),
        }
    }

    fn name(&self) -> String {
        match self {
            Self::Socket(_) => "the daemon".into(),
            Self::Remote(remote) => format!("the server at {}", remote.shown()),
        }
    }

    pub(super) fn unreachable(&self, error: &io::Error) -> ApiError {
        let tls = error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>());
        let hint = match self {
            Self::Socket(_) => "heyvm daemon restart starts it anew".to_owned(),
            Self::Remote(_) if tls => {
                "its certificate must come from an authority that this machine trusts; SSL_CERT_FILE names others"
                    .into()
            }
            Self::Remote(_) => {
                "is the address right, does the server run, and does a firewall let it be reached?".into()
            }
        };
        let message = format!("{} cannot be reached: {error}", self.name());
        ApiError::new(ErrorCode::DaemonUnavailable, message).hint(hint)
    }

    /// It takes connections and says nothing.
    pub(super) fn silent(&self) -> ApiError {
        let hint = match self {
            Self::Socket(_) => {
                "Run `heyvm daemon status`: it names the process, which may be stopped or hang.".to_owned()
            }
            Self::Remote(_) => "Try again later, or ask the operator of the server.".into(),
        };
        ApiError::new(ErrorCode::DaemonUnavailable, format!("{} does not answer", self.name())).hint(hint)
    }

    /// The answer ended early, or is none of heyvm's.
    pub(super) fn broken(&self, why: impl fmt::Display) -> ApiError {
        let hint = match self {
            Self::Socket(_) => "heyvm daemon status tells whether it runs; its log is daemon.log in ~/.heyo".to_owned(),
            Self::Remote(remote) => format!("{}/health tells whether a heyvm server is there", remote.shown()),
        };
        let message = format!("the answer of {} broke off: {why}", self.name());
        ApiError::new(ErrorCode::DaemonUnavailable, message).hint(hint)
    }

    /// An answer that is an error: ours, or that of a proxy that stands before it.
    pub(super) fn error_of(&self, status: StatusCode, body: &[u8]) -> ApiError {
        if let Ok(body) = serde_json::from_slice::<ErrorBody>(body) {
            return body.error;
        }
        let code = match status.as_u16() {
            401 => ErrorCode::Unauthorized,
            403 => ErrorCode::Forbidden,
            404 => ErrorCode::NotFound,
            413 => ErrorCode::TooLarge,
            502..=504 => ErrorCode::DaemonUnavailable,
            _ => ErrorCode::Internal,
        };
        let message = format!("{} answered {status} without saying why", self.name());
        let error = ApiError::new(code, message);
        match self {
            Self::Socket(_) => error,
            Self::Remote(remote) => error.hint(format!(
                "that is no heyvm server's answer: is {} its address, and what is the proxy before it doing?",
                remote.shown()
            )),
        }
    }
}

/// The pool's way to a new connection. Where to is the server's to know, not the URI's.
impl tower::Service<Uri> for Server {
    type Response = TokioIo<Box<dyn Connection>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let server = self.clone();
        Box::pin(async move { server.connect().await.map(TokioIo::new) })
    }
}

/// Connects to a Unix socket through its directory's descriptor: addresses hold 107 bytes, paths are longer.
async fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    let dir = std::fs::File::open(path.parent().unwrap_or(Path::new("/")))?;
    let name = path.file_name().unwrap_or_default();
    UnixStream::connect(Path::new(&format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name)).await
}
