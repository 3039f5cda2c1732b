//! What is left of a request's body once its answer is there: it is read on, within bounds.
//!
//! A server that answers early (404, 413 …) and ends the connection cuts off a client that still sends its body, which
//! then sees a broken connection in place of the answer.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, BodyDataStream, HttpBody},
    extract::Request,
    middleware::Next,
    response::Response,
};
use bytes::Bytes;
use futures::TryStreamExt;
use http::header;
use hyper::body::{Frame, SizeHint};

/// Whoever sends more than this has seen the answer meanwhile, or does not look for it.
const MOST: usize = 16 << 20;
/// And whoever takes longer.
const PATIENCE: Duration = Duration::from_secs(5);

/// For every route: bodies that handlers do not read to their end.
pub async fn read_on(request: Request, next: Next) -> Response {
    next.run(lingering(request)).await
}

/// The request with a body that is read on when it is dropped before its end.
pub fn lingering(request: Request) -> Request {
    // A client that asks whether to send its body at all sends none now.
    if request.headers().contains_key(header::EXPECT) || request.body().is_end_stream() {
        return request;
    }
    request.map(|body| Body::new(Lingering(Some(body))))
}

struct Lingering(Option<Body>);

impl HttpBody for Lingering {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let Some(body) = &mut self.0 else { return Poll::Ready(None) };
        let frame = Pin::new(body).poll_frame(cx);
        if matches!(frame, Poll::Ready(None | Some(Err(_)))) {
            self.0 = None;
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.0.as_ref().map_or(SizeHint::with_exact(0), HttpBody::size_hint)
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        let Some(rest) = self.0.take().filter(|body| !body.is_end_stream()) else { return };
        // Where there is no runtime any more, there is no connection.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(tokio::time::timeout(PATIENCE, read(rest.into_data_stream())));
        }
    }
}

async fn read(mut rest: BodyDataStream) {
    let mut read = 0;
    while let Ok(Some(bytes)) = rest.try_next().await {
        read += bytes.len();
        if read > MOST {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use axum::Router;
    use heyvm_edge::{Edge, Settings};
    use tokio::{
        io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
        net::{TcpListener, TcpStream, UnixStream},
    };
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::{pages::Pages, trials::Daemon};

    /// What has come by the time that `end` has.
    async fn until(stream: &mut (impl AsyncRead + Unpin), end: &str) -> String {
        let mut heard = Vec::new();
        while !String::from_utf8_lossy(&heard).ends_with(end) {
            let read = tokio::time::timeout(Duration::from_secs(60), stream.read_buf(&mut heard)).await;
            assert_ne!(read.expect("an answer").unwrap(), 0, "cut off after {:?}", String::from_utf8_lossy(&heard));
        }
        String::from_utf8(heard).unwrap()
    }

    /// An answer that comes before the body, the body, and another request.
    async fn sends_on(mut stream: impl AsyncRead + AsyncWrite + Unpin, end: &str) {
        for body in ["content-length: 3000000", "transfer-encoding: chunked"] {
            let head = format!("PUT /nowhere HTTP/1.1\r\nhost: localhost\r\n{body}\r\n\r\n");
            stream.write_all(head.as_bytes()).await.unwrap();
            let answer = until(&mut stream, end).await;
            assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
            // Long enough for a server that does not wait to have closed.
            tokio::time::sleep(Duration::from_millis(300)).await;
            match body.starts_with("content-length") {
                true => stream.write_all(&vec![b'x'; 3_000_000]).await.unwrap(),
                false => stream.write_all(b"5\r\nhello\r\n0\r\n\r\n").await.unwrap(),
            }
        }
        stream.write_all(b"GET /nowhere HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
        until(&mut stream, end).await;
    }

    #[tokio::test]
    async fn who_is_answered_early_may_send_on() {
        let daemon = Daemon::start().await;
        sends_on(UnixStream::connect(daemon.home.path().join("run/daemon.sock")).await.unwrap(), "}").await;

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let nothing = Router::new().fallback(|| async { (http::StatusCode::NOT_FOUND, "nothing here") });
        let edge = Edge::of_site(Arc::new(Pages::on_every_host(nothing)), Settings::default());
        tokio::spawn(async move { edge.serve(listener, CancellationToken::new()).await });
        sends_on(TcpStream::connect(address).await.unwrap(), "nothing here").await;
    }
}
