//! `port-forward`: ports of this machine that lead to ports of a sandbox.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use heyvm_api::{ApiError, ErrorCode, client::Client, headers, sandbox::SandboxInfo};
use serde::Serialize;
use tokio::{
    net::{TcpListener, TcpStream},
    signal::unix::{SignalKind, signal},
    sync::Semaphore,
};

use super::{Context, Outcome, bind::parse_port, path};
use crate::output;

/// Connections at a time; more wait in the listener's queue.
const CONNECTIONS: usize = 512;
/// After an accept that failed, as for want of descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// `port-forward`.
#[derive(Debug, clap::Args)]
pub struct PortForwardArgs {
    /// Id, name or slug
    pub sandbox: String,
    /// Port in the sandbox, after the port of this machine where that is another (0: one that is free)
    #[arg(required = true, value_name = "[LOCAL:]PORT")]
    pub ports: Vec<String>,
    /// Address of this machine to listen at
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub listen: IpAddr,
}

/// A pair of ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ports {
    /// 0: one that is free.
    local: u16,
    remote: u16,
}

/// What is listened for, as it is shown.
#[derive(Debug, Serialize)]
struct Forwarded {
    listen: SocketAddr,
    port: u16,
}

#[derive(Debug, Serialize)]
struct Answer {
    sandbox_id: String,
    name: String,
    forwards: Vec<Forwarded>,
}

/// Forwards until SIGINT or SIGTERM.
pub async fn port_forward(context: &Context, args: PortForwardArgs) -> Outcome {
    let pairs = args.ports.iter().map(|text| parse(text)).collect::<Result<Vec<_>, _>>()?;
    let client = context.client().await?;
    let info: SandboxInfo = client.get(&path(&args.sandbox, "")).await?;
    let mut listeners = Vec::new();
    let mut forwards = Vec::new();
    for pair in pairs {
        let (listener, listen) = listen(SocketAddr::new(args.listen, pair.local)).await?;
        forwards.push(Forwarded { listen, port: pair.remote });
        listeners.push((listener, pair.remote));
    }
    // Caught before anything is printed: a caller may end this as soon as it has read where it listens.
    let caught = || Ok((signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?));
    let (mut terminate, mut interrupt) = caught()
        .map_err(|error: io::Error| ApiError::new(ErrorCode::Internal, format!("could not catch signals: {error}")))?;
    let answer = Answer { sandbox_id: info.id.clone(), name: info.name, forwards };
    output::answer(context.format, &answer, || {
        let lines = answer.forwards.iter().map(|each| format!("{} -> port {}", each.listen, each.port));
        lines.collect::<Vec<_>>().join("\n")
    });
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    for (listener, port) in listeners {
        tokio::spawn(forward(listener, client.clone(), path(&info.id, &format!("/ports/{port}")), Arc::clone(&room)));
    }
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(0)
}

async fn listen(address: SocketAddr) -> Result<(TcpListener, SocketAddr), ApiError> {
    let bound = TcpListener::bind(address).await.and_then(|listener| Ok((listener.local_addr()?, listener)));
    let (address, listener) = bound.map_err(|error| {
        let hint = match error.kind() {
            io::ErrorKind::AddrInUse => {
                "Name another port before a colon, as in 15432:5432, or 0 for one that is free."
            }
            io::ErrorKind::PermissionDenied => "Name a port above 1023 before a colon, as in 8080:80.",
            _ => "Name an address of this machine with --listen.",
        };
        ApiError::new(ErrorCode::InvalidArgument, format!("could not listen on {address}: {error}")).hint(hint)
    })?;
    Ok((listener, address))
}

/// Accepts without end.
async fn forward(listener: TcpListener, client: Client, target: String, room: Arc<Semaphore>) {
    while let Ok(turn) = Arc::clone(&room).acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => {
                let (client, target) = (client.clone(), target.clone());
                tokio::spawn(async move {
                    // A client that is sent away has its connection closed; why stands here alone.
                    if let Err(error) = carry(stream, &client, &target).await {
                        output::note(&error.message);
                    }
                    drop(turn);
                });
            }
            Err(error) => {
                output::note(&format!("could not accept a connection: {error}"));
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn carry(mut stream: TcpStream, client: &Client, target: &str) -> Result<(), ApiError> {
    // Small pieces go out as they come.
    stream.set_nodelay(true).ok();
    let mut port = client.upgrade(target, headers::PORT_STREAM).await?;
    // What breaks is either end's matter, who sees it.
    tokio::io::copy_bidirectional(&mut stream, &mut port).await.ok();
    Ok(())
}

fn parse(text: &str) -> Result<Ports, ApiError> {
    let (local, remote) = match text.split_once(':') {
        Some(("0", remote)) => (0, parse_port(remote)?),
        Some((local, remote)) => (parse_port(local)?, parse_port(remote)?),
        None => (parse_port(text)?, parse_port(text)?),
    };
    Ok(Ports { local, remote })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_of_ports() {
        assert_eq!(parse("5432").unwrap(), Ports { local: 5432, remote: 5432 });
        assert_eq!(parse("15432:5432").unwrap(), Ports { local: 15432, remote: 5432 });
        assert_eq!(parse("0:80").unwrap(), Ports { local: 0, remote: 80 });
        for bad in ["", ":80", "80:", "80:0", "0", "a:80", "1:2:3", "70000:80"] {
            assert_eq!(parse(bad).unwrap_err().code, ErrorCode::InvalidPort, "{bad:?}");
        }
    }

    #[tokio::test]
    async fn a_taken_port_is_named() {
        let (taken, address) = listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let error = listen(address).await.unwrap_err();
        assert!(error.message.contains(&address.to_string()) && error.hint.unwrap().contains("15432:5432"));
        drop(taken);
    }
}
