//! The ports' connection: byte streams from the host to ports of the guest, at whatever address something
//! listens there.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    pin::pin,
    time::Duration,
};

use bytes::Bytes;
use h2::{RecvStream, server::SendResponse};
use heyvm_agent_protocol::{CHUNK, hello, ports};
use http::{Request, Response, StatusCode};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufStream},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use super::listening;
use crate::connection::{READ_BUFFER, WRITE_BUFFER};

/// A program on loopback that does not accept for this long is not going to.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// A port that is listened on at more addresses than loopback is tried at these many.
const MAX_ADDRESSES: usize = 8;

/// Serves one host over `stream` until it leaves. `is_sandbox` says whether this guest is one by now.
pub async fn serve<S, F>(stream: S, is_sandbox: F) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    F: Fn() -> bool,
{
    let mut stream = BufStream::with_capacity(READ_BUFFER, WRITE_BUFFER, stream);
    hello::answer(&mut stream).await?;
    let mut connection = ports::server().handshake::<_, Bytes>(stream).await.map_err(io::Error::other)?;
    while let Some(accepted) = connection.accept().await {
        let (request, answer) = accepted.map_err(io::Error::other)?;
        match is_sandbox() {
            true => drop(tokio::spawn(dial(request, answer))),
            false => refuse(answer, StatusCode::SERVICE_UNAVAILABLE),
        }
    }
    Ok(())
}

/// Connects to the port that the request names and carries bytes both ways from then on.
async fn dial(request: Request<RecvStream>, mut answer: SendResponse<Bytes>) {
    let port = request.uri().path().strip_prefix('/').and_then(|port| port.parse().ok()).filter(|port| *port > 0);
    let Some(port) = port else { return refuse(answer, StatusCode::BAD_REQUEST) };
    let connected = tokio::select! {
        connected = connect(port) => connected,
        _ = std::future::poll_fn(|cx| answer.poll_reset(cx)) => return,
    };
    match connected {
        Ok(program) => {
            if let Ok(send) = answer.send_response(Response::new(()), false) {
                carry(ports::Stream::new(request.into_body(), send), program).await;
            }
        }
        Err(status) => refuse(answer, status),
    }
}

fn refuse(mut answer: SendResponse<Bytes>, status: StatusCode) {
    let mut head = Response::new(());
    *head.status_mut() = status;
    // The host may have left meanwhile.
    answer.send_response(head, true).ok();
}

/// Connects at loopback, where nearly everything listens; else wherever the guest's own tables say that something does:
/// a server that binds its host name listens at the network's address alone.
async fn connect(port: u16) -> Result<TcpStream, StatusCode> {
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
        Some(error) if is_local_shortage(&error) => Err(StatusCode::INSUFFICIENT_STORAGE),
        _ => Err(StatusCode::NOT_FOUND),
    }
}

/// Connects at the first address that takes it; why the last one did not.
async fn connect_at(
    addresses: impl IntoIterator<Item = IpAddr>,
    port: u16,
) -> Result<Result<TcpStream, Option<io::Error>>, StatusCode> {
    let mut refused = None;
    for address in addresses {
        let connecting = TcpStream::connect(SocketAddr::new(address, port));
        match tokio::time::timeout(CONNECT_DEADLINE, connecting).await {
            Ok(Ok(stream)) => {
                // A program that writes in small pieces has flushed them on purpose.
                stream.set_nodelay(true).ok();
                return Ok(Ok(stream));
            }
            Ok(Err(error)) => refused = Some(error),
            Err(_) => return Err(StatusCode::GATEWAY_TIMEOUT),
        }
    }
    Ok(Err(refused))
}

fn is_local_shortage(error: &io::Error) -> bool {
    use nix::libc::{EMFILE, ENFILE, ENOBUFS, ENOMEM};
    error.raw_os_error().is_some_and(|code| [EMFILE, ENFILE, ENOBUFS, ENOMEM].contains(&code))
}

/// Both directions, until both have ended or the host has reset the stream.
async fn carry(stream: ports::Stream, program: TcpStream) {
    let (host, mut to_host) = stream.into_split();
    let (program, to_program) = program.into_split();
    let mut input = pin!(send(host, to_program));
    let mut is_input_over = false;
    {
        let mut output = pin!(receive(program, &mut to_host));
        loop {
            tokio::select! {
                end = &mut output => match end {
                    End::Done => break,
                    End::Broken => return,
                },
                end = &mut input, if !is_input_over => match end {
                    End::Done => is_input_over = true,
                    End::Broken => return,
                },
            }
        }
    }
    if !is_input_over {
        tokio::select! {
            _ = &mut input => {}
            () = to_host.reset() => {}
        }
    }
}

/// How a direction came to its end.
enum End {
    /// Nothing more is to be carried; the other direction goes on.
    Done,
    /// The host has let go of the stream, or the program has broken its connection.
    Broken,
}

/// Host to program.
async fn send(mut host: ports::Reader, mut to_program: OwnedWriteHalf) -> End {
    match tokio::io::copy(&mut host, &mut to_program).await {
        Ok(_) => drop(to_program.shutdown().await),
        // What it has answered before it closed is still on its way.
        Err(error) if is_of_program(&error) => {}
        Err(_) => return End::Broken,
    }
    End::Done
}

/// A stream that the host resets breaks with `ConnectionReset` and no number of the kernel's.
fn is_of_program(error: &io::Error) -> bool {
    error.raw_os_error().is_some()
}

/// Program to host.
async fn receive(program: OwnedReadHalf, to_host: &mut ports::Writer) -> End {
    loop {
        let read = tokio::select! {
            read = read(&program) => read,
            () = to_host.reset() => return End::Broken,
        };
        let data = match read {
            Ok(data) => data,
            Err(_) => {
                to_host.break_off();
                return End::Broken;
            }
        };
        if data.is_empty() {
            to_host.shutdown().await.ok();
            return End::Done;
        }
        if to_host.write_all(&data).await.is_err() {
            return End::Broken;
        }
    }
}

/// Waits without a buffer: most connections are idle most of the time.
async fn read(program: &OwnedReadHalf) -> io::Result<Vec<u8>> {
    loop {
        program.readable().await?;
        let mut data = Vec::with_capacity(CHUNK);
        match program.try_read_buf(&mut data) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
            Ok(_) => return Ok(data),
        }
    }
}
