//! Connections to sandboxes are kept, never mixed, and replaced when they have ended; visitors' connections have limits.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use heyvm_edge::Settings;
use http::{Request, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::*;

#[tokio::test]
async fn requests_one_after_another_share_a_connection() {
    let proxy = Proxy::of(app(|_| async { Response::new(full("ok")) }).await).await;
    for _ in 0..10 {
        assert_eq!(proxy.get("/").await, (200, "ok".into()));
    }
    assert_eq!(proxy.connections(), 1);
}

#[tokio::test]
async fn sandboxes_never_share_connections() {
    let one = app(|_| async { Response::new(full("one")) }).await;
    let two = app(|_| async { Response::new(full("two")) }).await;
    let places = [("app", Place::At(one, "s1")), ("b", Place::At(two, "s2"))];
    let proxy = Proxy::start(&places, Settings::default()).await;
    for _ in 0..3 {
        assert_eq!(proxy.get("/").await.1, "one");
        assert_eq!(text(proxy.send(get("b.localhost", "/")).await).await.1, "two");
    }
    // The subdomain leads elsewhere from one request to the next, as with a replacement.
    proxy.sandboxes.places.lock().unwrap().insert("app".into(), Place::At(two, "s2"));
    assert_eq!(proxy.get("/").await.1, "two");
    proxy.sandboxes.places.lock().unwrap().remove("app");
    assert_eq!(proxy.get("/").await.0, 404, "a kept connection does not outlive the binding");
    assert_eq!(proxy.connections(), 2);
}

/// An app that ends each kept connection when its second request comes, without an answer.
async fn forgetful(requests: Arc<AtomicUsize>) -> std::net::SocketAddr {
    bare(move |mut stream| {
        let requests = Arc::clone(&requests);
        async move {
            read_head(&mut stream).await.unwrap();
            requests.fetch_add(1, Ordering::SeqCst);
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
            if read_head(&mut stream).await.is_some() {
                requests.fetch_add(1, Ordering::SeqCst);
            }
        }
    })
    .await
}

#[tokio::test]
async fn a_connection_that_ends_before_an_answer_is_replaced_where_the_body_can_be_sent_again() {
    let requests = Arc::new(AtomicUsize::new(0));
    let proxy = Proxy::of(forgetful(Arc::clone(&requests)).await).await;
    for _ in 0..3 {
        assert_eq!(proxy.get("/").await, (200, "ok".into()));
    }
    assert_eq!(requests.load(Ordering::SeqCst), 5, "first, then twice a lost and a repeated one");
    let post = |length: usize| {
        let body = full(vec![b'x'; length]);
        Request::post("/").header("host", "app.localhost").body(body).unwrap()
    };
    assert_eq!(proxy.send(post(3)).await.status(), 200);
    assert_eq!(requests.load(Ordering::SeqCst), 7, "once lost, once repeated");
    // One that cannot be sent again goes by a connection on which nothing can get lost.
    assert_eq!(proxy.send(post(1 << 20)).await.status(), 200);
    assert_eq!(requests.load(Ordering::SeqCst), 8);
}

#[tokio::test]
async fn an_answer_that_has_begun_is_not_asked_for_again() {
    let requests = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&requests);
    let proxy = Proxy::of(
        bare(move |mut stream| {
            let requests = Arc::clone(&counted);
            async move {
                read_head(&mut stream).await.unwrap();
                requests.fetch_add(1, Ordering::SeqCst);
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
                if read_head(&mut stream).await.is_some() {
                    requests.fetch_add(1, Ordering::SeqCst);
                    stream.write_all(b"HTTP/1.1 2").await.unwrap();
                }
            }
        })
        .await,
    )
    .await;
    assert_eq!(proxy.get("/").await.0, 200);
    assert_eq!(proxy.get("/").await.0, 502);
    assert_eq!(requests.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_connection_is_not_kept_for_as_long_as_the_app_says_it_keeps_it() {
    let proxy = Proxy::of(
        bare(|mut stream| async move {
            while read_head(&mut stream).await.is_some() {
                let answer = b"HTTP/1.1 200 OK\r\nkeep-alive: timeout=1, max=9\r\ncontent-length: 2\r\n\r\nok";
                stream.write_all(answer).await.unwrap();
            }
        })
        .await,
    )
    .await;
    for _ in 0..3 {
        assert_eq!(proxy.get("/").await.0, 200);
    }
    assert_eq!(proxy.connections(), 3);
    assert!(Settings::default().idle_time < Duration::from_secs(5), "as Node's servers keep them");
}

#[tokio::test]
async fn a_connection_that_ended_while_idle_is_noticed() {
    let proxy = Proxy::of(
        bare(|mut stream| async move {
            read_head(&mut stream).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
        })
        .await,
    )
    .await;
    for _ in 0..5 {
        let post = Request::post("/").header("host", "app.localhost").body(empty()).unwrap();
        assert_eq!(proxy.send(post).await.status(), 200);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(proxy.connections(), 5);
}

#[tokio::test]
async fn one_sandbox_cannot_take_anothers_room() {
    let slow = bare(|mut stream| async move {
        read_head(&mut stream).await;
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.ok();
    })
    .await;
    let quick = app(|_| async { Response::new(full("ok")) }).await;
    let settings = Settings { requests_per_sandbox: 3, ..Settings::default() };
    let proxy = Proxy::start(&[("slow", Place::At(slow, "s1")), ("app", Place::At(quick, "s2"))], settings).await;
    let mut waiting = Vec::new();
    for _ in 0..3 {
        let mut stream = proxy.connect().await;
        stream.write_all(b"GET / HTTP/1.1\r\nhost: slow.localhost\r\n\r\n").await.unwrap();
        waiting.push(stream);
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let busy = proxy.send(get("slow.localhost", "/")).await;
    assert_eq!((busy.status().as_u16(), &busy.headers()["retry-after"]), (503, &"1".parse().unwrap()));
    assert_eq!(proxy.get("/").await.0, 200);
    drop(waiting);
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut again = proxy.connect().await;
    again.write_all(b"GET / HTTP/1.1\r\nhost: slow.localhost\r\n\r\n").await.unwrap();
    let nothing = tokio::time::timeout(Duration::from_millis(200), again.read_u8()).await;
    assert!(nothing.is_err(), "there is room again");
}

#[tokio::test]
async fn a_visitor_that_never_finishes_its_head_is_let_go() {
    let settings = Settings { header_timeout: Duration::from_millis(300), ..Settings::default() };
    let proxy = Proxy::start(&[], settings).await;
    for beginning in ["", "G", "PRI * HT", "GET / HTTP/1.1\r\nhost: app"] {
        let started = Instant::now();
        let mut stream = proxy.connect().await;
        stream.write_all(beginning.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        tokio::time::timeout(Duration::from_secs(5), read).await.expect("the connection ends").ok();
        assert!(started.elapsed() >= Duration::from_millis(250), "{beginning:?}: {:?}", started.elapsed());
    }
}

#[tokio::test]
async fn beyond_the_limit_visitors_wait() {
    let quick = app(|_| async { Response::new(full("ok")) }).await;
    let settings = Settings { connections: 2, ..Settings::default() };
    let proxy = Proxy::start(&[("app", Place::At(quick, "s"))], settings).await;
    let (one, _two) = (proxy.connect().await, proxy.connect().await);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut third = proxy.connect().await;
    third.write_all(b"GET / HTTP/1.1\r\nhost: app.localhost\r\n\r\n").await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(200), third.read_u8()).await.is_err());
    drop(one);
    assert_eq!(tokio::time::timeout(Duration::from_secs(5), third.read_u8()).await.unwrap().unwrap(), b'H');
}

#[tokio::test]
async fn a_shutdown_lets_requests_end_and_then_ends_the_rest() {
    let slow = app(|request| async move {
        let wait = if request.uri().path() == "/for-ever" { 60_000 } else { 400 };
        tokio::time::sleep(Duration::from_millis(wait)).await;
        Response::new(full("late"))
    })
    .await;
    let settings = Settings { grace: Duration::from_secs(1), ..Settings::default() };
    let proxy = Proxy::start(&[("app", Place::At(slow, "s"))], settings).await;
    let _idle = proxy.connect().await;
    let ending = proxy.send(get("app.localhost", "/"));
    let mut endless = proxy.connect().await;
    endless.write_all(b"GET /for-ever HTTP/1.1\r\nhost: app.localhost\r\n\r\n").await.unwrap();
    let shutdown = proxy.shutdown.clone();
    let asked = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        shutdown.cancel();
    };
    let (response, ()) = tokio::join!(ending, asked);
    assert_eq!(text(response).await.1, "late");
    let address = proxy.address;
    tokio::time::timeout(Duration::from_secs(5), proxy.served).await.unwrap().unwrap();
    assert!(tokio::net::TcpStream::connect(address).await.is_err(), "nobody listens any more");
}
