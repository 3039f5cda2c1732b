//! A listener on loopback for one port of a sandbox.

use heyvm_edge::{LocalPort, Settings};
use http::Response;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::support::*;

/// A proxy's address for `app` alone, and what ends it.
async fn local() -> (u16, CancellationToken, tokio::task::JoinHandle<()>) {
    let app = app(|request: http::Request<hyper::body::Incoming>| async move {
        Response::new(full(format!("{} for {:?}", request.uri(), request.headers()["host"])))
    })
    .await;
    let other = app_of("other").await;
    let places = [("app", Place::At(app, "s1")), ("other", Place::At(other, "s2"))];
    let (edge, _) = edge(&places, None, None, Settings::default());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let place = LocalPort { subdomain: "app".into(), url: "http://app.localhost:8480".into(), port };
    let closing = CancellationToken::new();
    let until = closing.clone();
    let served = tokio::spawn(async move { edge.serve_local(listener, place, until).await });
    (port, closing, served)
}

async fn app_of(text: &'static str) -> std::net::SocketAddr {
    app(move |_| async move { Response::new(full(text)) }).await
}

async fn ask(port: u16, host: &str, method: &str, more: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let head =
        format!("{method} /a?b HTTP/1.1\r\nhost: {host}\r\n{more}content-length: 0\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn programs_get_its_port_by_its_own_address_and_nothing_else() {
    let (port, closing, served) = local().await;
    for host in [format!("127.0.0.1:{port}"), format!("localhost:{port}")] {
        let answer = ask(port, &host, "GET", "").await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains(&format!("/a?b for \"{host}\"")), "{answer}");
    }
    // A name of a page's own that resolves to loopback; the URL of another sandbox; another port.
    for host in [format!("evil.example:{port}"), "other.localhost".into(), "127.0.0.1:1".into(), "127.0.0.1".into()] {
        let answer = ask(port, &host, "GET", "").await;
        assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("heyvm-error: bad_host"), "{host}: {answer}");
    }
    closing.cancel();
    served.await.unwrap();
    assert!(TcpStream::connect(("127.0.0.1", port)).await.is_err(), "no one listens any more");
}

#[tokio::test]
async fn browsers_are_led_to_the_url_with_the_subdomain_and_their_pages_get_nothing() {
    let (port, _closing, _served) = local().await;
    let host = format!("127.0.0.1:{port}");
    let opened = ask(port, &host, "GET", "sec-fetch-site: none\r\nsec-fetch-mode: navigate\r\n").await;
    assert!(
        opened.starts_with("HTTP/1.1 307") && opened.contains("location: http://app.localhost:8480/a?b"),
        "{opened}"
    );
    for more in [
        "sec-fetch-site: cross-site\r\nsec-fetch-mode: no-cors\r\n",
        "sec-fetch-site: same-site\r\nsec-fetch-mode: websocket\r\n",
        "sec-fetch-site: cross-site\r\n",
    ] {
        let page = ask(port, &host, "GET", more).await;
        assert!(page.starts_with("HTTP/1.1 403") && page.contains("page_at_local_port"), "{page}");
    }
    let form = ask(port, &host, "POST", "sec-fetch-site: cross-site\r\nsec-fetch-mode: navigate\r\n").await;
    assert!(form.starts_with("HTTP/1.1 403"), "{form}");
    // Node's fetch says how, and not from where.
    assert!(ask(port, &host, "GET", "sec-fetch-mode: cors\r\n").await.starts_with("HTTP/1.1 200"));
}
