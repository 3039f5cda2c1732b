//! The edge proxy: the host name of a request decides which port of which sandbox answers it.
//!
//! - [`Edge`]: accepts connections and serves them.  `host`: which subdomain a request means.
//! - `forward`: one request on its way to a sandbox and its answer back.  `headers`: what is left out and what is set.
//! - `pool`: connections that are kept for later requests.  `body`: bodies on their way.  `tunnel`: upgraded connections.
//! - `limits`: what one sandbox may take of the host.  `refusal`: what is answered where no sandbox does.
//!
//! Nothing is buffered: a body's piece goes on as soon as it comes, and no faster than its reader takes it.
//! Visitors and sandboxes are both hostile input. Where a subdomain leads is asked of [`Upstreams`] for each request.
#![forbid(unsafe_code)]

mod body;
mod forward;
mod headers;
mod host;
mod limits;
mod pool;
mod refusal;
mod serve;
mod tunnel;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};

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
    /// How long a sandbox may take until the head of its answer; bodies may take any time.
    pub response_timeout: Duration,
    /// How long a visitor may take for the head of a request.
    pub header_timeout: Duration,
    /// How long an upgraded connection may be silent.
    pub tunnel_idle: Duration,
    /// Requests and upgraded connections that one sandbox may have at a time.
    pub requests_per_sandbox: usize,
    /// Visitors' connections in all.
    pub connections: usize,
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
            response_timeout: Duration::from_secs(60),
            header_timeout: Duration::from_secs(30),
            tunnel_idle: Duration::from_secs(60 * 60),
            requests_per_sandbox: 512,
            connections: 4096,
            idle_per_route: 16,
            idle_time: Duration::from_secs(60),
            grace: Duration::from_secs(5),
        }
    }
}

/// The proxy. Serves any number of listeners.
pub struct Edge {
    upstreams: Arc<dyn Upstreams>,
    settings: Settings,
    pool: Arc<pool::Pool>,
    limits: limits::Limits,
    visitors: Arc<tokio::sync::Semaphore>,
    /// Ends tunnels and connections that outlast the grace time.
    ending: tokio_util::sync::CancellationToken,
}

impl Edge {
    /// A proxy in front of `upstreams`.
    pub fn new(upstreams: Arc<dyn Upstreams>, settings: Settings) -> Arc<Self> {
        Arc::new(Self {
            pool: pool::Pool::new(settings.idle_per_route, settings.idle_time),
            limits: limits::Limits::new(settings.requests_per_sandbox),
            visitors: Arc::new(tokio::sync::Semaphore::new(settings.connections)),
            ending: tokio_util::sync::CancellationToken::new(),
            upstreams,
            settings,
        })
    }
}
