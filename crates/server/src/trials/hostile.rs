//! Requests that are made to harm, byte by byte: each is refused or its connection ended, and the next one is served.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// How long an answer may keep one waiting who does not know whether there is more.
const SILENCE: Duration = Duration::from_millis(400);
const PATIENCE: Duration = Duration::from_secs(10);
const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nhost: localhost\r\n\r\n";

/// Sends all of them to the API at `address`; `post` is one of its calls that reads a JSON body.
pub async fn is_stood(address: SocketAddr, post: &str) {
    still_serves(address).await;
    let mut taken = Vec::new();
    for (what, request, allowed) in cases(post) {
        let answer = sent(address, &request).await;
        let statuses = statuses(&answer);
        let refused = statuses.len() < 2 && statuses.iter().all(|status| allowed.contains(status));
        if !refused || answer.contains("smuggled") {
            taken.push(format!("{what}: {answer:.300}"));
        }
    }
    assert!(taken.is_empty(), "{}", taken.join("\n"));
    still_serves(address).await;
}

type Case = (String, Vec<u8>, Vec<u16>);

fn cases(post: &str) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |what: &str, request: Vec<u8>, allowed: &[u16]| {
        cases.push((what.to_owned(), request, allowed.to_vec()));
    };
    let refusals: Vec<u16> = (400..500).collect();
    let get =
        |target: &str, head: &str| format!("GET {target} HTTP/1.1\r\n{head}connection: close\r\n\r\n").into_bytes();
    let local = "host: localhost\r\n";
    for (name, value, status) in [
        ("a header of 64 KiB", format!("x: {}\r\n", "y".repeat(64 << 10)), 431),
        ("1000 headers", "x: y\r\n".repeat(1000), 431),
        ("a zero byte in a header", "x: a\0b\r\n".into(), 400),
        ("a header without a name", ": y\r\n".into(), 400),
        ("a header without a colon", "x\r\n".into(), 400),
        ("a header with a space in its name", "x : y\r\n".into(), 400),
        ("a lone carriage return", "x: a\rb\r\n".into(), 400),
        ("a folded header", "x: a\r\n b\r\n".into(), 400),
    ] {
        add(name, get("/health", &format!("{local}{value}")), &[status]);
    }
    add("a path of 64 KiB", get(&format!("/{}", "a".repeat(64 << 10)), local), &[414, 431]);
    for target in TARGETS {
        add(target, get(target, local), &refusals);
    }
    for host in HOSTS {
        add(host, get("/health", &format!("host: {host}\r\n")), &[400]);
    }
    add("no host", get("/health", ""), &[400]);
    add("two hosts", get("/health", &local.repeat(2)), &[400]);
    add("another host in the target", get("http://evil.example/health", local), &[400]);
    for (framing, body) in framings() {
        let head = format!("POST {post} HTTP/1.1\r\n{local}content-type: application/json\r\n{framing}\r\n\r\n");
        add(&framing, [head.as_bytes(), body.as_bytes()].concat(), &refusals);
    }
    for line in LINES {
        add(line, format!("{line}\r\n{local}connection: close\r\n\r\n").into_bytes(), &refusals);
    }
    add("bare line feeds", b"GET /nothing HTTP/1.1\nhost: localhost\nconnection: close\n\n".to_vec(), &refusals);
    add("a handshake", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".repeat(50), &refusals);
    add("zeros", vec![0; 100_000], &refusals);
    cases
}

const TARGETS: [&str; 16] = [
    "/../../etc/passwd",
    "/%2e%2e/%2E%2e/etc/passwd",
    "/health/../sandboxes",
    "/sandboxes/./health",
    "/sandboxes/..%2f..%2fetc%2fpasswd",
    "/sandboxes/a%00b",
    "/sandboxes?filter=%00",
    "//evil.example/x",
    "/\u{7f}",
    "/a b",
    "",
    "*",
    "http://",
    "http://[::1/",
    "localhost:80",
    "\\\\x",
];

const HOSTS: [&str; 14] = [
    "",
    "a b",
    "localhost@evil.example",
    "evil.example#localhost",
    "evil.example?localhost",
    "evil.example/localhost",
    "localhost,evil.example",
    "localhost:80:80",
    "localhost:-1",
    "localhost:99999",
    "localhost\0",
    "local%68ost",
    "[localhost",
    "\u{ff4c}ocalhost",
];

/// First lines.
const LINES: [&str; 7] = [
    "GET",
    "GET /health",
    "GET /health HTTP/9.9",
    "G T /health HTTP/1.1",
    "CONNECT evil.example:443 HTTP/1.1",
    "TRACE /health HTTP/1.1",
    "GET /health HTTP/1.1 ",
];

/// Framings of a body that are none, or two.
fn framings() -> Vec<(String, String)> {
    let chunked = "transfer-encoding: chunked";
    let lengths = ["99999999999999999999", "-1", "0x10", "1, 2", "", "+3"];
    let codings = ["chunked, chunked", "gzip, chunked", "xchunked", "\u{b}chunked", "identity", "chunked;x"];
    let of = |framing: String, body: &str| (framing, body.to_owned());
    let mut framings: Vec<_> = lengths.map(|length| of(format!("content-length: {length}"), SMUGGLED)).into();
    framings.extend(codings.map(|coding| of(format!("transfer-encoding: {coding}"), SMUGGLED)));
    framings.extend(
        ["xyz\r\n", "ffffffffffffffffff\r\nabc", "-1\r\nabc\r\n0\r\n\r\n", "3\r\nabcd\r\n0\r\n\r\n", "3\nabc\n0\n\n"]
            .map(|body| of(chunked.into(), body)),
    );
    framings.extend([
        of("content-length: 3\r\ncontent-length: 4".into(), SMUGGLED),
        of(format!("content-length: 3\r\n{chunked}"), &format!("0\r\n\r\n{SMUGGLED}")),
        of(format!("{chunked}\r\ncontent-length: 3"), &format!("0\r\n\r\n{SMUGGLED}")),
        of(format!("{chunked}\r\n{chunked}"), &format!("0\r\n\r\n{SMUGGLED}")),
        of(" transfer-encoding: chunked".into(), SMUGGLED),
        of("transfer-encoding : chunked".into(), SMUGGLED),
        of(chunked.into(), &format!("3;{}\r\nabc\r\n0\r\n\r\n", "x".repeat(64 << 10))),
    ]);
    framings
}

async fn still_serves(address: SocketAddr) {
    let answer = sent(address, b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await;
    assert_eq!(statuses(&answer), [200], "{answer}");
}

/// What came back, until nothing more does.
async fn sent(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // It may be closed before all is sent.
    stream.write_all(request).await.ok();
    let (mut answer, mut piece) = (Vec::new(), [0; 4096]);
    while let Ok(Ok(length @ 1..)) = tokio::time::timeout(SILENCE, stream.read(&mut piece)).await {
        answer.extend_from_slice(&piece[..length]);
    }
    stream.shutdown().await.ok();
    let ended = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
    assert!(ended.is_ok(), "the connection ends: {:?}", String::from_utf8_lossy(request));
    String::from_utf8_lossy(&answer).into_owned()
}

fn statuses(answer: &str) -> Vec<u16> {
    let heads = answer.match_indices("HTTP/1.").filter_map(|(at, _)| answer.get(at + 9..at + 12)?.parse().ok());
    heads.collect()
}
