//! HTTP/1.1, HTTP/2, gRPC, WebSocket, any upgrade; heads.

use std::time::Duration;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use http::{HeaderMap, Request, Response, Version};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::tungstenite::Message;

use crate::support::*;

/// Says how it was asked.
pub async fn mirror(request: Request<hyper::body::Incoming>) -> Response<Body> {
    let headers: Vec<String> =
        request.headers().iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
    full_text(format!("{} {} {:?}\n{}\n", request.method(), request.uri(), request.version(), headers.join("\n")))
}

fn full_text(text: String) -> Response<Body> {
    Response::builder().header("keep-alive", "timeout=9").header("x-app", "1").body(full(text)).unwrap()
}

#[tokio::test]
async fn the_host_decides_in_every_form() {
    let proxy = Proxy::of(app(mirror).await).await;
    for host in ["app.localhost", "APP.LocalHost:8480", "app.localhost."] {
        let (status, told) = text(proxy.send(get(host, "/a/b?c=%2F")).await).await;
        assert_eq!(status, 200, "{host}");
        assert!(told.starts_with("GET /a/b?c=%2F HTTP/1.1"), "{told}");
        assert!(told.contains(&format!("host: {}", host.to_lowercase())), "{told}");
    }
    let absolute =
        proxy.raw(b"GET http://app.localhost/x HTTP/1.1\r\nhost: app.localhost\r\nconnection: close\r\n\r\n").await;
    assert!(absolute.contains("GET /x HTTP/1.1") && absolute.contains("host: app.localhost"), "{absolute}");
    let request = Request::get("http://app.localhost:8480/two").body(empty()).unwrap();
    let response = proxy.http2().await.send_request(request).await.unwrap();
    assert_eq!(response.version(), Version::HTTP_2);
    let (status, told) = text(response).await;
    assert_eq!(status, 200);
    assert!(told.starts_with("GET /two HTTP/1.1") && told.contains("host: app.localhost:8480"), "{told}");
}

#[tokio::test]
async fn the_app_is_told_who_asks_and_hop_by_hop_headers_stay_behind_both_ways() {
    let proxy = Proxy::of(app(mirror).await).await;
    let request = Request::get("/")
        .header("host", "app.localhost:8480")
        .header("x-forwarded-for", "6.6.6.6")
        .header("forwarded", "for=6.6.6.6")
        .header("connection", "x-secret")
        .header("x-secret", "1")
        .header("te", "gzip")
        .body(empty())
        .unwrap();
    let response = proxy.send(request).await;
    assert!(response.headers().get("keep-alive").is_none() && response.headers()["x-app"] == "1");
    let (_, told) = text(response).await;
    for line in [
        "x-forwarded-for: 127.0.0.1",
        "x-forwarded-proto: http",
        "x-forwarded-port: 8480",
        "x-forwarded-host: app.localhost:8480",
        "forwarded: for=127.0.0.1;host=\"app.localhost:8480\";proto=http",
    ] {
        assert!(told.contains(line), "{told}");
    }
    assert!(!told.contains("6.6.6.6") && !told.contains("x-secret") && !told.contains("te: "), "{told}");
}

#[tokio::test]
async fn websocket_messages_go_both_ways() {
    let proxy = Proxy::of(
        bare(|stream| async move {
            let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
            while let Some(Ok(message)) = socket.next().await {
                if message.is_close() || socket.send(message).await.is_err() {
                    break;
                }
            }
        })
        .await,
    )
    .await;
    let stream = proxy.connect().await;
    let (mut socket, _) = tokio_tungstenite::client_async("ws://app.localhost/ws", stream).await.unwrap();
    for message in [Message::text("hello"), Message::binary(vec![7u8; 300_000])] {
        socket.send(message.clone()).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), message);
    }
    socket.close(None).await.unwrap();
}

#[tokio::test]
async fn an_upgrade_may_end_one_direction_before_the_other() {
    let proxy = Proxy::of(
        bare(|mut stream| async move {
            let head = read_head(&mut stream).await.unwrap().to_lowercase();
            assert!(head.contains("upgrade: shout") && head.contains("connection: upgrade"), "{head}");
            stream
                .write_all(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: shout\r\n\r\n")
                .await
                .unwrap();
            let mut said = String::new();
            stream.read_to_string(&mut said).await.unwrap();
            // The visitor has ended its side; the answer still arrives.
            stream.write_all(said.to_uppercase().as_bytes()).await.unwrap();
        })
        .await,
    )
    .await;
    let answer = {
        let mut stream = proxy.connect().await;
        stream
            .write_all(b"GET / HTTP/1.1\r\nhost: app.localhost\r\nconnection: upgrade\r\nupgrade: shout\r\n\r\n")
            .await
            .unwrap();
        let head = read_head(&mut stream).await.unwrap().to_lowercase();
        assert!(head.starts_with("http/1.1 101") && head.contains("upgrade: shout"), "{head}");
        stream.write_all(b"quiet words").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    assert_eq!(answer, "QUIET WORDS");
}

#[tokio::test]
async fn an_upgrade_that_the_app_does_not_want_is_an_answer_like_any_other() {
    let proxy = Proxy::of(app(mirror).await).await;
    let request = Request::get("/")
        .header("host", "app.localhost")
        .header("connection", "upgrade, http2-settings")
        .header("upgrade", "h2c")
        .header("http2-settings", "AAMAAABkAAQAAP__")
        .body(empty())
        .unwrap();
    let (status, told) = text(proxy.send(request).await).await;
    assert_eq!(status, 200);
    assert!(!told.contains("h2c") && !told.contains("http2-settings"), "{told}");
}

#[tokio::test]
async fn grpc_goes_by_http2_all_the_way_with_trailers() {
    let proxy = Proxy::of(
        app(|request| async move {
            assert_eq!(request.version(), Version::HTTP_2);
            assert_eq!(request.headers()["te"], "trailers");
            // Every message comes back before the next is sent.
            let echoed = request.into_body().map_frame(|frame| frame);
            let trailers: HeaderMap = [("grpc-status".parse().unwrap(), "0".parse().unwrap())].into_iter().collect();
            let body = echoed.with_trailers(async move { Some(Ok(trailers)) });
            Response::builder().header("content-type", "application/grpc").body(body.boxed()).unwrap()
        })
        .await,
    )
    .await;
    let mut client = proxy.http2().await;
    for _ in 0..2 {
        let (mut sender, receiver) = futures::channel::mpsc::channel::<Bytes>(1);
        let body = StreamBody::new(receiver.map(|bytes| Ok(Frame::data(bytes))));
        let request = Request::post("http://app.localhost/pkg.Service/Call")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(BodyExt::boxed(SyncBody::new(body)))
            .unwrap();
        let mut body = client.send_request(request).await.unwrap().into_body();
        for word in ["one", "two"] {
            sender.send(Bytes::from_static(word.as_bytes())).await.unwrap();
            assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), word);
        }
        drop(sender);
        assert_eq!(body.collect().await.unwrap().trailers().unwrap()["grpc-status"], "0");
    }
    assert_eq!(proxy.connections(), 1, "calls share a connection");
}

/// hyper's boxed bodies are `Sync`; a channel's receiver is behind a lock.
type SyncBody<B> = sync_body::SyncBody<B>;

mod sync_body {
    use std::{
        pin::Pin,
        sync::Mutex,
        task::{Context, Poll},
    };

    use hyper::body::{Body, Frame};

    pub struct SyncBody<B>(Mutex<Pin<Box<B>>>);

    impl<B> SyncBody<B> {
        pub fn new(body: B) -> Self {
            Self(Mutex::new(Box::pin(body)))
        }
    }

    impl<B: Body> Body for SyncBody<B> {
        type Data = B::Data;
        type Error = B::Error;
        fn poll_frame(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
            self.0.lock().unwrap().as_mut().poll_frame(cx)
        }
    }
}

#[tokio::test]
async fn trailers_of_a_chunked_answer_arrive() {
    let proxy = Proxy::of(
        bare(|mut stream| async move {
            let head = read_head(&mut stream).await.unwrap().to_lowercase();
            assert!(head.contains("te: trailers"), "{head}");
            let answer = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n3\r\nabc\r\n0\r\nx-sum: 42\r\n\r\n";
            stream.write_all(answer.as_bytes()).await.unwrap();
        })
        .await,
    )
    .await;
    let request = Request::get("/").header("host", "app.localhost").header("te", "trailers").body(empty()).unwrap();
    let collected = proxy.send(request).await.into_body().collect().await.unwrap();
    assert_eq!(collected.trailers().unwrap()["x-sum"], "42");
    assert_eq!(collected.to_bytes(), "abc");
}

#[tokio::test]
async fn head_has_a_length_and_no_body() {
    let proxy = Proxy::of(
        app(|request| async move {
            assert_eq!(request.method(), "HEAD");
            Response::builder().header("content-length", "1234").body(empty()).unwrap()
        })
        .await,
    )
    .await;
    let request = b"HEAD / HTTP/1.1\r\nhost: app.localhost\r\n\r\nHEAD / HTTP/1.1\r\nhost: app.localhost\r\nconnection: close\r\n\r\n";
    let answer = proxy.raw(request).await;
    assert_eq!(answer.matches("HTTP/1.1 200 OK").count(), 2, "{answer}");
    assert_eq!(answer.to_lowercase().matches("content-length: 1234").count(), 2, "{answer}");
    assert_eq!(proxy.connections(), 1);
}

#[tokio::test]
async fn a_visitor_that_expects_100_continue_gets_it_once_the_sandbox_is_reached() {
    let proxy = Proxy::of(
        app(|request| async move {
            assert_eq!(request.headers()["expect"], "100-continue");
            Response::new(full(request.into_body().collect().await.unwrap().to_bytes()))
        })
        .await,
    )
    .await;
    let mut stream = proxy.connect().await;
    let head = "POST / HTTP/1.1\r\nhost: app.localhost\r\nexpect: 100-continue\r\ncontent-length: 5\r\nconnection: close\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    assert!(read_head(&mut stream).await.unwrap().starts_with("HTTP/1.1 100"));
    stream.write_all(b"hello").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("hello"), "{answer}");

    let refused = proxy.raw(head.replace("app.", "nobody.").as_bytes()).await;
    assert!(refused.starts_with("HTTP/1.1 404"), "no 100 where there is no sandbox: {refused}");
}

#[tokio::test]
async fn http10_is_answered_to_its_end() {
    let proxy = Proxy::of(app(|_| async { Response::new(full("plain")) }).await).await;
    let answer =
        tokio::time::timeout(Duration::from_secs(5), proxy.raw(b"GET / HTTP/1.0\r\nhost: app.localhost\r\n\r\n"));
    let answer = answer.await.unwrap();
    assert!(answer.starts_with("HTTP/1.0 200") && answer.ends_with("plain"), "{answer}");
}

#[tokio::test]
async fn an_upgraded_connection_survives_in_hyper_clients_too() {
    let proxy = Proxy::of(
        bare(|mut stream| async move {
            read_head(&mut stream).await.unwrap();
            stream.write_all(b"HTTP/1.1 101 X\r\nconnection: upgrade\r\nupgrade: raw\r\n\r\nfirst").await.unwrap();
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await.unwrap();
        })
        .await,
    )
    .await;
    let request =
        Request::get("/").header("host", "app.localhost").header("connection", "upgrade").header("upgrade", "raw");
    let response = proxy.send(request.body(empty()).unwrap()).await;
    let mut upgraded = TokioIo::new(hyper::upgrade::on(response).await.unwrap());
    let mut word = [0; 5];
    upgraded.read_exact(&mut word).await.unwrap();
    assert_eq!(&word, b"first", "bytes that came with the head are not lost");
}

#[tokio::test]
async fn websocket_over_http2_is_an_upgrade_to_the_app() {
    let proxy = Proxy::of(
        bare(|mut stream| async move {
            let head = read_head(&mut stream).await.unwrap().to_lowercase();
            assert!(head.starts_with("get /chat?x=1 http/1.1\r\n"), "{head}");
            for line in
                ["upgrade: websocket", "connection: upgrade", "sec-websocket-version: 13", "sec-websocket-key: "]
            {
                assert!(head.contains(line), "{head}");
            }
            let answer = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                sec-websocket-accept: x\r\nsec-websocket-protocol: chat\r\n\r\n";
            stream.write_all(answer.as_bytes()).await.unwrap();
            let mut word = [0; 5];
            stream.read_exact(&mut word).await.unwrap();
            word.reverse();
            stream.write_all(&word).await.unwrap();
        })
        .await,
    )
    .await;
    let connect = |protocol: &'static str| {
        Request::connect("http://app.localhost/chat?x=1")
            .extension(hyper::ext::Protocol::from_static(protocol))
            .header("sec-websocket-version", "13")
            .header("sec-websocket-protocol", "chat")
            .body(empty())
            .unwrap()
    };
    let mut sender = proxy.http2().await;
    // The server's settings must have come before it may be asked so.
    sender.send_request(Request::get("http://nobody.localhost/").body(empty()).unwrap()).await.unwrap();
    let response = sender.send_request(connect("websocket")).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["sec-websocket-protocol"], "chat");
    assert!(!response.headers().contains_key("sec-websocket-accept"));
    let mut stream = TokioIo::new(hyper::upgrade::on(response).await.unwrap());
    stream.write_all(b"hello").await.unwrap();
    let mut word = [0; 5];
    stream.read_exact(&mut word).await.unwrap();
    assert_eq!(&word, b"olleh");
    let other = sender.send_request(connect("connect-ip")).await.unwrap();
    assert_eq!(other.status(), 400);
}

#[tokio::test]
async fn an_app_without_websocket_is_no_tunnel() {
    let proxy = Proxy::of(app(mirror).await).await;
    let mut sender = proxy.http2().await;
    sender.send_request(Request::get("http://nobody.localhost/").body(empty()).unwrap()).await.unwrap();
    let connect = Request::connect("http://app.localhost/")
        .extension(hyper::ext::Protocol::from_static("websocket"))
        .body(empty())
        .unwrap();
    assert_eq!(sender.send_request(connect).await.unwrap().status(), 502);
}
