//! The client against a real server over TLS: who asks goes with every call, connections are kept, errors name the server.
#![allow(clippy::unwrap_used)]

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use futures::{SinkExt, StreamExt};
use heyvm_api::{
    ErrorCode,
    client::{Client, Remote, Server, empty},
    headers,
};
use http::{Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore, ServerConfig, pki_types::PrivateKeyDer};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::tungstenite::{Message, protocol::Role};

type Answer = Response<Full<bytes::Bytes>>;

fn text(request: &Request<Incoming>, name: impl header::AsHeaderName) -> String {
    request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
}

async fn answer(request: Request<Incoming>) -> Result<Answer, Infallible> {
    let path = request.uri().path().to_owned();
    let who = format!("{} for {}", text(&request, header::AUTHORIZATION), text(&request, headers::ACCOUNT));
    let plain = |status: StatusCode, body: String| {
        let response = Response::builder().status(status).body(Full::new(body.into()));
        Ok(response.unwrap())
    };
    match path.as_str() {
        "/base/who" => plain(StatusCode::OK, format!("{:?}", format!("{who} at {}", text(&request, header::HOST)))),
        "/base/proxy" => plain(StatusCode::BAD_GATEWAY, "<html>nginx</html>".into()),
        "/base/page" => plain(StatusCode::OK, "<html>".into()),
        "/base/raw" | "/base/socket" => {
            let key = text(&request, header::SEC_WEBSOCKET_KEY);
            let accept = tokio_tungstenite::tungstenite::handshake::derive_accept_key(key.as_bytes());
            let is_socket = !key.is_empty();
            tokio::spawn(async move {
                let mut stream = TokioIo::new(hyper::upgrade::on(request).await.unwrap());
                if is_socket {
                    let mut socket =
                        tokio_tungstenite::WebSocketStream::from_raw_socket(stream, Role::Server, None).await;
                    socket.send(Message::text(who)).await.unwrap();
                } else {
                    stream.write_all(who.as_bytes()).await.unwrap();
                    stream.shutdown().await.unwrap();
                }
            });
            let kind = if is_socket { "websocket" } else { "heyvm-stream" };
            let response = Response::builder().status(StatusCode::SWITCHING_PROTOCOLS);
            let response = response.header(header::CONNECTION, "upgrade").header(header::UPGRADE, kind);
            Ok(response.header(header::SEC_WEBSOCKET_ACCEPT, accept).body(Full::default()).unwrap())
        }
        _ => plain(StatusCode::NOT_FOUND, r#"{"error":{"code":"not_found","message":"nothing"}}"#.into()),
    }
}

struct Cloud {
    url: String,
    trusting: Arc<ClientConfig>,
    connections: Arc<AtomicUsize>,
}

/// A server with a certificate for `localhost` that only `trusting` trusts.
async fn cloud() -> Cloud {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let server = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions();
    let server = server.unwrap().with_no_client_auth().with_single_cert(vec![made.cert.der().clone()], key).unwrap();
    let client = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://user:secret@localhost:{}/base/", listener.local_addr().unwrap().port());
    let connections = Arc::new(AtomicUsize::new(0));
    let (acceptor, count) = (TlsAcceptor::from(Arc::new(server)), Arc::clone(&connections));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, count) = (acceptor.clone(), Arc::clone(&count));
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                count.fetch_add(1, Ordering::Relaxed);
                let serving = hyper::server::conn::http1::Builder::new();
                serving.serve_connection(TokioIo::new(stream), service_fn(answer)).with_upgrades().await.ok();
            });
        }
    });
    Cloud { url, trusting: Arc::new(client.with_root_certificates(roots).with_no_client_auth()), connections }
}

impl Cloud {
    fn client(&self, tls: Option<Arc<ClientConfig>>) -> Client {
        let remote = Remote { url: self.url.parse().unwrap(), tls };
        Client::new(Server::Remote(remote)).with_bearer("t0ken").unwrap().for_account("acme").unwrap()
    }
}

#[tokio::test]
async fn who_asks_goes_with_every_call_and_connections_are_kept() {
    let cloud = cloud().await;
    let client = cloud.client(Some(Arc::clone(&cloud.trusting)));
    for _ in 0..3 {
        let who: String = client.get("/who").await.unwrap();
        assert!(who.starts_with("Bearer t0ken for acme at localhost:"), "{who}");
    }
    let plain: String = client.post_with_progress("/who", &(), None, |_| {}).await.unwrap();
    assert!(plain.contains("acme"), "an answer without progress is one, too: {plain}");
    assert_eq!(cloud.connections.load(Ordering::Relaxed), 1);
    let mut socket = client.websocket("/socket").await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::text("Bearer t0ken for acme"));
    let request = Request::get("/raw").header(header::CONNECTION, "upgrade").header(header::UPGRADE, "heyvm-stream");
    let mut response = client.send(request.body(empty()).unwrap()).await.unwrap();
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    let mut said = String::new();
    TokioIo::new(hyper::upgrade::on(&mut response).await.unwrap()).read_to_string(&mut said).await.unwrap();
    assert_eq!(said, "Bearer t0ken for acme");
    assert!(!format!("{client:?}").contains("t0ken") && !format!("{client:?}").contains("secret"), "{client:?}");
}

#[tokio::test]
async fn errors_name_the_server_and_keep_secrets() {
    let cloud = cloud().await;
    let client = cloud.client(Some(Arc::clone(&cloud.trusting)));
    let nobody = Remote { url: "http://127.0.0.1:1/".parse().unwrap(), tls: None };
    let nobody = Client::new(Server::Remote(nobody)).with_bearer("t0ken").unwrap();
    let failures = [
        (client.get::<String>("/proxy").await, ErrorCode::DaemonUnavailable, "502"),
        (client.get::<String>("/page").await, ErrorCode::DaemonUnavailable, "not what it should be"),
        (cloud.client(None).get("/who").await, ErrorCode::DaemonUnavailable, "certificate"),
        (nobody.get("/who").await, ErrorCode::DaemonUnavailable, "127.0.0.1:1 cannot be reached"),
    ];
    for (failure, code, part) in failures {
        let error = failure.unwrap_err();
        assert_eq!(error.code, code, "{error:?}");
        assert!(error.message.contains(part) && error.message.contains("the server at http"), "{error:?}");
        let all = format!("{error:?}");
        assert!(error.hint.is_some() && !all.contains("t0ken") && !all.contains("secret"), "{all}");
    }
    let ours = client.get::<String>("/nothing").await.unwrap_err();
    assert_eq!((ours.code, ours.message.as_str()), (ErrorCode::NotFound, "nothing"));
    assert_eq!(client.clone().with_bearer("a\nb").unwrap_err().code, ErrorCode::Unauthorized);
}

/// As a stopped process does: the kernel takes connections for it.
#[tokio::test]
async fn server_that_takes_connections_and_says_nothing_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    let client = Client::new(Server::Remote(Remote { url, tls: None }));
    let error = client.get::<serde_json::Value>("/sandboxes").await.unwrap_err();
    assert!(error.code == ErrorCode::DaemonUnavailable && error.message.ends_with("does not answer"), "{error}");
}
