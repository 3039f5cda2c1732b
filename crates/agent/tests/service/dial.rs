//! Ports.

use bytes::Bytes;
use h2::client::SendRequest;
use heyvm_agent::net::streams;
use heyvm_agent_protocol::{
    hello,
    ports::{self, Stream},
    v1::PortStatusRequest,
};
use http::{Request, StatusCode};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpListener,
};
use tonic::Code;

use crate::harness::{Agent, PATIENCE};

/// The host's end of a ports' connection.
async fn connect() -> SendRequest<Bytes> {
    let (host, guest) = tokio::io::duplex(64 << 10);
    let mut host = BufReader::new(host);
    tokio::spawn(streams::serve(guest, || true));
    hello::greet(&mut host, "0123456789abcdef0123456789abcdef").await.unwrap();
    let (sender, connection) = ports::client().handshake(host).await.unwrap();
    tokio::spawn(connection);
    sender
}

async fn dial(sender: &SendRequest<Bytes>, port: u16) -> Result<Stream, StatusCode> {
    let mut sender = sender.clone().ready().await.unwrap();
    let request = Request::post(format!("http://ports/{port}")).body(()).unwrap();
    let (answer, send) = sender.send_request(request, false).unwrap();
    let answer = tokio::time::timeout(PATIENCE, answer).await.expect("no answer").unwrap();
    match answer.status() {
        StatusCode::OK => Ok(Stream::new(answer.into_body(), send)),
        refused => Err(refused),
    }
}

async fn read_to_end(stream: &mut Stream) -> Vec<u8> {
    let mut all = Vec::new();
    tokio::time::timeout(PATIENCE, stream.read_to_end(&mut all)).await.expect("the stream hangs").unwrap();
    all
}

#[tokio::test]
async fn bytes_go_both_ways_and_each_way_ends_by_itself() {
    let host = connect().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = Vec::new();
        stream.read_to_end(&mut request).await.unwrap();
        stream.write_all(&request).await.unwrap();
        stream.write_all(&vec![b'.'; 2_000_000]).await.unwrap();
        request.len()
    });
    let mut stream = dial(&host, port).await.unwrap();
    for _ in 0..20 {
        stream.write_all(&[b'x'; 50_000]).await.unwrap();
    }
    stream.write_all(b"last").await.unwrap();
    stream.shutdown().await.unwrap();
    let answer = read_to_end(&mut stream).await;
    assert_eq!(server.await.unwrap(), 1_000_004);
    assert_eq!(answer.len(), 3_000_004);
    assert!(answer.starts_with(b"xx") && answer.ends_with(b".."));
}

#[tokio::test]
async fn server_on_another_address_than_loopback_is_reached() {
    let host = connect().await;
    // As a server that binds $HOSTNAME listens: not at 127.0.0.1.
    let listener = TcpListener::bind("127.0.0.2:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"here").await.unwrap();
    });
    let mut stream = dial(&host, port).await.unwrap();
    assert_eq!(read_to_end(&mut stream).await, b"here");
}

#[tokio::test]
async fn a_server_that_only_listens_on_ipv6_is_reached() {
    let host = connect().await;
    let listener = TcpListener::bind("[::1]:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"six").await.unwrap();
    });
    let mut stream = dial(&host, port).await.unwrap();
    assert_eq!(read_to_end(&mut stream).await, b"six");
}

#[tokio::test]
async fn a_server_may_close_first_and_still_read() {
    let host = connect().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.shutdown().await.unwrap();
        let mut request = Vec::new();
        stream.read_to_end(&mut request).await.unwrap();
        request
    });
    let mut stream = dial(&host, port).await.unwrap();
    assert_eq!(read_to_end(&mut stream).await, b"");
    stream.write_all(b"after all").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(server.await.unwrap(), b"after all");
}

#[tokio::test]
async fn a_dropped_stream_closes_the_connection_whatever_it_waits_for() {
    let host = connect().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let idle = dial(&host, port).await.unwrap();
    let (mut of_idle, _) = listener.accept().await.unwrap();
    let mut half = dial(&host, port).await.unwrap();
    let (mut of_half, _) = listener.accept().await.unwrap();
    half.shutdown().await.unwrap();
    assert_eq!(of_half.read(&mut [0]).await.unwrap(), 0);
    let mut full = dial(&host, port).await.unwrap();
    let (mut of_full, _) = listener.accept().await.unwrap();
    fill(&mut full).await;
    drop((idle, half, full));
    for stream in [&mut of_idle, &mut of_full] {
        let ended = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut Vec::new())).await;
        ended.expect("still open").unwrap();
    }
    // Its own reading has ended before: only writing shows that the other end is gone.
    let broken = async { while of_half.write_all(&[0; 4096]).await.is_ok() {} };
    tokio::time::timeout(PATIENCE, broken).await.expect("still open");
}

#[tokio::test]
async fn streams_that_no_one_reads_hold_up_no_other_and_give_their_room_back() {
    let host = connect().await;
    let deaf = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let loud = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let echo = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
    let (deaf_port, loud_port, echo_port) = (port(&deaf), port(&loud), port(&echo));
    tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Ok((stream, _)) = deaf.accept().await {
            kept.push(stream);
        }
    });
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = loud.accept().await {
            tokio::spawn(async move { while stream.write_all(&[b'x'; 16 << 10]).await.is_ok() {} });
        }
    });
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = echo.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                tokio::io::copy(&mut from, &mut to).await.ok();
                to.shutdown().await.ok();
            });
        }
    });
    // More than a window of a connection that is as large as a few streams' could hold; twice, for what is given back.
    for _ in 0..2 {
        let mut held = Vec::new();
        for _ in 0..60 {
            let mut upload = dial(&host, deaf_port).await.unwrap();
            fill(&mut upload).await;
            held.push(upload);
            held.push(dial(&host, loud_port).await.unwrap());
        }
        let mut other = dial(&host, echo_port).await.unwrap();
        let (mut from, mut to) = tokio::io::split(&mut other);
        let sent = vec![b'e'; 1 << 20];
        let mut came = Vec::new();
        let exchange = async {
            tokio::join!(
                async {
                    to.write_all(&sent).await.unwrap();
                    to.shutdown().await.unwrap()
                },
                async { from.read_to_end(&mut came).await.unwrap() },
            )
        };
        tokio::time::timeout(PATIENCE, exchange).await.expect("held up by others");
        assert_eq!(came.len(), sent.len());
    }
}

/// Writes until nothing more is taken.
async fn fill(stream: &mut Stream) {
    let quiet = std::time::Duration::from_millis(200);
    while let Ok(written) = tokio::time::timeout(quiet, stream.write_all(&[b'x'; 64 << 10])).await {
        written.unwrap();
    }
}

#[tokio::test]
async fn closed_and_impossible_ports_are_distinguished() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Agent::personalized(dir.path()).client().await;
    let host = connect().await;
    // Below the range that the other tests' ports come from: none of them may open it again meanwhile.
    let port = 21_000 + u16::try_from(std::process::id() % 1000).unwrap();
    let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    let mut status = async |port: u32| client.port_status(PortStatusRequest { port, wait_ms: 0 }).await;
    assert!(status(port.into()).await.unwrap().into_inner().listening);
    drop(listener);
    // A process that another test is just starting has a copy of the socket until its program begins.
    let closed = async {
        while status(port.into()).await.unwrap().into_inner().listening {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, closed).await.expect("still listened on");
    assert_eq!(status(70_000).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(dial(&host, port).await.err(), Some(StatusCode::NOT_FOUND));
    assert_eq!(dial(&host, 0).await.err(), Some(StatusCode::BAD_REQUEST));
}
