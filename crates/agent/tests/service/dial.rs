//! Ports.

use heyvm_agent_protocol::v1::*;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::harness::{Agent, Client, PATIENCE};

async fn dial(client: &mut Client, port: u16) -> Result<(mpsc::Sender<DialInput>, Streaming<DialOutput>), Status> {
    let (input, requests) = mpsc::channel(4);
    input.send(DialInput { port: port.into(), ..DialInput::default() }).await.unwrap();
    let output = client.dial(ReceiverStream::new(requests)).await?.into_inner();
    Ok((input, output))
}

fn data(data: &[u8]) -> DialInput {
    DialInput { data: data.to_vec(), ..DialInput::default() }
}

async fn read_to_end(output: &mut Streaming<DialOutput>) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let message = tokio::time::timeout(PATIENCE, output.message()).await.expect("the stream hangs").unwrap();
        let message = message.expect("an end without half_close");
        all.extend(message.data);
        if message.half_close {
            return all;
        }
    }
}

#[tokio::test]
async fn bytes_go_both_ways_and_each_way_ends_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Agent::personalized(dir.path()).client().await;
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
    let (input, mut output) = dial(&mut client, port).await.unwrap();
    for _ in 0..20 {
        input.send(data(&[b'x'; 50_000])).await.unwrap();
    }
    input.send(DialInput { half_close: true, ..data(b"last") }).await.unwrap();
    let answer = read_to_end(&mut output).await;
    assert_eq!(server.await.unwrap(), 1_000_004);
    assert_eq!(answer.len(), 3_000_004);
    assert!(answer.starts_with(b"xx") && answer.ends_with(b".."));
}

#[tokio::test]
async fn server_on_another_address_than_loopback_is_reached() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Agent::personalized(dir.path()).client().await;
    // As a server that binds $HOSTNAME listens: not at 127.0.0.1.
    let listener = TcpListener::bind("127.0.0.2:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"here").await.unwrap();
    });
    let (_input, mut output) = dial(&mut client, port).await.unwrap();
    assert_eq!(read_to_end(&mut output).await, b"here");
}

#[tokio::test]
async fn a_server_that_only_listens_on_ipv6_is_reached() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Agent::personalized(dir.path()).client().await;
    let listener = TcpListener::bind("[::1]:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"six").await.unwrap();
    });
    let (_input, mut output) = dial(&mut client, port).await.unwrap();
    assert_eq!(read_to_end(&mut output).await, b"six");
}

#[tokio::test]
async fn a_server_may_close_first_and_still_read() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Agent::personalized(dir.path()).client().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.shutdown().await.unwrap();
        let mut request = Vec::new();
        stream.read_to_end(&mut request).await.unwrap();
        request
    });
    let (input, mut output) = dial(&mut client, port).await.unwrap();
    assert_eq!(read_to_end(&mut output).await, b"");
    input.send(data(b"after ")).await.unwrap();
    input.send(DialInput { half_close: true, ..data(b"all") }).await.unwrap();
    assert_eq!(server.await.unwrap(), b"after all");
}

#[tokio::test]
async fn a_host_that_lets_go_closes_the_connection() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Agent::personalized(dir.path()).client().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let call = dial(&mut client, listener.local_addr().unwrap().port()).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    drop(call);
    let mut rest = Vec::new();
    tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("still open").unwrap();
}

#[tokio::test]
async fn closed_and_impossible_ports_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Agent::personalized(dir.path()).client().await;
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
    assert_eq!(dial(&mut client, port).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(dial(&mut client, 0).await.unwrap_err().code(), Code::InvalidArgument);
}
