//! The edge proxy: the host name of a request decides which port of which sandbox answers it.
//!
//! - [`Edge`] (`serve`): accepts connections.  [`serve_connection`] (`connection`): serves one, for any service.
//!   `host`: which subdomain a request means.
//! - [`Tls`] (`tls`): the certificate, given or got by ACME.  `redirect`: the plain port beside it.
//! - `forward`: one request on its way to a sandbox and its answer back.  `headers`: what is left out and what is set.
//! - [`Doorkeeper`] (`door`): who may come in at a private endpoint.  `cookies`: what stays within one sandbox's host.
//! - [`Site`] (`site`): hosts of our own.  [`Visitor`] (`visitor`): who asks.  `websocket`: WebSocket over HTTP/2.
//! - `pool`: connections that are kept for later requests.  `body`: bodies on their way.  `tunnel`: upgraded connections.
//! - `client_io`: interim answers, and clients that take nothing.  `local`: a listener for one port of a sandbox.
//! - `limits`: what one sandbox or client may take of the host.  `refusal`: what is answered where no sandbox does.
//!
//! Nothing is buffered: a body's piece goes on as soon as it comes, and no faster than its reader takes it.
//! Visitors and sandboxes are both hostile input. Where a subdomain leads is asked of [`Upstreams`] for each request.
#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test may block its own thread"))]
#![forbid(unsafe_code)]

mod body;
mod client_io;
mod connection;
mod cookies;
mod door;
mod forward;
mod headers;
mod host;
mod limits;
mod local;
mod pool;
mod redirect;
mod refusal;
mod serve;
mod site;
mod tls;
pub mod tunnel;
mod visitor;
mod websocket;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};

pub use connection::{Patience, serve_connection};
pub use door::{Access, Doorkeeper, TOKEN_COOKIE, Verdict};
pub use ipnet::IpNet;
pub use local::LocalPort;
pub use site::{BodyError, Site, SiteBody};
pub use tls::{AcmeSettings, LETS_ENCRYPT, Tls, TlsError, TlsSettings};
pub use visitor::Visitor;

/// A byte stream to a port.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for T {}

/// Where a subdomain leads. Connections are reused for equal routes and no others.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Route {
    /// The sandbox's id.
    pub sandbox: String,
    /// Port in the sandbox.
    pub port: u16,
    /// Who may use it.
    pub access: Access,
    /// How long its app may take until the head of its answer, where that is not [`Settings::response_timeout`].
    pub response_timeout: Option<Duration>,
}

/// Why a request could not reach a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// No endpoint has this subdomain.
    #[error("no sandbox has this address")]
    UnknownSubdomain,
    /// The sandbox is there, but its VM is not running; says what it is instead.
    #[error("the sandbox is {0}")]
    NotRunning(String),
    /// Nothing listens on the port.
    #[error("nothing listens on port {0} in the sandbox")]
    NothingListens(u16),
    /// The sandbox does not answer; says why.
    #[error("the sandbox does not answer: {0}")]
    Unreachable(String),
}

/// Knows where subdomains lead, and the way there.
#[async_trait]
pub trait Upstreams: Send + Sync + 'static {
    /// Where the subdomain leads now. Asked for every request.
    async fn route(&self, subdomain: &str) -> Result<Route, ConnectError>;
    /// A new connection to a route.
    async fn connect(&self, route: &Route) -> Result<Box<dyn ByteStream>, ConnectError>;
}

/// Limits and time-outs.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Host names end with a dot and this.
    pub base_domain: String,
    /// Proxies in front of this one, whose word on who asks is taken.
    pub trusted_proxies: Vec<IpNet>,
    /// How long a sandbox may take until the head of its answer; bodies may take any time.
    pub response_timeout: Duration,
    /// How long a visitor may take for the head of a request.
    pub header_timeout: Duration,
    /// A visitor may be slow, but one who sends or takes nothing of a body for this long holds a place that others want.
    pub body_timeout: Duration,
    /// How long an HTTP/2 connection may be without any request.
    pub idle_timeout: Duration,
    /// How long a visitor may take for a TLS handshake.
    pub handshake_timeout: Duration,
    /// TLS handshakes at a time.
    pub handshakes: usize,
    /// How long an upgraded connection may be silent.
    pub tunnel_idle: Duration,
    /// Requests and upgraded connections that one sandbox may have at a time.
    pub requests_per_sandbox: usize,
    /// Visitors' connections in all.
    pub connections: usize,
    /// Connections of one visitor: an IPv4 address, or a /64 network of IPv6. Trusted proxies have as many as they want.
    pub connections_per_client: usize,
    /// Connections beyond [`connections`](Self::connections) for the site's hosts alone.
    pub connections_for_site: usize,
    /// Idle connections kept for one port of a sandbox.
    pub idle_per_route: usize,
    /// How long an idle connection is kept.
    pub idle_time: Duration,
    /// How long requests may go on after a shutdown was asked for.
    pub grace: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            base_domain: "localhost".into(),
            trusted_proxies: Vec::new(),
            response_timeout: Duration::from_secs(60),
            header_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(300),
            idle_timeout: Duration::from_secs(120),
            handshake_timeout: Duration::from_secs(10),
            handshakes: 512,
            tunnel_idle: Duration::from_secs(60 * 60),
            requests_per_sandbox: 512,
            connections: 4096,
            connections_per_client: 1024,
            connections_for_site: 256,
            idle_per_route: 64,
            // Node's servers end a connection that was idle for five seconds.
            idle_time: Duration::from_secs(4),
            grace: Duration::from_secs(5),
        }
    }
}

/// The proxy. Serves any number of listeners.
pub struct Edge {
    upstreams: Arc<dyn Upstreams>,
    doorkeeper: Option<Arc<dyn Doorkeeper>>,
    site: Option<Arc<dyn Site>>,
    /// The form of our own answers where none is asked for.
    unasked: refusal::Form,
    settings: Settings,
    pool: Arc<pool::Pool>,
    limits: limits::Limits,
    answers: limits::Stallables<body::FromSandbox>,
    visitors: Arc<tokio::sync::Semaphore>,
    visitors_of_site: Arc<tokio::sync::Semaphore>,
    clients: limits::Counts<limits::Client>,
    handshakes: Arc<tokio::sync::Semaphore>,
    /// Listeners that are served.
    listeners: std::sync::atomic::AtomicUsize,
    /// Ends tunnels and connections that outlast the grace time.
    ending: tokio_util::sync::CancellationToken,
}

impl Edge {
    /// A proxy in front of `upstreams`. Without a doorkeeper nobody comes in at private endpoints.
    pub fn new(
        upstreams: Arc<dyn Upstreams>,
        doorkeeper: Option<Arc<dyn Doorkeeper>>,
        settings: Settings,
    ) -> Arc<Self> {
        Self::with_site(upstreams, doorkeeper, None, settings)
    }

    /// The same, with hosts of our own.
    pub fn with_site(
        upstreams: Arc<dyn Upstreams>,
        doorkeeper: Option<Arc<dyn Doorkeeper>>,
        site: Option<Arc<dyn Site>>,
        settings: Settings,
    ) -> Arc<Self> {
        Arc::new(Self::build(upstreams, doorkeeper, site, settings))
    }

    /// No sandboxes, and a site that has every host: an API, say, whose errors are JSON. It is kept from hostile requests
    /// as sandboxes are.
    pub fn of_site(site: Arc<dyn Site>, settings: Settings) -> Arc<Self> {
        let edge = Self::build(Arc::new(NoSandboxes), None, Some(site), settings);
        Arc::new(Self { unasked: refusal::Form::Json, ..edge })
    }

    fn build(
        upstreams: Arc<dyn Upstreams>,
        doorkeeper: Option<Arc<dyn Doorkeeper>>,
        site: Option<Arc<dyn Site>>,
        settings: Settings,
    ) -> Self {
        Self {
            pool: pool::Pool::new(settings.idle_per_route, settings.idle_time),
            limits: limits::Limits::new(settings.requests_per_sandbox),
            answers: limits::Stallables::new(),
            visitors: Arc::new(tokio::sync::Semaphore::new(settings.connections)),
            visitors_of_site: Arc::new(tokio::sync::Semaphore::new(match site {
                Some(_) => settings.connections_for_site,
                None => 0,
            })),
            clients: limits::Counts::new(),
            handshakes: Arc::new(tokio::sync::Semaphore::new(settings.handshakes)),
            listeners: std::sync::atomic::AtomicUsize::new(0),
            ending: tokio_util::sync::CancellationToken::new(),
            upstreams,
            doorkeeper,
            site,
            unasked: refusal::Form::Text,
            settings,
        }
    }
}

/// What is behind a site alone.
struct NoSandboxes;

#[async_trait]
impl Upstreams for NoSandboxes {
    async fn route(&self, _: &str) -> Result<Route, ConnectError> {
        Err(ConnectError::UnknownSubdomain)
    }

    async fn connect(&self, _: &Route) -> Result<Box<dyn ByteStream>, ConnectError> {
        Err(ConnectError::UnknownSubdomain)
    }
}
