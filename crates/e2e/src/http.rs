//! Requests to a sandbox's URL, as a browser sends them: the host name in `Host`, the connection to loopback.

use std::future::Future;

use bytes::Bytes;
use futures::Stream;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::net::TcpStream;

/// An answer with its body.
#[derive(Debug)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Headers.
    pub headers: http::HeaderMap,
    /// The whole body.
    pub body: Vec<u8>,
}

/// A body that is sent.
pub type Body = BoxBody<Bytes, std::convert::Infallible>;

type AnyError = Box<dyn std::error::Error + Send + Sync>;

impl Answer {
    /// The body as text, without the last newline.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).trim_end_matches('\n').to_owned()
    }

    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// A header as text.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

/// Runs asynchronous code in a test.
pub fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime").block_on(work)
}

/// GET.
#[track_caller]
pub fn get(url: &str) -> Answer {
    try_get(url).unwrap_or_else(|error| panic!("GET {url}: {error}"))
}

/// GET that may fail to connect or break off.
pub fn try_get(url: &str) -> Result<Answer, AnyError> {
    block_on(async {
        let request = http::Request::get(url).header("accept", "*/*").body(empty())?;
        answer(send(request).await?).await
    })
}

/// A request with headers and a body.
#[track_caller]
pub fn call(method: &str, url: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Answer {
    let mut request = http::Request::builder().method(method).uri(url);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(full(body)).expect("request");
    block_on(async { answer(send(request).await?).await }).unwrap_or_else(|error| panic!("{method} {url}: {error}"))
}

/// A JSON request and its JSON answer.
#[track_caller]
pub fn json(method: &str, url: &str, body: &Value) -> (u16, Value) {
    let answer =
        call(method, url, &[("content-type", "application/json"), ("accept", "application/json")], body.to_string());
    (answer.status, if answer.body.is_empty() { Value::Null } else { answer.json() })
}

/// A connection to where the URL leads: loopback, whatever the host name.
pub async fn connect(url: &http::Uri) -> std::io::Result<TcpStream> {
    TcpStream::connect(("127.0.0.1", url.port_u16().unwrap_or(80))).await
}

/// Sends a request by HTTP/1.1 over a connection of its own; the answer's body streams.
pub async fn send(mut request: http::Request<Body>) -> Result<http::Response<Incoming>, AnyError> {
    let stream = connect(request.uri()).await?;
    let authority = request.uri().authority().ok_or("no host")?.to_string();
    request.headers_mut().insert("host", authority.parse()?);
    *request.uri_mut() = request.uri().path_and_query().ok_or("no path")?.as_str().parse()?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection.with_upgrades());
    Ok(sender.send_request(request).await?)
}

/// Sends a request by HTTP/2 with prior knowledge.
pub async fn send_http2(request: http::Request<Body>) -> Result<http::Response<Incoming>, AnyError> {
    let stream = connect(request.uri()).await?;
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender.send_request(request).await?)
}

/// Reads an answer to its end.
pub async fn answer(response: http::Response<Incoming>) -> Result<Answer, AnyError> {
    let (head, body) = response.into_parts();
    let body = body.collect().await?.to_bytes().to_vec();
    Ok(Answer { status: head.status.as_u16(), headers: head.headers, body })
}

/// A body of nothing.
pub fn empty() -> Body {
    full(Bytes::new())
}

/// A body of known length.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed()
}

/// A body that is sent piece by piece, its length unknown.
pub fn streamed(pieces: impl Stream<Item = Bytes> + Send + Sync + 'static) -> Body {
    use futures::StreamExt;
    BodyExt::boxed(StreamBody::new(pieces.map(|piece| Ok(Frame::data(piece)))))
}
