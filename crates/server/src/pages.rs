//! Hosts of our own at the edge, answered by a router.

use async_trait::async_trait;
use axum::Router;
use heyvm_edge::{Site, SiteBody};
use http::{Request, Response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tower::ServiceExt;

use crate::linger::lingering;

/// A router on some hosts. Its handlers find a [`heyvm_edge::Visitor`] among the request's extensions.
pub struct Pages {
    /// None: every host.
    hosts: Option<Vec<String>>,
    router: Router,
}

impl Pages {
    /// Answers on these hosts, in lower case and without ports.
    pub fn new(hosts: Vec<String>, router: Router) -> Self {
        Self { hosts: Some(hosts), router }
    }

    /// Answers whatever host is asked for.
    pub fn on_every_host(router: Router) -> Self {
        Self { hosts: None, router }
    }
}

#[async_trait]
impl Site for Pages {
    fn has(&self, host: &str) -> bool {
        self.hosts.as_ref().is_none_or(|hosts| hosts.iter().any(|own| own == host))
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<SiteBody> {
        let answered = self.router.clone().oneshot(lingering(request.map(axum::body::Body::new))).await;
        answered.unwrap_or_else(|never| match never {}).map(|body| body.map_err(Into::into).boxed_unsync())
    }
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, sync::Arc};

    use axum::{
        Extension,
        body::Body,
        extract::ws::{Message, WebSocketUpgrade},
        routing::{any, get, post},
    };
    use bytes::Bytes;
    use futures::{SinkExt, StreamExt, stream};
    use heyvm_edge::{Edge, Settings, Visitor};
    use http::{StatusCode, Version};
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use tokio::{
        net::{TcpListener, TcpStream},
        sync::Notify,
    };
    use tokio_tungstenite::tungstenite;
    use tokio_util::sync::CancellationToken;

    use super::*;

    const MIB: usize = 1 << 20;

    async fn serve(router: Router, settings: Settings) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let edge = Edge::of_site(Arc::new(Pages::on_every_host(router)), settings);
        tokio::spawn(async move { edge.serve(listener, CancellationToken::new()).await });
        address
    }

    async fn ask(address: SocketAddr, version: Version, request: Request<Body>) -> Response<Incoming> {
        let stream = TokioIo::new(TcpStream::connect(address).await.unwrap());
        if version == Version::HTTP_2 {
            let (mut sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.unwrap();
            tokio::spawn(connection);
            return sender.send_request(request).await.unwrap();
        }
        let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        let response = sender.send_request(request).await.unwrap();
        // A body goes on coming as long as its connection is not given up.
        tokio::spawn(async move { sender.ready().await });
        response
    }

    fn request(version: Version, address: SocketAddr, method: &str, path: &str, body: Body) -> Request<Body> {
        let uri = if version == Version::HTTP_2 { format!("http://{address}{path}") } else { path.to_owned() };
        let request = Request::builder().method(method).uri(uri);
        let request = if version == Version::HTTP_2 { request } else { request.header("host", address.to_string()) };
        request.body(body).unwrap()
    }

    async fn text(response: Response<Incoming>) -> String {
        String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
    }

    #[tokio::test]
    async fn bodies_stream_both_ways_by_http1_and_http2() {
        let read = Arc::new(Notify::new());
        let reading = Arc::clone(&read);
        let answer = move || {
            let read = Arc::clone(&reading);
            // The second piece is made when the first one has arrived.
            let second = stream::once(async move {
                read.notified().await;
                Ok::<_, std::io::Error>("two")
            });
            std::future::ready(Body::from_stream(stream::iter([Ok("one")]).chain(second)))
        };
        let count = |body: Body| async move {
            let pieces = body.into_data_stream();
            pieces.fold(0, async |sum, piece| sum + piece.map_or(0, |piece| piece.len())).await.to_string()
        };
        let router = Router::new().route("/answer", get(answer)).route("/count", post(count));
        let address = serve(router, Settings::default()).await;
        for version in [Version::HTTP_11, Version::HTTP_2] {
            let pieces = stream::iter((0..64).map(|_| Ok::<_, std::io::Error>(Bytes::from_static(&[7; MIB]))));
            let upload = request(version, address, "POST", "/count", Body::from_stream(pieces));
            assert_eq!(text(ask(address, version, upload).await).await, (64 * MIB).to_string());
            let mut body =
                ask(address, version, request(version, address, "GET", "/answer", Body::empty())).await.into_body();
            assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "one");
            read.notify_one();
            assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "two");
        }
    }

    #[tokio::test]
    async fn web_sockets_pass() {
        let echo = |upgrade: WebSocketUpgrade| async move {
            upgrade.on_upgrade(|mut socket| async move {
                while let Some(Ok(Message::Text(text))) = socket.recv().await {
                    socket.send(Message::Text(text)).await.ok();
                }
            })
        };
        let address = serve(Router::new().route("/echo", any(echo)), Settings::default()).await;
        let stream = TcpStream::connect(address).await.unwrap();
        let (mut socket, answer) =
            tokio_tungstenite::client_async(format!("ws://{address}/echo"), stream).await.unwrap();
        assert_eq!(answer.status(), StatusCode::SWITCHING_PROTOCOLS);
        for _ in 0..3 {
            socket.send(tungstenite::Message::text("hello")).await.unwrap();
            assert_eq!(socket.next().await.unwrap().unwrap(), tungstenite::Message::text("hello"));
        }
    }

    #[tokio::test]
    async fn who_asks_is_the_other_end_or_whom_a_trusted_proxy_names() {
        let who = |Extension(visitor): Extension<Visitor>| async move { visitor.address.to_string() };
        let router = Router::new().route("/", get(who));
        let trusting = Settings { trusted_proxies: vec!["127.0.0.0/8".parse().unwrap()], ..Settings::default() };
        for (settings, expected) in [(Settings::default(), "127.0.0.1"), (trusting, "192.0.2.7")] {
            let address = serve(router.clone(), settings).await;
            let mut asked = request(Version::HTTP_11, address, "GET", "/", Body::empty());
            asked.headers_mut().insert("x-forwarded-for", "192.0.2.7".parse().unwrap());
            assert_eq!(text(ask(address, Version::HTTP_11, asked).await).await, expected);
        }
    }
}
