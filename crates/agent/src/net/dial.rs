//! A byte stream from the host to a port of the guest, at whatever address something listens there.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use heyvm_agent_protocol::{
    CHUNK,
    v1::{DialInput, DialOutput},
};
use tokio::{
    io::AsyncWriteExt,
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
};
use tonic::{Status, Streaming};

use super::listening;

/// A program on loopback that does not accept for this long is not going to.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// A port that is listened on at more addresses than loopback is tried at these many.
const MAX_ADDRESSES: usize = 8;
/// Messages that may wait for the host.
const QUEUE: usize = 2;

type Replies = mpsc::Sender<Result<DialOutput, Status>>;

/// Connects to the port that the first message names and carries bytes both ways from then on.
pub async fn dial(mut requests: Streaming<DialInput>) -> Result<mpsc::Receiver<Result<DialOutput, Status>>, Status> {
    let first = requests.message().await?.ok_or_else(|| Status::invalid_argument("no port was named"))?;
    let port = u16::try_from(first.port).ok().filter(|port| *port > 0);
    let port = port.ok_or_else(|| Status::invalid_argument(format!("{} is not a port", first.port)))?;
    let (reader, writer) = connect(port).await?.into_split();
    let (replies, receiver) = mpsc::channel(QUEUE);
    tokio::spawn(carry(first, requests, (reader, writer), replies));
    Ok(receiver)
}

/// Both directions, until both have ended or the host lets go.
async fn carry(
    first: DialInput,
    requests: Streaming<DialInput>,
    (reader, writer): (OwnedReadHalf, OwnedWriteHalf),
    replies: Replies,
) {
    let both = async { tokio::join!(send(first, requests, writer), receive(reader, &replies)) };
    tokio::select! {
        _ = both => {}
        () = replies.closed() => {}
    }
}

/// Connects at loopback, where nearly everything listens; else wherever the guest's own tables say that something does:
/// a server that binds its host name listens at the network's address alone.
async fn connect(port: u16) -> Result<TcpStream, Status> {
    let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    let mut refused = match connect_at(loopback, port).await? {
        Ok(stream) => return Ok(stream),
        Err(refused) => refused,
    };
    let others = listening::addresses(port).into_iter().filter(|address| !loopback.contains(address));
    let others: Vec<IpAddr> = others.filter(|address| !address.is_unspecified()).take(MAX_ADDRESSES).collect();
    if !others.is_empty() {
        match connect_at(others, port).await? {
            Ok(stream) => return Ok(stream),
            Err(error) => refused = error,
        }
    }
    match refused {
        Some(error) if is_local_shortage(&error) => Err(Status::resource_exhausted(error.to_string())),
        _ => Err(Status::not_found(format!("nothing listens on port {port}"))),
    }
}

/// Connects at the first address that takes it; why the last one did not.
async fn connect_at(
    addresses: impl IntoIterator<Item = IpAddr>,
    port: u16,
) -> Result<Result<TcpStream, Option<io::Error>>, Status> {
    let mut refused = None;
    for address in addresses {
        let connecting = TcpStream::connect(SocketAddr::new(address, port));
        match tokio::time::timeout(CONNECT_DEADLINE, connecting).await {
            Ok(Ok(stream)) => {
                // Whoever writes in small pieces has flushed them on purpose.
                let _ = stream.set_nodelay(true);
                return Ok(Ok(stream));
            }
            Ok(Err(error)) => refused = Some(error),
            Err(_) => return Err(Status::deadline_exceeded(format!("port {port} does not accept connections"))),
        }
    }
    Ok(Err(refused))
}

fn is_local_shortage(error: &io::Error) -> bool {
    use nix::libc::{EADDRNOTAVAIL, EMFILE, ENFILE, ENOBUFS, ENOMEM};
    // No IPv6 loopback gives EADDRNOTAVAIL, too; then nothing listens there.
    error.raw_os_error().is_some_and(|code| [EMFILE, ENFILE, ENOBUFS, ENOMEM].contains(&code) && code != EADDRNOTAVAIL)
}

/// Host to program.
async fn send(first: DialInput, mut requests: Streaming<DialInput>, mut writer: OwnedWriteHalf) {
    let mut next = Some(first);
    while let Some(DialInput { data, half_close, .. }) = next {
        if !data.is_empty() && writer.write_all(&data).await.is_err() {
            return;
        }
        if half_close {
            break;
        }
        next = requests.message().await.ok().flatten();
    }
    let _ = writer.shutdown().await;
}

/// Program to host.
async fn receive(reader: OwnedReadHalf, replies: &Replies) {
    loop {
        let data = match read(&reader).await {
            Ok(data) => data,
            Err(error) => {
                let _ = replies.send(Err(Status::aborted(format!("the program broke the connection: {error}")))).await;
                return;
            }
        };
        let half_close = data.is_empty();
        if replies.send(Ok(DialOutput { data, half_close })).await.is_err() || half_close {
            return;
        }
    }
}

async fn read(reader: &OwnedReadHalf) -> io::Result<Vec<u8>> {
    loop {
        reader.readable().await?;
        let mut data = Vec::with_capacity(CHUNK);
        match reader.try_read_buf(&mut data) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
            Ok(length) => {
                if length < CHUNK / 2 {
                    data.shrink_to_fit();
                }
                return Ok(data);
            }
        }
    }
}
