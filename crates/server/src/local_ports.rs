//! Listeners on loopback, one for each bound port: `http://127.0.0.1:PORT` needs no resolver.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use async_trait::async_trait;
use heyvm_control_plane::{LocalPorts, WantedPort};
use heyvm_edge::{Edge, LocalPort};
use tokio::{net::TcpListener, sync::Mutex};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Below the ports that the kernel gives to outgoing connections, so that a port is still free after a restart.
const FIRST: u16 = 20_000;
const PORTS: u16 = 10_000;
/// How many ports are tried for one subdomain.
const TRIES: u16 = 200;

/// The listeners. Cheap to clone.
#[derive(Clone)]
pub struct LocalListeners {
    edge: Arc<Edge>,
    ending: CancellationToken,
    serving: TaskTracker,
    open: Arc<Mutex<HashMap<String, Open>>>,
}

struct Open {
    port: u16,
    closing: CancellationToken,
}

impl LocalListeners {
    /// None; those that come are served by `edge` until `ending`.
    pub fn new(edge: Arc<Edge>, ending: CancellationToken) -> Self {
        Self { edge, ending, serving: TaskTracker::new(), open: Arc::default() }
    }

    /// Resolves after the end, when what was under way has ended.
    pub async fn served(&self) {
        self.serving.close();
        self.serving.wait().await;
    }

    async fn serve(&self, wanted: &WantedPort) -> io::Result<Open> {
        let listener = listen(wanted).await?;
        let port = listener.local_addr()?.port();
        let closing = self.ending.child_token();
        let place = LocalPort { subdomain: wanted.subdomain.clone(), url: wanted.url.clone(), port };
        let (edge, until) = (Arc::clone(&self.edge), closing.clone());
        self.serving.spawn(async move { edge.serve_local(listener, place, until).await });
        Ok(Open { port, closing })
    }
}

#[async_trait]
impl LocalPorts for LocalListeners {
    async fn listen_for(&self, wanted: Vec<WantedPort>) -> HashMap<String, u16> {
        let mut open = self.open.lock().await;
        open.retain(|subdomain, listener| {
            let stays = wanted.iter().any(|wanted| wanted.subdomain == *subdomain);
            if !stays {
                listener.closing.cancel();
            }
            stays
        });
        for wanted in &wanted {
            if open.contains_key(&wanted.subdomain) {
                continue;
            }
            match self.serve(wanted).await {
                Ok(listener) => {
                    open.insert(wanted.subdomain.clone(), listener);
                }
                Err(error) => {
                    tracing::warn!(%error, url = wanted.url, "no port of loopback is free for a bound port");
                }
            }
        }
        open.iter().map(|(subdomain, listener)| (subdomain.clone(), listener.port)).collect()
    }
}

/// On the port of the last time, else on one that is free.
async fn listen(wanted: &WantedPort) -> io::Result<TcpListener> {
    let mut hasher = DefaultHasher::new();
    wanted.subdomain.hash(&mut hasher);
    let start = u16::try_from(hasher.finish() % u64::from(PORTS)).unwrap_or_default();
    let others = (0..TRIES).map(|step| FIRST + (start + step) % PORTS);
    let mut failure = io::Error::from(io::ErrorKind::AddrInUse);
    for port in wanted.port.into_iter().chain(others) {
        match TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await {
            Ok(listener) => {
                if wanted.port.is_some_and(|last| last != port) {
                    tracing::warn!(
                        last = wanted.port,
                        port,
                        url = wanted.url,
                        "a port of loopback is taken by another program"
                    );
                }
                return Ok(listener);
            }
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

#[cfg(test)]
mod tests {
    use heyvm_edge::{ByteStream, ConnectError, Route, Settings, Upstreams};

    use super::*;

    struct Nowhere;

    #[async_trait]
    impl Upstreams for Nowhere {
        async fn route(&self, _: &str) -> Result<Route, ConnectError> {
            Err(ConnectError::UnknownSubdomain)
        }

        async fn connect(&self, _: &Route) -> Result<Box<dyn ByteStream>, ConnectError> {
            Err(ConnectError::UnknownSubdomain)
        }
    }

    fn wanted(subdomain: &str, port: Option<u16>) -> WantedPort {
        WantedPort { subdomain: subdomain.into(), url: format!("http://{subdomain}.localhost:8480"), port }
    }

    fn listeners() -> (LocalListeners, CancellationToken) {
        let ending = CancellationToken::new();
        let edge = Edge::new(Arc::new(Nowhere), None, Settings::default());
        (LocalListeners::new(edge, ending.clone()), ending)
    }

    #[tokio::test]
    async fn a_port_is_kept_and_given_up_with_its_subdomain() {
        let (first, ending) = listeners();
        let open = first.listen_for(vec![wanted("a", None), wanted("b", None)]).await;
        assert_eq!(open.len(), 2);
        assert_ne!(open["a"], open["b"]);
        assert_eq!(first.listen_for(vec![wanted("a", None)]).await, HashMap::from([("a".into(), open["a"])]));
        ending.cancel();
        first.served().await;

        let (second, _ending) = listeners();
        assert_eq!(second.listen_for(vec![wanted("a", Some(open["a"]))]).await["a"], open["a"], "after a restart");
        let (third, _ending) = listeners();
        let other = third.listen_for(vec![wanted("a", Some(open["a"]))]).await["a"];
        assert_ne!(other, open["a"], "one that is taken is passed over");
    }
}
