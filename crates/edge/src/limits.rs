//! What one sandbox and one client may take of the host: requests and tunnels at a time, connections, patience.

use std::{
    collections::HashMap,
    hash::Hash,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::Poll,
    time::Duration,
};

use tokio::time::Instant;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A client as it is counted: an IPv4 address, or the /64 network that a host has of IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Client(IpAddr);

impl From<IpAddr> for Client {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V6(v6) => Self(IpAddr::V6((v6.to_bits() & !u128::from(u64::MAX)).into())),
            v4 => Self(v4),
        }
    }
}

/// Counts what each of many holds.
pub struct Counts<K>(Arc<Mutex<HashMap<K, usize>>>);

/// One of what is counted. Dropping it gives it back.
pub struct Counted<K: Eq + Hash> {
    counts: Arc<Mutex<HashMap<K, usize>>>,
    key: Option<K>,
}

impl<K: Clone + Eq + Hash> Counts<K> {
    /// Nothing is held.
    pub fn new() -> Self {
        Self(Arc::default())
    }

    /// One more for `key`; `None` when it holds `most` already.
    pub fn enter(&self, key: K, most: usize) -> Option<Counted<K>> {
        let mut counts = lock(&self.0);
        let count = counts.entry(key.clone()).or_insert(0);
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(Counted { counts: Arc::clone(&self.0), key: Some(key) })
    }
}

impl<K: Eq + Hash> Drop for Counted<K> {
    fn drop(&mut self) {
        let Some(key) = self.key.take() else { return };
        let mut counts = lock(&self.counts);
        if let Some(count) = counts.get_mut(&key) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&key);
            }
        }
    }
}

/// Counts requests per sandbox, and per sandbox and client.
pub struct Limits {
    each: usize,
    sandboxes: Counts<String>,
    clients: Counts<(String, Client)>,
}

/// A request's room in its sandbox.
pub struct Room {
    _sandbox: Counted<String>,
    _client: Option<Counted<(String, Client)>>,
}

impl Limits {
    /// At most `each` requests at a time for one sandbox.
    pub fn new(each: usize) -> Self {
        Self { each, sandboxes: Counts::new(), clients: Counts::new() }
    }

    /// Room for one request; `None` when the sandbox has as many as it may, or when one client has half of them.
    /// Programs of this host share an address and an owner, and have all of them.
    pub fn enter(&self, sandbox: &str, client: IpAddr) -> Option<Room> {
        let client = match client.to_canonical().is_loopback() {
            true => None,
            false => Some(self.clients.enter((sandbox.to_owned(), client.into()), self.each.div_ceil(2))?),
        };
        Some(Room { _sandbox: self.sandboxes.enter(sandbox.to_owned(), self.each)?, _client: client })
    }
}

/// Bodies whose takers may stop taking them without a word, as on an HTTP/2 connection with other streams.
pub struct Stallables<B>(Mutex<Vec<Weak<Stallable<B>>>>);

/// A body that is dropped when it is not taken for long.
pub struct Stallable<B>(Mutex<Held<B>>);

struct Held<B> {
    body: Option<B>,
    /// Since when a piece of it waits for the taker; `None` while the taker waits for a piece.
    waits_since: Option<Instant>,
}

impl<B> Stallables<B> {
    /// None.
    pub fn new() -> Self {
        Self(Mutex::default())
    }

    /// Watches a body.
    pub fn watch(&self, body: B) -> Arc<Stallable<B>> {
        let held = Held { body: Some(body), waits_since: Some(Instant::now()) };
        let watched = Arc::new(Stallable(Mutex::new(held)));
        lock(&self.0).push(Arc::downgrade(&watched));
        watched
    }

    /// Drops bodies of which nothing was taken for `patience`.
    pub fn sweep(&self, patience: Duration) {
        let mut dropped = Vec::new();
        lock(&self.0).retain(|watched| {
            let Some(watched) = watched.upgrade() else { return false };
            let mut held = lock(&watched.0);
            if held.waits_since.is_some_and(|since| since.elapsed() >= patience) {
                dropped.push(held.body.take());
            }
            held.body.is_some()
        });
    }
}

impl<B> Stallable<B> {
    /// Polls the body for its next piece; `None` when it was dropped.
    pub fn poll<T>(&self, poll: impl FnOnce(&mut B) -> Poll<T>) -> Option<Poll<T>> {
        let mut held = lock(&self.0);
        let polled = poll(held.body.as_mut()?);
        held.waits_since = polled.is_ready().then(Instant::now);
        Some(polled)
    }

    /// Looks at the body.
    pub fn look<T>(&self, look: impl FnOnce(&B) -> T) -> Option<T> {
        lock(&self.0).body.as_ref().map(look)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCAL: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    #[test]
    fn one_sandbox_does_not_take_anothers_room() {
        let limits = Limits::new(2);
        let first = limits.enter("a", LOCAL);
        let second = limits.enter("a", LOCAL);
        assert!(first.is_some() && second.is_some() && limits.enter("a", LOCAL).is_none());
        assert!(limits.enter("b", LOCAL).is_some());
        drop(first);
        assert!(limits.enter("a", LOCAL).is_some());
        drop(second);
        let _c = limits.enter("c", LOCAL);
        assert_eq!(lock(&limits.sandboxes.0).len(), 1, "idle sandboxes are forgotten");
    }

    #[test]
    fn one_client_has_half_of_a_sandbox_and_a_network_of_ipv6_is_one_client() {
        let limits = Limits::new(4);
        let enter = |address: &str| limits.enter("a", address.parse().unwrap());
        let held = [enter("2001:db8::1"), enter("2001:db8::2")];
        assert!(held.iter().all(Option::is_some));
        assert!(enter("2001:db8::3").is_none(), "the same /64");
        let others = [enter("2001:db8:0:1::1"), enter("1.2.3.4")];
        assert!(others.iter().all(Option::is_some));
        assert!(enter("1.2.3.5").is_none(), "the sandbox is full");
        drop((held, others));
        assert!(lock(&limits.clients.0).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_taken_is_dropped_and_what_does_not_come_is_waited_for() {
        let bodies = Stallables::new();
        let (untaken, slow) = (bodies.watch(()), bodies.watch(()));
        assert!(slow.poll(|()| Poll::<()>::Pending).is_some());
        tokio::time::advance(Duration::from_secs(10)).await;
        bodies.sweep(Duration::from_secs(20));
        assert!(untaken.look(|()| ()).is_some());
        tokio::time::advance(Duration::from_secs(10)).await;
        bodies.sweep(Duration::from_secs(20));
        assert!(untaken.look(|()| ()).is_none() && slow.look(|()| ()).is_some());
        drop(slow);
        bodies.sweep(Duration::from_secs(20));
        assert!(lock(&bodies.0).is_empty());
    }
}
