//! Bodies flow as they come, no faster than they are taken, and are kept by nobody.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::StreamExt;
use heyvm_edge::Settings;
use http::{Request, Response};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;

use crate::support::*;

const MIB: usize = 1 << 20;

fn streamed(receiver: mpsc::Receiver<Bytes>) -> Body {
    BodyExt::boxed(StreamBody::new(ReceiverStream::new(receiver).map(|bytes| Ok(Frame::data(bytes)))))
}

#[tokio::test]
async fn events_arrive_one_by_one_without_delay() {
    let proxy = Proxy::of(
        app(|_| async {
            let (sender, receiver) = mpsc::channel(1);
            tokio::spawn(async move {
                for number in 0..5 {
                    sender.send(Bytes::from(format!("data: {number}\n\n"))).await.unwrap();
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            });
            Response::builder().header("content-type", "text/event-stream").body(streamed(receiver)).unwrap()
        })
        .await,
    )
    .await;
    let started = Instant::now();
    let mut body = proxy.send(get("app.localhost", "/")).await.into_body();
    for number in 0..5u32 {
        let event = body.frame().await.unwrap().unwrap().into_data().unwrap();
        assert_eq!(event, format!("data: {number}\n\n"));
        let due = Duration::from_millis(100) * number;
        let late = started.elapsed().saturating_sub(due);
        assert!(started.elapsed() >= due && late < Duration::from_millis(500), "event {number} is {late:?} late");
    }
}

#[tokio::test]
async fn bodies_stream_in_both_directions_at_once() {
    let proxy = Proxy::of(app(|request| async { Response::new(request.into_body().boxed()) }).await).await;
    for http2 in [false, true] {
        let (sender, receiver) = mpsc::channel(1);
        let uri = if http2 { "http://app.localhost/" } else { "/" };
        let request = Request::post(uri).header("host", "app.localhost").body(streamed(receiver)).unwrap();
        let answered = if http2 {
            proxy.http2().await.send_request(request).await.unwrap()
        } else {
            sender.send(Bytes::from_static(b"first")).await.unwrap();
            proxy.send(request).await
        };
        if http2 {
            sender.send(Bytes::from_static(b"first")).await.unwrap();
        }
        let mut body = answered.into_body();
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "first", "before the request's end");
        sender.send(Bytes::from_static(b"second")).await.unwrap();
        drop(sender);
        assert_eq!(body.collect().await.unwrap().to_bytes(), "second");
    }
}

/// What this process holds; in release builds a large body shows.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

#[tokio::test]
async fn a_gigabyte_goes_up_and_comes_down_in_constant_memory() {
    let proxy = Proxy::of(app(|request| async { Response::new(request.into_body().boxed()) }).await).await;
    let (sender, receiver) = mpsc::channel(1);
    let request = Request::put("/").header("host", "app.localhost").body(streamed(receiver)).unwrap();
    let piece = Bytes::from(vec![0xa5; MIB]);
    let before = resident();
    let feeding = tokio::spawn(async move {
        for _ in 0..1024 {
            sender.send(piece.clone()).await.unwrap();
        }
    });
    let (mut came, mut most) = (0, 0);
    let mut body = proxy.send(request).await.into_body();
    while let Some(frame) = body.frame().await {
        let data = frame.unwrap().into_data().unwrap();
        assert!(data.iter().all(|byte| *byte == 0xa5));
        came += data.len();
        if came % (64 * MIB) < data.len() {
            most = most.max(resident().saturating_sub(before));
        }
    }
    feeding.await.unwrap();
    assert_eq!(came, 1024 * MIB);
    assert!(most < 32 * MIB, "grew by {most} bytes");
}

#[tokio::test]
async fn an_app_that_does_not_read_holds_the_visitor_back() {
    let proxy = Proxy::of(
        bare(|mut stream| async move {
            read_head(&mut stream).await.unwrap();
            tokio::time::sleep(Duration::from_millis(700)).await;
            let (mut left, mut buffer) = (64 * MIB, vec![0; MIB]);
            while left > 0 {
                left -= stream.read(&mut buffer).await.unwrap();
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone").await.unwrap();
        })
        .await,
    )
    .await;
    let mut stream = proxy.connect().await;
    let head = format!("POST / HTTP/1.1\r\nhost: app.localhost\r\ncontent-length: {}\r\n\r\n", 64 * MIB);
    stream.write_all(head.as_bytes()).await.unwrap();
    let (mut reader, mut writer) = stream.into_split();
    let written = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&written);
    let writing = tokio::spawn(async move {
        let piece = vec![1; MIB / 4];
        for _ in 0..256 {
            writer.write_all(&piece).await.unwrap();
            count.fetch_add(piece.len(), Ordering::SeqCst);
        }
        writer
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    let taken = written.load(Ordering::SeqCst);
    assert!(taken < 24 * MIB, "only what the sockets hold is taken: {taken}");
    let mut answer = vec![0; 15];
    reader.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200 OK");
    drop(writing.await.unwrap());
}

#[tokio::test]
async fn time_outs_are_for_heads_not_for_bodies() {
    let settings = Settings { response_timeout: Duration::from_millis(300), ..Settings::default() };
    let app = app(|request| async move {
        let uploaded = request.into_body().collect().await.unwrap().to_bytes().len();
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            for word in ["slow ", "and ", "whole"] {
                tokio::time::sleep(Duration::from_millis(400)).await;
                sender.send(Bytes::from_static(word.as_bytes())).await.ok();
            }
        });
        Response::builder().header("x-uploaded", uploaded).body(streamed(receiver)).unwrap()
    })
    .await;
    let proxy = Proxy::start(&[("app", Place::At(app, "s"))], settings).await;
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_millis(400)).await;
            sender.send(Bytes::from_static(b"xx")).await.unwrap();
        }
    });
    let request = Request::post("/").header("host", "app.localhost").body(streamed(receiver)).unwrap();
    let response = proxy.send(request).await;
    assert_eq!(response.headers()["x-uploaded"], "6", "a slow visitor is waited for");
    assert_eq!(text(response).await, (200, "slow and whole".into()));
}

#[tokio::test]
async fn a_visitor_that_goes_away_ends_the_sandboxs_work() {
    let (told, mut ended) = mpsc::channel::<()>(1);
    let proxy = Proxy::of(
        bare(move |mut stream| {
            let told = told.clone();
            async move {
                read_head(&mut stream).await.unwrap();
                stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n").await.unwrap();
                let mut rest = Vec::new();
                stream.read_to_end(&mut rest).await.ok();
                told.send(()).await.ok();
            }
        })
        .await,
    )
    .await;
    let mut stream = proxy.connect().await;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: app.localhost\r\n\r\n").await.unwrap();
    read_head(&mut stream).await.unwrap();
    drop(stream);
    tokio::time::timeout(Duration::from_secs(5), ended.recv()).await.unwrap().unwrap();
}
