//! Answers before the answer, and heads with many lines.

use std::time::Duration;

use heyvm_edge::Settings;
use http::Response;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::*;

/// An app that says `first`, reads a body of five bytes if it said 100, and answers.
async fn saying(first: &'static [u8], answer: &'static [u8]) -> Proxy {
    let app = bare(move |mut stream| async move {
        while let Some(head) = read_head(&mut stream).await {
            stream.write_all(first).await.unwrap();
            if head.contains("content-length: 5") && !answer.starts_with(b"HTTP/1.1 417") {
                let mut body = [0; 5];
                stream.read_exact(&mut body).await.unwrap();
            }
            stream.write_all(answer).await.unwrap();
        }
    })
    .await;
    Proxy::of(app).await
}

const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

async fn next_head(stream: &mut TcpStream) -> String {
    tokio::time::timeout(Duration::from_secs(60), read_head(stream)).await.expect("no answer").expect("an end")
}

#[tokio::test]
async fn early_hints_come_before_the_answer_and_leave_the_connection_usable() {
    let hints =
        b"HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\nset-cookie: a=b\r\nconnection: x\r\nx: y\r\n\r\n";
    let proxy = saying(hints, OK).await;
    let mut stream = proxy.connect().await;
    for _ in 0..3 {
        stream.write_all(b"GET / HTTP/1.1\r\nhost: app.localhost\r\n\r\n").await.unwrap();
        let hints = next_head(&mut stream).await;
        assert!(hints.starts_with("HTTP/1.1 103 ") && hints.contains("link: </a.css>; rel=preload\r\n"), "{hints}");
        assert!(!hints.contains("cookie") && !hints.contains("x: y"), "{hints}");
        let answer = next_head(&mut stream).await;
        assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
        let mut body = [0; 2];
        stream.read_exact(&mut body).await.unwrap();
        assert_eq!(&body, b"ok");
    }
    // Clients of HTTP/1.0 know no interim answers.
    let old = proxy.raw(b"GET / HTTP/1.0\r\nhost: app.localhost\r\n\r\n").await;
    assert!(old.starts_with("HTTP/1.0 200") && !old.contains("103"), "{old}");
}

const EXPECTING: &[u8] = b"POST / HTTP/1.1\r\nhost: app.localhost\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n";

#[tokio::test]
async fn an_app_that_refuses_a_body_before_it_comes_is_heard() {
    let proxy = saying(b"", b"HTTP/1.1 417 Expectation Failed\r\ncontent-length: 2\r\n\r\nno").await;
    let mut stream = proxy.connect().await;
    stream.write_all(EXPECTING).await.unwrap();
    let answer = next_head(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 417 "), "no 100 before it: {answer}");
}

#[tokio::test]
async fn an_app_that_wants_the_body_gets_it_whether_it_says_so_or_not() {
    for first in [&b"HTTP/1.1 100 Continue\r\n\r\n"[..], b""] {
        let proxy = saying(first, OK).await;
        let mut stream = proxy.connect().await;
        stream.write_all(EXPECTING).await.unwrap();
        assert!(next_head(&mut stream).await.starts_with("HTTP/1.1 100 "));
        stream.write_all(b"hello").await.unwrap();
        assert!(next_head(&mut stream).await.starts_with("HTTP/1.1 200 "));
    }
}

#[tokio::test]
async fn an_answer_may_have_hundreds_of_header_lines() {
    let app = app(|_| async {
        let mut response = Response::builder();
        for number in 0..400 {
            response = response.header(format!("x-{number}"), "1");
        }
        response.body(full("ok")).unwrap()
    })
    .await;
    let proxy = Proxy::of(app).await;
    let mut stream = proxy.connect().await;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: app.localhost\r\n\r\n").await.unwrap();
    let head = next_head(&mut stream).await;
    assert!(head.starts_with("HTTP/1.1 200 ") && head.contains("x-399: 1"), "{head}");
}

#[tokio::test]
async fn a_sandbox_may_have_a_time_out_of_its_own() {
    let slow = app(|_| async {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        Response::new(full("late"))
    })
    .await;
    let settings = Settings { response_timeout: Duration::from_millis(300), ..Settings::default() };
    let patient = Place::Slow(slow, "s2", Duration::from_secs(600));
    let proxy = Proxy::start(&[("app", Place::At(slow, "s1")), ("patient", patient)], settings).await;
    assert_eq!(proxy.get("/").await.0, 504);
    assert_eq!(text(proxy.send(get("patient.localhost", "/")).await).await, (200, "late".into()));
}
