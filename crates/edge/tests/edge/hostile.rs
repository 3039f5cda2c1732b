//! Requests that are made to harm: refused or made harmless, never a 5xx of ours, and the next visitor notices nothing.

use std::time::Duration;

use heyvm_edge::Settings;
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{protocols::mirror, support::*};

/// Bytes on a connection of their own, and what came back until its end, which comes at the latest when the visitor has
/// heard nothing for a while and ends it.
async fn sent(proxy: &Proxy, bytes: &[u8]) -> String {
    let mut stream = proxy.connect().await;
    // It may be closed before all is sent.
    stream.write_all(bytes).await.ok();
    let (mut answer, mut piece) = (Vec::new(), [0; 4096]);
    while let Ok(read) = tokio::time::timeout(Duration::from_millis(700), stream.read(&mut piece)).await {
        match read {
            Ok(0) | Err(_) => break,
            Ok(length) => answer.extend_from_slice(&piece[..length]),
        }
    }
    stream.shutdown().await.ok();
    let read = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await;
    assert!(read.is_ok(), "the connection ends");
    String::from_utf8_lossy(&answer).into_owned()
}

fn statuses(answer: &str) -> Vec<u16> {
    let heads = answer.match_indices("HTTP/1.").filter_map(|(at, _)| answer.get(at + 9..at + 12)?.parse().ok());
    heads.collect()
}

async fn counting() -> Proxy {
    Proxy::of(
        app(|request| async move {
            let path = request.uri().to_string();
            match request.into_body().collect().await {
                Ok(body) => Response::new(full(format!("[{path}] {} bytes", body.to_bytes().len()))),
                Err(_) => Response::builder().status(StatusCode::IM_A_TEAPOT).body(empty()).unwrap(),
            }
        })
        .await,
    )
    .await
}

#[tokio::test]
async fn broken_framing_is_the_visitors_fault() {
    let proxy = counting().await;
    let post = |framing: &str, body: &str| format!("POST / HTTP/1.1\r\nhost: app.localhost\r\n{framing}\r\n\r\n{body}");
    let smuggled = "GET /smuggled HTTP/1.1\r\nhost: app.localhost\r\n\r\n";
    let chunked = "transfer-encoding: chunked";
    let cases = [
        post(chunked, "xyz\r\n"),
        post(chunked, "ffffffffffffffffff\r\nabc"),
        post(chunked, "-1\r\nabc\r\n0\r\n\r\n"),
        post(chunked, "0x3\r\nabc\r\n0\r\n\r\n"),
        post(chunked, "3\nabc\n0\n\n"),
        post(chunked, "3\r\nabcd\r\n0\r\n\r\n"),
        post(chunked, &format!("3;{}\r\nabc\r\n0\r\n\r\n", "x".repeat(64 << 10))),
        post("content-length: 99999999999999999999", "abc"),
        post("content-length: -1", smuggled),
        post("content-length: 0x10", smuggled),
        post("content-length:\u{a0}3", "abc"),
        post("transfer-encoding: chunked, chunked", "0\r\n\r\n"),
        post("transfer-encoding: gzip, chunked", "0\r\n\r\n"),
        post("transfer-encoding: xchunked", smuggled),
        post("transfer-encoding: \u{b}chunked", smuggled),
        post("transfer-encoding : chunked", smuggled),
        post(" transfer-encoding: chunked", smuggled),
        post("transfer-encoding: identity", smuggled),
    ];
    for case in cases {
        let answer = sent(&proxy, case.as_bytes()).await;
        let statuses = statuses(&answer);
        assert!(statuses.len() == 1 && (400..500).contains(&statuses[0]), "{case:.200?}: {answer}");
        assert!(!answer.contains("smuggled"), "{case:.200?}: {answer}");
    }
    for torn in [post(chunked, "3\r\nab"), post("content-length: 10", "abc")] {
        let answer = sent(&proxy, torn.as_bytes()).await;
        assert!(statuses(&answer).iter().all(|status| (400..500).contains(status)), "{torn:?}: {answer}");
    }
    assert_eq!(proxy.get("/").await.0, 200, "the next visitor notices nothing");
}

#[tokio::test]
async fn a_body_that_stops_coming_is_not_waited_for_for_ever() {
    let settings = Settings { body_timeout: Duration::from_millis(300), ..Settings::default() };
    let reading = app(|request| async move {
        request.into_body().collect().await.ok();
        Response::new(full("read"))
    })
    .await;
    let proxy = Proxy::start(&[("app", Place::At(reading, "s1"))], settings).await;
    let answer = sent(&proxy, b"POST / HTTP/1.1\r\nhost: app.localhost\r\ncontent-length: 10\r\n\r\nabc").await;
    assert_eq!(statuses(&answer), [408], "{answer}");
}

#[tokio::test]
async fn odd_but_valid_framing_reaches_the_app_in_the_usual_form() {
    let proxy = counting().await;
    for (framing, body, length) in [
        ("transfer-encoding: chunked", "3;name=\"value\"\r\nabc\r\n0;last\r\n\r\n", 3),
        ("transfer-encoding: Chunked", "0003\r\nabc\r\n0\r\n\r\n", 3),
        ("transfer-encoding: chunked", "3\r\nabc\r\n0\r\nx-trailer: 1\r\n\r\n", 3),
        ("content-length: 3\r\ncontent-length: 3", "abc", 3),
    ] {
        let request =
            format!("POST /x HTTP/1.1\r\nhost: app.localhost\r\nconnection: close\r\n{framing}\r\n\r\n{body}");
        let answer = sent(&proxy, request.as_bytes()).await;
        let statuses = statuses(&answer);
        assert!(statuses == [200] && answer.contains(&format!("[/x] {length} bytes")) || statuses == [400], "{answer}");
    }
    let bare = sent(&proxy, b"GET /y HTTP/1.1\nhost: app.localhost\nconnection: close\n\n").await;
    assert!(statuses(&bare) == [200] || statuses(&bare) == [400], "{bare}");
}

#[tokio::test]
async fn paths_are_the_apps_own_matter_and_arrive_as_they_were_sent() {
    let proxy = Proxy::of(app(mirror).await).await;
    for path in
        ["/../../etc/passwd", "/%2e%2e/%2E%2e/x", "/a%00b", "//evil.org/x", "/a/./b//c", "/%ff%fe", "/a;b=c?d=/../e"]
    {
        let (status, told) = proxy.get(path).await;
        assert!(status == 200 && told.starts_with(&format!("GET {path} HTTP/1.1\n")), "{path}: {told}");
    }
    let one = |target: &str| format!("GET {target} HTTP/1.1\r\nhost: app.localhost\r\nconnection: close\r\n\r\n");
    for target in [
        "",
        "*",
        "app.localhost:80",
        "http://",
        "http://[::1/",
        "http://other.org/x",
        "ftp://x.app.localhost/",
        "/a b",
        "/\u{7f}",
        "\\\\x",
    ] {
        let answer = sent(&proxy, one(target).as_bytes()).await;
        let statuses = statuses(&answer);
        assert!(statuses.len() == 1 && statuses[0] < 500, "{target:?}: {answer}");
        assert!(!answer.contains("host: other"), "{target:?}: {answer}");
    }
}

#[tokio::test]
async fn hosts_that_play_games_lead_nowhere() {
    let proxy = Proxy::of(app(mirror).await).await;
    for host in [
        "app.localhost@evil.org",
        "evil.org#app.localhost",
        "evil.org?app.localhost",
        "evil.org/app.localhost",
        "app.localhost,evil.org",
        "app.localhost evil.org",
        "app.localhost:80:80",
        "app.localhost:-1",
        "app.localhost\0",
        "app%2elocalhost",
        "..localhost",
        ".app.localhost",
        "app.localhost..",
        "xn--app.localhost.evil.org",
        "[::1]",
        "[app.localhost",
        "\u{ff41}pp.localhost",
    ] {
        let answer =
            sent(&proxy, format!("GET / HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n").as_bytes()).await;
        let statuses = statuses(&answer);
        assert!(statuses.len() == 1 && (400..500).contains(&statuses[0]), "{host:?}: {answer}");
    }
    let two = b"GET http://app.localhost/ HTTP/1.1\r\nhost: evil.org\r\nconnection: close\r\n\r\n";
    assert_eq!(statuses(&sent(&proxy, two).await), [400]);
    assert_eq!(proxy.connections(), 0);
}

#[tokio::test]
async fn ten_thousand_headers_are_431() {
    let proxy = counting().await;
    let many = format!("GET / HTTP/1.1\r\nhost: app.localhost\r\n{}\r\n", "x: y\r\n".repeat(10_000));
    assert!(statuses(&sent(&proxy, many.as_bytes()).await).iter().all(|status| *status == 431));
    let endless = format!("GET /{} HTTP/1.1\r\n", "a".repeat(1 << 20));
    assert!(statuses(&sent(&proxy, endless.as_bytes()).await).iter().all(|status| matches!(status, 414 | 431)));
    assert_eq!(proxy.connections(), 0);
}

// HTTP/2, frame by frame (RFC 9113, section 4.1).

const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Fields as literals that no table knows (RFC 7541, section 6.2.2).
fn fields(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            assert!(text.len() < 127);
            block.push(u8::try_from(text.len()).unwrap());
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
}

const GOOD: [(&str, &str); 4] =
    [(":method", "GET"), (":scheme", "http"), (":authority", "app.localhost"), (":path", "/")];

async fn begun(proxy: &Proxy) -> TcpStream {
    let mut stream = proxy.connect().await;
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    stream.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
    stream
}

/// The first answer to stream 1: the kind of its frame and the first byte of it; nothing when the connection ended.
async fn answered(stream: &mut TcpStream) -> Option<(u8, u8)> {
    loop {
        let mut head = [0; 9];
        let read = tokio::time::timeout(Duration::from_secs(10), stream.read_exact(&mut head));
        read.await.expect("an answer, or the end").ok()?;
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        stream.read_exact(&mut payload).await.ok()?;
        if matches!(head[3], HEADERS | RST_STREAM | GOAWAY) {
            return Some((head[3], *payload.first().unwrap_or(&0)));
        }
    }
}

#[tokio::test]
async fn http2_pseudo_headers_that_play_games_are_refused() {
    let proxy = Proxy::of(app(mirror).await).await;
    let with = |extra: &[(&'static str, &'static str)]| [&GOOD[..], extra].concat();
    let without = |name: &str| GOOD.into_iter().filter(|(own, _)| *own != name).collect::<Vec<_>>();
    let cases = [
        without(":method"),
        without(":path"),
        without(":authority"),
        with(&[(":path", "/two")]),
        with(&[(":method", "POST")]),
        with(&[(":authority", "other.localhost")]),
        with(&[(":status", "200")]),
        with(&[(":unknown", "x")]),
        [&[("x-first", "1")], &GOOD[..]].concat(),
        with(&[("host", "other.localhost")]),
        with(&[("X-Upper", "1")]),
        with(&[("connection", "keep-alive")]),
        with(&[("transfer-encoding", "chunked")]),
        with(&[("te", "gzip")]),
        with(&[("x", "a\r\nb: c")]),
        with(&[("x\r\ny", "1")]),
        with(&[("content-length", "5")]),
        with(&[("content-length", "1"), ("content-length", "2")]),
        [&without(":authority")[..], &[(":authority", "user@app.localhost")]].concat(),
        [&without(":path")[..], &[(":path", "")]].concat(),
        [&without(":path")[..], &[(":path", "no-slash")]].concat(),
        [&without(":method")[..], &[(":method", "CONNECT")]].concat(),
        [&without(":method")[..], &[(":method", "G T")]].concat(),
    ];
    for case in cases {
        let mut stream = begun(&proxy).await;
        let headers = frame(HEADERS, END_HEADERS | END_STREAM, 1, &fields(&case));
        stream.write_all(&headers).await.unwrap();
        let answer = answered(&mut stream).await;
        // 400 and 404 in the static table.
        let refused = matches!(answer, None | Some((RST_STREAM | GOAWAY, _)) | Some((HEADERS, 0x8c | 0x8d)));
        assert!(refused, "{case:?}: {answer:?}");
    }
    assert_eq!(proxy.connections(), 0, "nothing of it reached the app");
    let mut stream = begun(&proxy).await;
    stream.write_all(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &fields(&GOOD))).await.unwrap();
    assert_eq!(answered(&mut stream).await, Some((HEADERS, 0x88)), "200 for the same without games");
}

#[tokio::test]
async fn rapid_resets_and_endless_headers_end_their_connection_alone() {
    let settings = Settings { connections: 64, ..Settings::default() };
    let slow = app(|_| async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        Response::new(full("ok"))
    })
    .await;
    let proxy = Proxy::start(&[("app", Place::At(slow, "s1"))], settings).await;
    let block = fields(&GOOD);
    let mut resets = begun(&proxy).await;
    let mut broken = false;
    for number in 0..20_000u32 {
        let stream = number * 2 + 1;
        let mut pair = frame(HEADERS, END_HEADERS | END_STREAM, stream, &block);
        pair.extend(frame(RST_STREAM, 0, stream, &8u32.to_be_bytes()));
        if resets.write_all(&pair).await.is_err() {
            broken = true;
            break;
        }
    }
    let goodbye = async {
        loop {
            match answered(&mut resets).await {
                None | Some((GOAWAY, _)) => return true,
                Some(_) => {}
            }
        }
    };
    assert!(broken || tokio::time::timeout(Duration::from_secs(10), goodbye).await.is_ok(), "it is put an end to");
    assert!(proxy.connections() < 2_000, "few of them reached the app: {}", proxy.connections());

    let mut endless = begun(&proxy).await;
    endless.write_all(&frame(HEADERS, END_STREAM, 1, &block)).await.unwrap();
    let more = frame(CONTINUATION, 0, 1, &fields(&[("x-more", &"y".repeat(100))]).repeat(100));
    let mut taken = 0usize;
    while taken < 64 << 20 && endless.write_all(&more).await.is_ok() {
        taken += more.len();
    }
    assert!(taken < 64 << 20, "an endless head is not read for ever");
    let request = Request::get("/").header("host", "app.localhost").body(empty()).unwrap();
    let after = tokio::time::timeout(Duration::from_secs(5), proxy.send(request)).await.unwrap();
    assert_eq!(after.status(), 200, "the next visitor notices nothing");
}
