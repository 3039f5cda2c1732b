//! The edge proxy's way in: where subdomains lead, as the control plane knows; and the port it listens on.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use heyvm_control_plane::{ConnectError as Failure, ControlPlane};
use heyvm_edge::{Access, ByteStream, ConnectError, Route, Upstreams};
use tokio::net::TcpListener;

use crate::config::EdgeConfig;

/// How many ports after the first one are tried.
const MORE_PORTS: u16 = 100;

/// The control plane as the proxy sees it.
pub struct Sandboxes(pub Arc<ControlPlane>);

#[async_trait]
impl Upstreams for Sandboxes {
    async fn route(&self, subdomain: &str) -> Result<Route, ConnectError> {
        let route = self.0.route(subdomain).map_err(told)?;
        let access = if route.is_public { Access::Public } else { Access::Members { account: route.account_id } };
        let response_timeout = route.response_timeout_seconds.map(|seconds| Duration::from_secs(seconds.into()));
        Ok(Route { sandbox: route.sandbox_id, port: route.port, access, response_timeout })
    }

    async fn connect(&self, route: &Route) -> Result<Box<dyn ByteStream>, ConnectError> {
        let stream = self.0.connect_to(&route.sandbox, route.port).await.map_err(told)?;
        Ok(Box::new(stream))
    }
}

fn told(failure: Failure) -> ConnectError {
    match failure {
        Failure::UnknownSubdomain => ConnectError::UnknownSubdomain,
        Failure::NotRunning(status) => ConnectError::NotRunning(status),
        Failure::NothingListens(port) => ConnectError::NothingListens(port),
        Failure::Unreachable(why) => ConnectError::Unreachable(why),
    }
}

/// Listens on the port of the last time, so that URLs stay, else on the first free one from the configured port on.
///
/// On IPv4's loopback it listens on IPv6's, too: names of `localhost` mean both.
#[expect(clippy::disallowed_methods, reason = "runs at the start, before anybody is served")]
pub async fn listen(home: &Path, config: &EdgeConfig) -> io::Result<Vec<TcpListener>> {
    let remembered = home.join("run/proxy.port");
    let last = fs::read_to_string(&remembered).ok().and_then(|text| text.trim().parse::<u16>().ok());
    let range = config.port..=config.port.saturating_add(MORE_PORTS);
    let last = last.filter(|last| *last > 0 && (config.port == 0 || range.contains(last)));
    let mut failure = io::Error::from(io::ErrorKind::AddrInUse);
    for port in last.into_iter().chain(if config.port == 0 { 0..=0 } else { range }) {
        match bind(config.listen, port).await {
            Ok((listeners, port)) => {
                if last.is_some_and(|last| last != port) {
                    tracing::warn!(?last, port, "the proxy's port is taken by another program: URLs have changed");
                }
                fs::write(&remembered, format!("{port}\n"))?;
                return Ok(listeners);
            }
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

async fn bind(address: IpAddr, port: u16) -> io::Result<(Vec<TcpListener>, u16)> {
    let first = TcpListener::bind(SocketAddr::new(address, port)).await?;
    let port = first.local_addr()?.port();
    let mut listeners = vec![first];
    if address == IpAddr::V4(Ipv4Addr::LOCALHOST) {
        match TcpListener::bind(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port)).await {
            Ok(second) => listeners.push(second),
            // Another program's: it would get what is meant for sandboxes.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => return Err(error),
            Err(error) => tracing::info!(%error, "the proxy does not listen on IPv6"),
        }
    }
    Ok((listeners, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_port_is_kept_and_a_taken_one_is_passed_over() {
        let home = tempfile::tempdir().unwrap();
        fs::create_dir(home.path().join("run")).unwrap();
        let chosen = EdgeConfig { port: 0, ..EdgeConfig::default() };
        let first = listen(home.path(), &chosen).await.unwrap();
        let port = first[0].local_addr().unwrap().port();
        assert!(first.iter().all(|listener| listener.local_addr().unwrap().port() == port));
        drop(first);
        let again = listen(home.path(), &chosen).await.unwrap();
        assert_eq!(again[0].local_addr().unwrap().port(), port);

        let other = tempfile::tempdir().unwrap();
        fs::create_dir(other.path().join("run")).unwrap();
        let taken = EdgeConfig { port, ..EdgeConfig::default() };
        let next = listen(other.path(), &taken).await.unwrap()[0].local_addr().unwrap().port();
        assert!(next > port && next <= port.saturating_add(MORE_PORTS), "{next} after {port}");
    }
}
