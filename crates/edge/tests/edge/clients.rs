//! What one client may hold: connections, streams, answers that it does not take.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use heyvm_edge::{Settings, Site, SiteBody};
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::*;

const PATIENCE: Duration = Duration::from_secs(120);

async fn ends(stream: &mut tokio::net::TcpStream) {
    let ended = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut Vec::new())).await;
    ended.expect("the connection goes on").ok();
}

#[tokio::test]
async fn one_client_cannot_take_all_connections() {
    let quick = app(|_| async { Response::new(full("ok")) }).await;
    let settings = Settings { connections: 20, connections_per_client: 3, ..Settings::default() };
    let proxy = Proxy::start(&[("app", Place::At(quick, "s"))], settings).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        let mut stream = proxy.connect().await;
        stream.write_all(b"GET / HTTP/1.1\r\nhost: app.localhost\r\n\r\n").await.unwrap();
        read_head(&mut stream).await.unwrap();
        held.push(stream);
    }
    ends(&mut proxy.connect().await).await;
    drop(held);
    // What is given back can be had again, if not in the same moment.
    let again = async {
        loop {
            let mut stream = proxy.connect().await;
            stream.write_all(b"GET / HTTP/1.1\r\nhost: app.localhost\r\n\r\n").await.ok();
            if read_head(&mut stream).await.is_some() {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, again).await.expect("no room again");
}

#[tokio::test]
async fn trusted_proxies_have_as_many_connections_as_they_want() {
    let quick = app(|_| async { Response::new(full("ok")) }).await;
    let trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
    let settings = Settings { connections_per_client: 1, trusted_proxies, ..Settings::default() };
    let proxy = Proxy::start(&[("app", Place::At(quick, "s"))], settings).await;
    let _held = [proxy.connect().await, proxy.connect().await];
    assert_eq!(proxy.get("/").await.0, 200);
}

#[tokio::test]
async fn an_http2_connection_without_streams_ends_and_one_with_a_stream_does_not() {
    let (sender, receiver) = tokio::sync::oneshot::channel::<()>();
    let waited = Arc::new(tokio::sync::Mutex::new(Some(receiver)));
    let app = app(move |request: Request<Incoming>| {
        let waited = Arc::clone(&waited);
        async move {
            if request.uri().path() == "/slow"
                && let Some(receiver) = waited.lock().await.take()
            {
                receiver.await.ok();
            }
            Response::new(full("ok"))
        }
    })
    .await;
    let settings = Settings { idle_timeout: Duration::from_millis(500), ..Settings::default() };
    let proxy = Proxy::start(&[("app", Place::At(app, "s"))], settings).await;
    let request = |path: &str| Request::get(format!("http://app.localhost{path}")).body(empty()).unwrap();

    let mut idle = proxy.http2().await;
    let mut busy = proxy.http2().await;
    assert_eq!(text(idle.send_request(request("/")).await.unwrap()).await.0, 200);
    assert_eq!(text(busy.send_request(request("/")).await.unwrap()).await.0, 200);
    let slow = tokio::spawn(busy.send_request(request("/slow")));
    let ended = async {
        while !idle.is_closed() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, ended).await.expect("the idle connection goes on");
    sender.send(()).unwrap();
    assert_eq!(text(slow.await.unwrap().unwrap()).await.0, 200);
}

struct Pages;

#[async_trait]
impl Site for Pages {
    fn has(&self, host: &str) -> bool {
        host == "login.localhost"
    }

    async fn answer(&self, _: Request<Incoming>) -> Response<SiteBody> {
        Response::new(Full::new(Bytes::from("log in")).map_err(|never| match never {}).boxed_unsync())
    }
}

#[tokio::test]
async fn the_sites_own_hosts_answer_when_sandboxes_have_all_connections() {
    let quick = app(|_| async { Response::new(full("ok")) }).await;
    let settings = Settings { connections: 2, connections_for_site: 4, ..Settings::default() };
    let proxy = Proxy::with(&[("app", Place::At(quick, "s"))], None, Some(Arc::new(Pages)), settings).await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut stream = proxy.connect().await;
        stream.write_all(b"GET / HTTP/1.1\r\nhost: app.localhost\r\n\r\n").await.unwrap();
        assert!(read_head(&mut stream).await.unwrap().starts_with("HTTP/1.1 200"));
        held.push(stream);
    }
    let refused = proxy.send(get("app.localhost", "/")).await;
    assert_eq!(
        (refused.status().as_u16(), &refused.headers()["heyvm-error"]),
        (503, &"too_many_connections".parse().unwrap())
    );
    assert_eq!(text(proxy.send(get("login.localhost", "/")).await).await, (200, "log in".into()));
}

/// An app whose answer has no end; counts the answers that go on.
async fn endless(open: Arc<AtomicUsize>) -> std::net::SocketAddr {
    bare(move |mut stream| {
        let open = Arc::clone(&open);
        async move {
            read_head(&mut stream).await.unwrap();
            open.fetch_add(1, Ordering::SeqCst);
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n").await.ok();
            while stream.write_all(&[b'x'; 64 << 10]).await.is_ok() {}
            open.fetch_sub(1, Ordering::SeqCst);
        }
    })
    .await
}

async fn until(open: &AtomicUsize, wanted: usize) {
    let reached = async {
        while open.load(Ordering::SeqCst) != wanted {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, reached).await.unwrap_or_else(|_| panic!("never {wanted}"));
}

#[tokio::test]
async fn an_answer_that_its_client_does_not_take_is_given_up_by_http1() {
    let open = Arc::new(AtomicUsize::new(0));
    let settings = Settings { body_timeout: Duration::from_secs(1), ..Settings::default() };
    let places = [("app", Place::At(endless(Arc::clone(&open)).await, "s"))];
    let proxy = Proxy::start(&places, settings).await;
    let mut stream = proxy.connect().await;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: app.localhost\r\n\r\n").await.unwrap();
    until(&open, 1).await;
    until(&open, 0).await;
}

#[tokio::test]
async fn an_answer_that_its_client_does_not_take_is_given_up_by_http2_and_no_other_is() {
    let open = Arc::new(AtomicUsize::new(0));
    let settings = Settings { body_timeout: Duration::from_secs(1), ..Settings::default() };
    let quick = app(|_| async { Response::new(full("ok")) }).await;
    let places = [("app", Place::At(endless(Arc::clone(&open)).await, "s")), ("quick", Place::At(quick, "q"))];
    let proxy = Proxy::start(&places, settings).await;
    let mut sender = proxy.http2().await;
    let request = |host: &str| Request::get(format!("http://{host}/")).body(empty()).unwrap();
    let mut untaken = sender.send_request(request("app.localhost")).await.unwrap();
    until(&open, 1).await;
    until(&open, 0).await;
    assert_eq!(text(sender.send_request(request("quick.localhost")).await.unwrap()).await, (200, "ok".into()));
    let rest = async { while let Some(Ok(_)) = untaken.body_mut().frame().await {} };
    tokio::time::timeout(PATIENCE, rest).await.expect("the answer goes on");
}
