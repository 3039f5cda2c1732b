//! Servers that stand in for apps in sandboxes, and the proxy in front of them.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use heyvm_edge::{Access, ByteStream, ConnectError, Doorkeeper, Edge, Route, Settings, Site, Upstreams};
use http::{Request, Response};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_util::sync::CancellationToken;

pub type Body = BoxBody<Bytes, hyper::Error>;

/// Which subdomain is what.
#[derive(Clone)]
pub enum Place {
    /// A server at this address; the sandbox's name.
    At(SocketAddr, &'static str),
    /// The same, for members of the account alone.
    Private(SocketAddr, &'static str, &'static str),
    /// A server that may take this long to begin an answer.
    Slow(SocketAddr, &'static str, Duration),
    Fails(ConnectError),
}

#[derive(Default)]
pub struct Sandboxes {
    pub places: Mutex<HashMap<String, Place>>,
    pub connections: AtomicUsize,
}

#[async_trait]
impl Upstreams for Sandboxes {
    async fn route(&self, subdomain: &str) -> Result<Route, ConnectError> {
        match self.places.lock().unwrap().get(subdomain) {
            Some(Place::At(address, sandbox)) => Ok(Route {
                sandbox: (*sandbox).into(),
                port: address.port(),
                access: Access::Public,
                response_timeout: None,
            }),
            Some(Place::Private(address, sandbox, account)) => {
                let access = Access::Members { account: (*account).into() };
                Ok(Route { sandbox: (*sandbox).into(), port: address.port(), access, response_timeout: None })
            }
            Some(Place::Slow(address, sandbox, time)) => Ok(Route {
                sandbox: (*sandbox).into(),
                port: address.port(),
                access: Access::Public,
                response_timeout: Some(*time),
            }),
            Some(Place::Fails(ConnectError::NothingListens(port))) => {
                Ok(Route { sandbox: "f".into(), port: *port, access: Access::Public, response_timeout: None })
            }
            Some(Place::Fails(error)) => Err(error.clone()),
            None => Err(ConnectError::UnknownSubdomain),
        }
    }

    async fn connect(&self, route: &Route) -> Result<Box<dyn ByteStream>, ConnectError> {
        let leads_there = |place: &&Place| match place {
            Place::At(address, sandbox) | Place::Private(address, sandbox, _) | Place::Slow(address, sandbox, _) => {
                *sandbox == route.sandbox && address.port() == route.port
            }
            Place::Fails(error) => *error == ConnectError::NothingListens(route.port),
        };
        let place = self.places.lock().unwrap().values().find(leads_there).cloned();
        match place {
            Some(Place::At(address, _) | Place::Private(address, ..) | Place::Slow(address, ..)) => {
                self.connections.fetch_add(1, Ordering::SeqCst);
                let stream = TcpStream::connect(address).await.map_err(|e| ConnectError::Unreachable(e.to_string()))?;
                Ok(Box::new(stream))
            }
            Some(Place::Fails(error)) => Err(error),
            None => Err(ConnectError::UnknownSubdomain),
        }
    }
}

pub fn edge(
    places: &[(&str, Place)],
    doorkeeper: Option<Arc<dyn Doorkeeper>>,
    site: Option<Arc<dyn Site>>,
    settings: Settings,
) -> (Arc<Edge>, Arc<Sandboxes>) {
    let sandboxes = Arc::new(Sandboxes::default());
    for (subdomain, place) in places {
        sandboxes.places.lock().unwrap().insert((*subdomain).into(), place.clone());
    }
    let edge = Edge::with_site(Arc::clone(&sandboxes) as Arc<dyn Upstreams>, doorkeeper, site, settings);
    (edge, sandboxes)
}

/// A proxy that runs as long as its test.
pub struct Proxy {
    pub address: SocketAddr,
    pub sandboxes: Arc<Sandboxes>,
    pub shutdown: CancellationToken,
    pub served: tokio::task::JoinHandle<()>,
}

impl Proxy {
    pub async fn start(places: &[(&str, Place)], settings: Settings) -> Self {
        Self::with(places, None, None, settings).await
    }

    pub async fn with(
        places: &[(&str, Place)],
        doorkeeper: Option<Arc<dyn Doorkeeper>>,
        site: Option<Arc<dyn Site>>,
        settings: Settings,
    ) -> Self {
        let (edge, sandboxes) = edge(places, doorkeeper, site, settings);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let stop = shutdown.clone();
        let served = tokio::spawn(async move { edge.serve(listener, stop).await });
        Self { address, sandboxes, shutdown, served }
    }

    /// With one app, `app.localhost`.
    pub async fn of(app: SocketAddr) -> Self {
        Self::start(&[("app", Place::At(app, "s1"))], Settings::default()).await
    }

    pub fn connections(&self) -> usize {
        self.sandboxes.connections.load(Ordering::SeqCst)
    }

    pub async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// An HTTP/1.1 connection.
    pub async fn http1(&self) -> hyper::client::conn::http1::SendRequest<Body> {
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(self.connect().await)).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        sender
    }

    /// An HTTP/2 connection with prior knowledge.
    pub async fn http2(&self) -> hyper::client::conn::http2::SendRequest<Body> {
        let stream = TokioIo::new(self.connect().await);
        let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.unwrap();
        tokio::spawn(connection);
        sender
    }

    pub async fn send(&self, request: Request<Body>) -> Response<Incoming> {
        let mut sender = self.http1().await;
        let response = sender.send_request(request).await.unwrap();
        tokio::spawn(async move {
            // A body goes on coming as long as its connection is not given up.
            sender.ready().await.ok();
        });
        response
    }

    /// GET of a path of `app.localhost`: status and text.
    pub async fn get(&self, path: &str) -> (u16, String) {
        text(self.send(get("app.localhost", path)).await).await
    }

    /// Bytes sent as they are, and everything that came back until the end.
    pub async fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect().await;
        stream.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.ok();
        String::from_utf8_lossy(&answer).into_owned()
    }
}

pub fn get(host: &str, path: &str) -> Request<Body> {
    Request::get(path).header("host", host).body(empty()).unwrap()
}

pub fn empty() -> Body {
    full("")
}

pub fn full(text: impl Into<Bytes>) -> Body {
    Full::new(text.into()).map_err(|never| match never {}).boxed()
}

pub async fn text(response: Response<Incoming>) -> (u16, String) {
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8_lossy(&body).into_owned())
}

/// A server by HTTP/1.1 or HTTP/2, whichever is spoken to it.
pub async fn app<F, R>(answer: F) -> SocketAddr
where
    F: Fn(Request<Incoming>) -> R + Clone + Send + 'static,
    R: Future<Output = Response<Body>> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let answer = answer.clone();
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let answered = answer(request);
                    async move { Ok::<_, std::convert::Infallible>(answered.await) }
                });
                let builder = auto::Builder::new(TokioExecutor::new());
                builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await.ok();
            });
        }
    });
    address
}

/// A server that does with each connection what the test says.
pub async fn bare<F, R>(serve: F) -> SocketAddr
where
    F: Fn(TcpStream) -> R + Send + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(serve(stream));
        }
    });
    address
}

/// Reads a head up to its empty line.
pub async fn read_head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    Some(String::from_utf8_lossy(&head).into_owned())
}
