//! The edge before one app on loopback, for measurements: `before_an_app PORT APP_PORT`, then `http://app.localhost:PORT`.

use std::{net::Ipv4Addr, sync::Arc};

use async_trait::async_trait;
use heyvm_edge::{Access, ByteStream, ConnectError, Edge, Route, Settings, Upstreams};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

struct App(u16);

#[async_trait]
impl Upstreams for App {
    async fn route(&self, _: &str) -> Result<Route, ConnectError> {
        Ok(Route { sandbox: "app".into(), port: self.0, access: Access::Public, response_timeout: None })
    }

    async fn connect(&self, _: &Route) -> Result<Box<dyn ByteStream>, ConnectError> {
        let unreachable = |error: std::io::Error| ConnectError::Unreachable(error.to_string());
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.0)).await.map_err(unreachable)?;
        stream.set_nodelay(true).map_err(unreachable)?;
        Ok(Box::new(stream))
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut ports = std::env::args().skip(1).map(|port| port.parse::<u16>());
    let (Some(port), Some(app)) = (ports.next().transpose()?, ports.next().transpose()?) else {
        return Err("usage: before_an_app PORT APP_PORT".into());
    };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?;
    Edge::new(Arc::new(App(app)), None, Settings::default()).serve(listener, CancellationToken::new()).await;
    Ok(())
}
