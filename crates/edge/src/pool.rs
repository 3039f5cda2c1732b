//! Connections to sandboxes that are kept for later requests: each new one costs the guest time.
//!
//! A connection serves one route for its whole life. HTTP/1.1 connections are lent to one request at a time;
//! an HTTP/2 connection is shared.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use hyper::client::conn::{http1, http2};
use tokio::time::Instant;

use crate::{Route, body::RequestBody};

/// The sending half of an HTTP/1.1 connection.
pub type Sender1 = http1::SendRequest<RequestBody>;
/// The sending half of an HTTP/2 connection.
pub type Sender2 = http2::SendRequest<RequestBody>;

/// How long a connection may take to become ready after its answer has ended.
const SETTLE: Duration = Duration::from_secs(2);

/// Idle connections.
pub struct Pool {
    idle_per_route: usize,
    idle_time: Duration,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    http1: HashMap<Route, Vec<(Sender1, Instant)>>,
    http2: HashMap<Route, (Sender2, Instant)>,
}

/// An HTTP/1.1 connection that is in use. Dropping it ends the connection.
pub struct Lease {
    sender: Sender1,
    route: Route,
    pool: Weak<Pool>,
}

impl Pool {
    /// Keeps at most `idle_per_route` connections of a route, each for at most `idle_time`.
    pub fn new(idle_per_route: usize, idle_time: Duration) -> Arc<Self> {
        Arc::new(Self { idle_per_route, idle_time, kept: Mutex::default() })
    }

    /// An idle connection: the one last used.
    pub fn take(&self, route: &Route) -> Option<Sender1> {
        let mut kept = self.lock();
        let idle = kept.http1.get_mut(route)?;
        while let Some((sender, since)) = idle.pop() {
            if sender.is_ready() && since.elapsed() < self.idle_time {
                return Some(sender);
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

    /// Lends a connection to a request.
    pub fn lend(self: &Arc<Self>, sender: Sender1, route: &Route) -> Lease {
        Lease { sender, route: route.clone(), pool: Arc::downgrade(self) }
    }

    /// Ends connections that have been idle for too long.
    pub fn sweep(&self) {
        let mut kept = self.lock();
        for idle in kept.http1.values_mut() {
            idle.retain(|(sender, since)| !sender.is_closed() && since.elapsed() < self.idle_time);
        }
        kept.http1.retain(|_, idle| !idle.is_empty());
        kept.http2.retain(|_, (sender, used)| !sender.is_closed() && used.elapsed() < self.idle_time);
    }

    fn keep(&self, route: Route, sender: Sender1) {
        let mut kept = self.lock();
        let idle = kept.http1.entry(route).or_default();
        idle.retain(|(sender, _)| !sender.is_closed());
        if idle.len() < self.idle_per_route {
            idle.push((sender, Instant::now()));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lease {
    /// Keeps the connection for the next request, once it is ready for one.
    pub fn give_back(self) {
        let Self { mut sender, route, pool } = self;
        if sender.is_ready() {
            if let Some(pool) = pool.upgrade() {
                pool.keep(route, sender);
            }
            return;
        }
        tokio::spawn(async move {
            if let Ok(Ok(())) = tokio::time::timeout(SETTLE, sender.ready()).await
                && let Some(pool) = pool.upgrade()
            {
                pool.keep(route, sender);
            }
        });
    }
}
