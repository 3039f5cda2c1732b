//! What is answered where no sandbox does.

use std::time::Duration;

use heyvm_edge::{ConnectError, Settings};
use http::{Request, Response};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::*;

async fn proxy() -> Proxy {
    let silent = bare(|mut stream| async move {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.ok();
    })
    .await;
    let rude = bare(|mut stream| async move {
        read_head(&mut stream).await;
        stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").await.ok();
    })
    .await;
    let gone = bare(|stream| async move { drop(stream) }).await;
    let places = [
        ("app", Place::At(app(|_| async { Response::new(full("ok")) }).await, "s1")),
        ("nothing", Place::Fails(ConnectError::NothingListens(8080))),
        ("stopped", Place::Fails(ConnectError::NotRunning("stopped".into()))),
        ("lost", Place::Fails(ConnectError::Unreachable("<b>no</b>".into()))),
        ("silent", Place::At(silent, "s2")),
        ("rude", Place::At(rude, "s3")),
        ("gone", Place::At(gone, "s4")),
    ];
    let settings = Settings { response_timeout: Duration::from_millis(300), ..Settings::default() };
    Proxy::start(&places, settings).await
}

#[tokio::test]
async fn every_failure_has_its_status_and_code() {
    let proxy = proxy().await;
    let cases = [
        ("nobody.localhost", 404, "unknown_subdomain"),
        ("a.app.localhost", 404, "unknown_subdomain"),
        ("localhost:8480", 404, "unknown_subdomain"),
        ("127.0.0.1:8480", 404, "unknown_subdomain"),
        ("nothing.localhost", 502, "nothing_listens"),
        ("stopped.localhost", 502, "not_running"),
        ("lost.localhost", 502, "unreachable"),
        ("rude.localhost", 502, "bad_answer"),
        ("gone.localhost", 502, "bad_answer"),
        ("silent.localhost", 504, "timeout"),
        ("user@app.localhost", 400, "bad_host"),
        ("app.localhost:99999", 400, "bad_host"),
    ];
    for (host, status, code) in cases {
        let request =
            Request::get("/").header("host", host).header("accept", "application/json").body(empty()).unwrap();
        let (got, body) = text(proxy.send(request).await).await;
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((got, &body["error"]["code"]), (status, &code.into()), "{host}: {body}");
        assert!(body["error"]["message"].is_string() && body["error"]["hint"].is_string(), "{body}");
    }
}

#[tokio::test]
async fn people_get_a_page_programs_json_and_curl_two_lines() {
    let proxy = proxy().await;
    let ask = async |host: &str, accept: &str| {
        let request = Request::get("/").header("host", host).header("accept", accept).body(empty()).unwrap();
        let response = proxy.send(request).await;
        let kind = response.headers()["content-type"].to_str().unwrap().to_owned();
        (kind, text(response).await.1)
    };
    let (kind, page) = ask("nothing.localhost", "text/html,*/*;q=0.8").await;
    assert!(kind.starts_with("text/html") && page.contains("port 8080") && page.len() < 2000, "{page}");
    let (_, page) = ask("lost.localhost", "text/html").await;
    assert!(page.contains("&lt;b&gt;no&lt;/b&gt;"), "{page}");
    let (kind, lines) = ask("nothing.localhost", "*/*").await;
    assert!(kind.starts_with("text/plain") && lines.lines().count() == 2 && lines.contains("8080"), "{lines}");
}

#[tokio::test]
async fn malformed_requests_are_400_and_reach_no_sandbox() {
    let proxy = proxy().await;
    let cases = [
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: app.localhost\r\nhost: nothing.localhost\r\n\r\n",
        "GET / HTTP/1.1\r\nhost : app.localhost\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: app.localhost\r\n folded: yes\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: app.localhost\r\ncontent-length: 3\r\ncontent-length: 5\r\n\r\nabc",
        "POST / HTTP/1.1\r\nhost: app.localhost\r\ncontent-length: +3\r\n\r\nabc",
        "POST / HTTP/1.1\r\nhost: app.localhost\r\ncontent-length: 3, 5\r\n\r\nabc",
        "POST / HTTP/1.1\r\nhost: app.localhost\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: app.localhost\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.0\r\nhost: app.localhost\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "GET /\0 HTTP/1.1\r\nhost: app.localhost\r\n\r\n",
        "CONNECT app.localhost:80 HTTP/1.1\r\nhost: app.localhost\r\nconnection: close\r\n\r\n",
        "nonsense\r\n\r\n",
    ];
    for case in cases {
        let bytes = case.replace("connection: close\r\n", "").replacen("\r\n", "\r\nconnection: close\r\n", 1);
        let answer = proxy.raw(bytes.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400") || answer.starts_with("HTTP/1.0 400"), "{case:?}: {answer}");
    }
    assert_eq!(proxy.connections(), 0);
}

/// Both framings in one request: the app must see one of them, and nothing after its end as a request.
#[tokio::test]
async fn two_framings_cannot_smuggle_a_request() {
    let (sender, mut seen) = tokio::sync::mpsc::channel::<String>(8);
    let app = bare(move |mut stream| {
        let sender = sender.clone();
        async move {
            let mut all = Vec::new();
            tokio::time::timeout(Duration::from_millis(300), stream.read_to_end(&mut all)).await.ok();
            sender.send(String::from_utf8_lossy(&all).to_lowercase()).await.unwrap();
        }
    })
    .await;
    let settings = Settings { response_timeout: Duration::from_millis(500), ..Settings::default() };
    let proxy = Proxy::start(&[("app", Place::At(app, "s"))], settings).await;
    let smuggled = "GET /admin HTTP/1.1\r\nhost: app.localhost\r\n\r\n";
    let head = "POST / HTTP/1.1\r\nhost: app.localhost\r\n";
    for framing in
        ["content-length: 60\r\ntransfer-encoding: chunked", "transfer-encoding: chunked\r\ncontent-length: 60"]
    {
        let answer = proxy.raw(format!("{head}{framing}\r\n\r\n0\r\n\r\n{smuggled}").as_bytes()).await;
        assert!(answer.matches("HTTP/1.1").count() == 1, "one answer, then the connection ends: {answer}");
        if answer.starts_with("HTTP/1.1 400") {
            continue;
        }
        let seen = seen.recv().await.unwrap();
        assert!(seen.contains("transfer-encoding: chunked") && !seen.contains("content-length"), "{seen}");
        assert!(!seen.contains("/admin"), "{seen}");
    }
}

#[tokio::test]
async fn heads_that_are_too_large_are_431() {
    let proxy = proxy().await;
    let large = format!("GET / HTTP/1.1\r\nhost: app.localhost\r\nx-large: {}\r\n\r\n", "a".repeat(70 << 10));
    assert!(proxy.raw(large.as_bytes()).await.starts_with("HTTP/1.1 431"));
    let many = format!("GET / HTTP/1.1\r\nhost: app.localhost\r\n{}\r\n", "x: y\r\n".repeat(300));
    assert!(proxy.raw(many.as_bytes()).await.starts_with("HTTP/1.1 431"));
    let fits = format!(
        "GET / HTTP/1.1\r\nhost: app.localhost\r\nconnection: close\r\nx-large: {}\r\n\r\n",
        "a".repeat(50 << 10)
    );
    assert!(proxy.raw(fits.as_bytes()).await.starts_with("HTTP/1.1 200"));
}
