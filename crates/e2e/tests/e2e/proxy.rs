//! The edge proxy in front of a real VM.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use heyvm_e2e::{Host, apps::WEB_FLAGS, http};
use http_body_util::BodyExt;
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio_tungstenite::tungstenite::Message;

#[test]
fn an_unknown_subdomain_is_404() {
    let host = Host::new();
    let vm = host.deploy(&host.web_app(), &WEB_FLAGS);
    let stranger = vm.url("/").replacen("http://", "http://nobody-", 1);
    assert_eq!(http::get(&stranger).status, 404);
    let as_json = http::call("GET", &stranger, &[("accept", "application/json")], "");
    assert_eq!(as_json.status, 404);
    assert!(as_json.json()["error"]["message"].is_string());
}

#[test]
fn where_nothing_listens_the_answer_is_502_readable_for_people_and_programs() {
    let host = Host::new();
    let vm = host.deploy(&host.web_app(), &["--port", "8080"]);
    let page = http::call("GET", &vm.url("/"), &[("accept", "text/html")], "");
    assert_eq!(page.status, 502);
    assert!(page.header("content-type").starts_with("text/html"), "{:?}", page.headers);
    assert!(page.text().contains("8080"), "{}", page.text());
    let program = http::call("GET", &vm.url("/"), &[("accept", "application/json")], "");
    assert_eq!(program.status, 502);
    assert!(program.json()["error"]["code"].is_string(), "{}", program.text());
}

#[test]
fn an_app_that_does_not_answer_is_504_at_the_time_out() {
    let host = Host::new();
    host.configure("timeout_seconds = 2\n");
    let vm = host.deploy(&host.web_app(), &WEB_FLAGS);
    let started = Instant::now();
    assert_eq!(vm.get("/slow?30").status, 504);
    assert!(started.elapsed() < Duration::from_secs(29), "{:?}", started.elapsed());
    assert_eq!(vm.get("/slow?0.5").text(), "late", "a slow answer within the time arrives");
}

#[test]
fn websocket_messages_go_both_ways() {
    let host = Host::new();
    let vm = host.deploy(&host.web_app(), &WEB_FLAGS);
    http::block_on(async {
        let url: ::http::Uri = vm.url("/ws").parse().expect("URL");
        let stream = http::connect(&url).await.expect("connection");
        let address = vm.url("/ws").replacen("http", "ws", 1);
        let (mut socket, _) = tokio_tungstenite::client_async(address, stream).await.expect("handshake");
        for number in 0..20 {
            let text = format!("message {number}");
            socket.send(Message::text(&text)).await.expect("send");
            assert_eq!(socket.next().await.expect("answer").expect("message"), Message::text(text));
        }
        let large = Message::binary(vec![7u8; 20_000]);
        socket.send(large.clone()).await.expect("send");
        assert_eq!(socket.next().await.expect("answer").expect("message"), large);
        socket.close(None).await.expect("close");
    });
}

#[test]
fn server_sent_events_arrive_one_by_one() {
    let host = Host::new();
    let vm = host.deploy(&host.web_app(), &WEB_FLAGS);
    http::block_on(async {
        let request = ::http::Request::get(vm.url("/sse")).body(http::empty()).expect("request");
        let answer = http::send(request).await.expect("answer");
        assert_eq!(answer.headers()["content-type"], "text/event-stream");
        let (mut body, mut arrivals, mut text) = (answer.into_body(), Vec::new(), String::new());
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame.expect("frame").into_data() {
                text.push_str(&String::from_utf8_lossy(&data));
                arrivals.push(Instant::now());
            }
        }
        assert_eq!(text, "data: 0\n\ndata: 1\n\ndata: 2\n\ndata: 3\n\ndata: 4\n\n");
        let spread = arrivals[arrivals.len() - 1] - arrivals[0];
        assert!(spread > Duration::from_millis(500), "all at once: {spread:?}");
    });
}

#[test]
fn bodies_stream_in_both_directions_at_once() {
    let host = Host::new();
    let vm = host.deploy(&host.web_app(), &WEB_FLAGS);
    http::block_on(async {
        let (mut pieces, receiver) = futures::channel::mpsc::channel::<Bytes>(1);
        let body = http::streamed(tokio_stream_of(receiver));
        let request = ::http::Request::post(vm.url("/echo")).body(body).expect("request");
        let answering = tokio::spawn(http::send(request));
        pieces.send(Bytes::from_static(b"first ")).await.expect("send");
        let mut body = answering.await.expect("task").expect("answer").into_body();
        let first = body.frame().await.expect("frame").expect("frame").into_data().expect("data");
        assert_eq!(&first[..], b"first ", "comes back before the request has ended");
        pieces.send(Bytes::from_static(b"second")).await.expect("send");
        drop(pieces);
        assert_eq!(&body.collect().await.expect("rest").to_bytes()[..], b"second");
    });
}

/// hyper wants a body that may be shared between threads; a channel's receiver is one behind a lock.
fn tokio_stream_of(
    receiver: futures::channel::mpsc::Receiver<Bytes>,
) -> impl futures::Stream<Item = Bytes> + Send + Sync {
    sync_stream::SyncStream(std::sync::Mutex::new(receiver))
}

mod sync_stream {
    use std::{
        pin::Pin,
        sync::Mutex,
        task::{Context, Poll},
    };

    use futures::{Stream, StreamExt};

    pub struct SyncStream<S>(pub Mutex<S>);

    impl<S: Stream + Unpin> Stream for SyncStream<S> {
        type Item = S::Item;
        fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<S::Item>> {
            self.0.lock().expect("lock").poll_next_unpin(context)
        }
    }
}

#[test]
fn a_large_upload_flows_without_being_kept() {
    const PIECES: usize = 64;
    let host = Host::new();
    let app = host.web_app();
    let mut flags = WEB_FLAGS.to_vec();
    flags.extend(["--size-class", "small"]);
    let vm = host.deploy(&app, &flags);
    let daemon = host.daemon().expect("daemon").as_raw();
    let before = resident(daemon);
    let piece = Bytes::from(vec![0xa5u8; 1 << 20]);
    let mut digest = Sha256::new();
    (0..PIECES).for_each(|_| digest.update(&piece));
    let answer = http::block_on(async {
        let body = http::streamed(futures::stream::iter(vec![piece; PIECES]));
        let request = ::http::Request::post(vm.url("/digest")).body(body).expect("request");
        http::answer(http::send(request).await.expect("answer")).await.expect("body")
    });
    assert_eq!(answer.json(), json!({"bytes": PIECES << 20, "sha256": hex::encode(digest.finalize())}));
    let grown = resident(daemon).saturating_sub(before);
    assert!(grown < 32 * 1024, "the daemon grew by {grown} KiB");
    assert_eq!(vm.get("/big?5000000").body.len(), 5_000_000);
}

fn resident(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[test]
fn http2_reaches_the_app() {
    let host = Host::new();
    let vm = host.deploy(&host.web_app(), &WEB_FLAGS);
    http::block_on(async {
        let request =
            ::http::Request::get(vm.url("/headers")).header("x-mine", "yes").body(http::empty()).expect("request");
        let answer = http::send_http2(request).await.expect("answer");
        assert_eq!((answer.status(), answer.version()), (::http::StatusCode::OK, ::http::Version::HTTP_2));
        let headers = http::answer(answer).await.expect("body").json();
        assert_eq!(headers["x-mine"], "yes");
        assert!(
            vm.url("/").contains(headers["host"].as_str().expect("host")),
            "the app sees its own host name: {headers}"
        );
    });
}

#[test]
fn the_app_is_told_who_asks_and_hop_by_hop_headers_stay_behind() {
    let host = Host::new();
    let vm = host.deploy(&host.web_app(), &WEB_FLAGS);
    let asked = [("x-forwarded-for", "6.6.6.6"), ("connection", "x-secret"), ("x-secret", "1"), ("te", "gzip")];
    let headers = http::call("GET", &vm.url("/headers"), &asked, "").json();
    assert_eq!(headers["x-forwarded-proto"], "http");
    assert!(headers["x-forwarded-for"].as_str().is_some_and(|list| list.ends_with("127.0.0.1")), "{headers}");
    assert!(headers.get("x-secret").is_none(), "{headers}");
}

#[test]
fn many_requests_at_once() {
    let host = Host::new();
    let vm = host.deploy(&host.web_app(), &WEB_FLAGS);
    std::thread::scope(|scope| {
        let asking: Vec<_> =
            (0..8).map(|_| scope.spawn(|| (0..10).map(|_| vm.get("/health").status).collect::<Vec<_>>())).collect();
        for asked in asking {
            assert_eq!(asked.join().expect("thread"), [200; 10]);
        }
    });
}
