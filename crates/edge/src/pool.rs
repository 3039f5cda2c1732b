//! Connections to sandboxes that are kept for later requests: each new one costs the guest time.
//!
//! A connection serves one route for its whole life. HTTP/1.1 connections are lent to one request at a time;
//! an HTTP/2 connection is shared.

use std::{
    collections::HashMap,
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use http::{HeaderMap, HeaderName};
use hyper::client::conn::{http1, http2};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use crate::{ByteStream, Route, body::RequestBody};

/// The sending half of an HTTP/2 connection.
pub type Sender2 = http2::SendRequest<RequestBody>;

/// How long a connection may take to become ready after its answer has ended.
const SETTLE: Duration = Duration::from_secs(2);
/// A connection is given up this long before the app says that it will.
const MARGIN: Duration = Duration::from_secs(1);

/// Idle connections.
pub struct Pool {
    idle_per_route: usize,
    idle_time: Duration,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    http1: HashMap<Route, Vec<Idle>>,
    http2: HashMap<Route, (Sender2, Instant)>,
}

struct Idle {
    connection: Connection1,
    until: Instant,
}

/// An HTTP/1.1 connection to an app.
pub struct Connection1 {
    /// Its sending half.
    pub sender: http1::SendRequest<RequestBody>,
    answered: Arc<AtomicBool>,
}

impl Connection1 {
    /// A connection whose stream notes in `answered` that something came.
    pub fn new(sender: http1::SendRequest<RequestBody>, answered: Arc<AtomicBool>) -> Self {
        Self { sender, answered }
    }

    /// Whether a byte has come from the app since the connection was taken from the pool.
    pub fn has_answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed)
    }
}

/// A stream to an app that notes whether a byte has come.
pub struct Watched {
    /// The stream.
    pub inner: Box<dyn ByteStream>,
    /// Set with the first byte.
    pub answered: Arc<AtomicBool>,
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut *self.inner).poll_read(cx, buffer))?;
        if buffer.filled().len() > before {
            self.answered.store(true, Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.inner).poll_write(cx, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.inner).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.inner).poll_shutdown(cx)
    }
}

/// An HTTP/1.1 connection that is in use. Dropping it ends the connection.
pub struct Lease {
    connection: Connection1,
    route: Route,
    idle_time: Duration,
    pool: Weak<Pool>,
}

impl Pool {
    /// Keeps at most `idle_per_route` connections of a route, each for at most `idle_time`.
    pub fn new(idle_per_route: usize, idle_time: Duration) -> Arc<Self> {
        Arc::new(Self { idle_per_route, idle_time, kept: Mutex::default() })
    }

    /// An idle connection: the one last used.
    pub fn take(&self, route: &Route) -> Option<Connection1> {
        let mut kept = self.lock();
        let idle = kept.http1.get_mut(route)?;
        let now = Instant::now();
        while let Some(Idle { connection, until }) = idle.pop() {
            if connection.sender.is_ready() && now < until {
                connection.answered.store(false, Ordering::Relaxed);
                return Some(connection);
            }
        }
        None
    }

    /// The HTTP/2 connection of a route.
    pub fn shared(&self, route: &Route) -> Option<Sender2> {
        let mut kept = self.lock();
        let (sender, used) = kept.http2.get_mut(route)?;
        if sender.is_closed() {
            kept.http2.remove(route);
            return None;
        }
        *used = Instant::now();
        Some(sender.clone())
    }

    /// Keeps an HTTP/2 connection.
    pub fn share(&self, route: &Route, sender: Sender2) {
        self.lock().http2.insert(route.clone(), (sender, Instant::now()));
    }

    /// Lends a connection to a request, whose answer has `headers`.
    pub fn lend(self: &Arc<Self>, connection: Connection1, route: &Route, headers: &HeaderMap) -> Lease {
        let announced = announced_idle_time(headers).map(|time| time.saturating_sub(MARGIN));
        let idle_time = announced.map_or(self.idle_time, |time| time.min(self.idle_time));
        Lease { connection, route: route.clone(), idle_time, pool: Arc::downgrade(self) }
    }

    /// Ends connections that have been idle for too long.
    pub fn sweep(&self) {
        let mut kept = self.lock();
        let now = Instant::now();
        for idle in kept.http1.values_mut() {
            idle.retain(|idle| !idle.connection.sender.is_closed() && now < idle.until);
        }
        kept.http1.retain(|_, idle| !idle.is_empty());
        kept.http2.retain(|_, (sender, used)| !sender.is_closed() && used.elapsed() < self.idle_time);
    }

    fn keep(&self, route: Route, connection: Connection1, idle_time: Duration) {
        let mut kept = self.lock();
        let idle = kept.http1.entry(route).or_default();
        if idle.len() >= self.idle_per_route {
            idle.retain(|idle| !idle.connection.sender.is_closed());
        }
        if idle.len() < self.idle_per_route && !idle_time.is_zero() {
            idle.push(Idle { connection, until: Instant::now() + idle_time });
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `Keep-Alive: timeout=5`: how long the app keeps an idle connection.
fn announced_idle_time(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(HeaderName::from_static("keep-alive"))?.to_str().ok()?;
    let seconds = value.split(',').find_map(|part| part.trim().strip_prefix("timeout="))?;
    seconds.trim().parse().ok().map(Duration::from_secs)
}

impl Lease {
    /// Keeps the connection for the next request, once it is ready for one.
    pub fn give_back(self) {
        let Self { mut connection, route, idle_time, pool } = self;
        if connection.sender.is_ready() {
            if let Some(pool) = pool.upgrade() {
                pool.keep(route, connection, idle_time);
            }
            return;
        }
        tokio::spawn(async move {
            if let Ok(Ok(())) = tokio::time::timeout(SETTLE, connection.sender.ready()).await
                && let Some(pool) = pool.upgrade()
            {
                pool.keep(route, connection, idle_time);
            }
        });
    }
}
