//! A typed client of the API, over TCP or a Unix socket.

use std::{
    io,
    net::SocketAddr,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use http::{Method, Request, Response, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
};
use tokio_tungstenite::WebSocketStream;

use crate::{ApiError, ErrorCode, error::ErrorBody, system::ProgressEvent};

/// Largest JSON answer that is read, in bytes.
const MAX_ANSWER: usize = 64 << 20;
/// Longest event of a stream.
const MAX_EVENT: usize = 16 << 20;

/// A byte stream to the server.
pub trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// Where the server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Server {
    /// A Unix socket; its path may be longer than an address holds.
    Socket(PathBuf),
    /// Host and port.
    Tcp(SocketAddr),
}

/// A client. Cheap to clone; every call has a connection of its own.
#[derive(Debug, Clone)]
pub struct Client {
    server: Server,
}

type Body = BoxBody<Bytes, io::Error>;

impl Client {
    /// A client of `server`; nothing is sent yet.
    pub fn new(server: Server) -> Self {
        Self { server }
    }

    /// Connects.
    pub async fn connect(&self) -> io::Result<Box<dyn Connection>> {
        Ok(match &self.server {
            Server::Socket(path) => Box::new(connect_unix(path).await?),
            Server::Tcp(address) => Box::new(TcpStream::connect(address).await?),
        })
    }

    /// A call without a body.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        json(self.send(self.request(Method::GET, path), empty()).await?).await
    }

    /// A call with a JSON body.
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ApiError> {
        let request = self.request(Method::POST, path).header(header::CONTENT_TYPE, "application/json");
        json(self.send(request, full(body)).await?).await
    }

    /// A DELETE.
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        json(self.send(self.request(Method::DELETE, path), empty()).await?).await
    }

    /// A DELETE whose answer is of no interest.
    pub async fn delete_quietly(&self, path: &str) -> Result<(), ApiError> {
        checked(self.send(self.request(Method::DELETE, path), empty()).await?).await.map(drop)
    }

    /// A long call: its progress is told as it goes, its result returned.
    pub async fn post_with_progress<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        idempotency_key: Option<&str>,
        mut progress: impl FnMut(ProgressEvent),
    ) -> Result<T, ApiError> {
        let mut request = self
            .request(Method::POST, path)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, "text/event-stream");
        if let Some(key) = idempotency_key {
            request = request.header("idempotency-key", key);
        }
        let response = checked(self.send(request, full(body)).await?).await?;
        let mut events = Events::new(response.into_body());
        while let Some(event) = events.next().await? {
            match event.kind.as_str() {
                "progress" => progress(parse(&event.data)?),
                "result" => return parse(&event.data),
                "error" => return Err(parse::<ErrorBody>(&event.data)?.error),
                _ => {}
            }
        }
        Err(broken("the answer ended before its result"))
    }

    /// Sends a stream of bytes.
    pub async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        content_type: &str,
        bytes: impl Stream<Item = io::Result<Bytes>> + Send + Sync + 'static,
    ) -> Result<T, ApiError> {
        let request = self.request(Method::PUT, path).header(header::CONTENT_TYPE, content_type);
        let body = BodyExt::boxed(StreamBody::new(bytes.map(|piece| piece.map(Frame::data))));
        json(self.send(request, body).await?).await
    }

    /// An answer's bytes as they come.
    pub async fn stream(
        &self,
        path: &str,
        accept: &str,
    ) -> Result<impl Stream<Item = io::Result<Bytes>> + use<>, ApiError> {
        let request = self.request(Method::GET, path).header(header::ACCEPT, accept);
        let response = checked(self.send(request, empty()).await?).await?;
        Ok(response.into_body().into_data_stream().map(|piece| piece.map_err(io::Error::other)))
    }

    /// A WebSocket.
    pub async fn websocket(&self, path: &str) -> Result<WebSocketStream<Box<dyn Connection>>, ApiError> {
        let stream = self.connect().await.map_err(unreachable)?;
        let opened = tokio_tungstenite::client_async(format!("ws://localhost{path}"), stream).await;
        match opened {
            Ok((socket, _)) => Ok(socket),
            Err(tokio_tungstenite::tungstenite::Error::Http(response)) => {
                let body = response.body().clone().unwrap_or_default();
                Err(error_of(response.status().as_u16(), &body))
            }
            Err(error) => Err(broken(&error.to_string())),
        }
    }

    fn request(&self, method: Method, path: &str) -> http::request::Builder {
        Request::builder().method(method).uri(path).header(header::HOST, "localhost")
    }

    async fn send(&self, request: http::request::Builder, body: Body) -> Result<Response<Incoming>, ApiError> {
        let request = request.body(body).map_err(|error| {
            ApiError::new(ErrorCode::InvalidArgument, format!("the request cannot be sent: {error}"))
        })?;
        let stream = TokioIo::new(self.connect().await.map_err(unreachable)?);
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(stream).await.map_err(|error| broken(&error.to_string()))?;
        tokio::spawn(connection.with_upgrades());
        sender.send_request(request).await.map_err(|error| broken(&error.to_string()))
    }
}

/// Connects to a Unix socket through its directory's descriptor: addresses hold 107 bytes, paths are longer.
async fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    let dir = std::fs::File::open(path.parent().unwrap_or(Path::new("/")))?;
    let name = path.file_name().unwrap_or_default();
    UnixStream::connect(Path::new(&format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name)).await
}

fn empty() -> Body {
    Full::default().map_err(|never| match never {}).boxed()
}

fn full(body: &impl Serialize) -> Body {
    let bytes = serde_json::to_vec(body).unwrap_or_default();
    Full::new(Bytes::from(bytes)).map_err(|never| match never {}).boxed()
}

async fn json<T: DeserializeOwned>(response: Response<Incoming>) -> Result<T, ApiError> {
    let body = checked(response).await?.into_body();
    let bytes = collect(body).await?;
    // A call without an answer has no body.
    parse(if bytes.is_empty() { b"null" } else { &bytes })
}

async fn collect(body: Incoming) -> Result<Bytes, ApiError> {
    let limited = http_body_util::Limited::new(body, MAX_ANSWER);
    Ok(limited.collect().await.map_err(|error| broken(&error.to_string()))?.to_bytes())
}

async fn checked(response: Response<Incoming>) -> Result<Response<Incoming>, ApiError> {
    if response.status().is_success() {
        return Ok(response);
    }
    let status = response.status().as_u16();
    Err(error_of(status, &collect(response.into_body()).await?))
}

fn error_of(status: u16, body: &[u8]) -> ApiError {
    serde_json::from_slice::<ErrorBody>(body)
        .map_or_else(|_| ApiError::new(ErrorCode::Internal, format!("the daemon answered {status}")), |body| body.error)
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(bytes).map_err(|error| broken(&format!("the answer is not what it should be: {error}")))
}

fn broken(why: &str) -> ApiError {
    ApiError::new(ErrorCode::DaemonUnavailable, format!("the daemon's answer broke off: {why}"))
        .hint("heyvm daemon status tells whether it runs; its log is daemon.log in ~/.heyo")
}

fn unreachable(error: io::Error) -> ApiError {
    ApiError::new(ErrorCode::DaemonUnavailable, format!("the daemon cannot be reached: {error}"))
        .hint("heyvm daemon restart starts it anew")
}

/// One server-sent event.
struct Event {
    kind: String,
    data: Vec<u8>,
}

/// Server-sent events of a body. Format: the HTML standard, "server-sent events".
struct Events {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Events {
    fn new(body: Incoming) -> Self {
        Self { body, buffer: Vec::new() }
    }

    async fn next(&mut self) -> Result<Option<Event>, ApiError> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|two| two == b"\n\n") {
                let block: Vec<u8> = self.buffer.drain(..end + 2).collect();
                if let Some(event) = event(&block) {
                    return Ok(Some(event));
                }
                continue;
            }
            match self.body.frame().await {
                Some(Ok(frame)) => self.buffer.extend(frame.data_ref().map_or(&[][..], |data| data)),
                Some(Err(error)) => return Err(broken(&error.to_string())),
                None => return Ok(None),
            }
            if self.buffer.len() > MAX_EVENT {
                return Err(broken("an event is too long"));
            }
        }
    }
}

/// `None` for comments, which keep the connection alive.
fn event(block: &[u8]) -> Option<Event> {
    let text = String::from_utf8_lossy(block);
    let (mut kind, mut data) = (String::new(), Vec::new());
    for line in text.lines() {
        if let Some(value) = line.strip_prefix("event:") {
            kind = value.trim().to_owned();
        } else if let Some(value) = line.strip_prefix("data:") {
            if !data.is_empty() {
                data.push(b'\n');
            }
            data.extend(value.strip_prefix(' ').unwrap_or(value).bytes());
        }
    }
    (!kind.is_empty()).then_some(Event { kind, data })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_told_from_comments() {
        assert!(event(b": still here\n\n").is_none());
        let found = event(b"event: result\ndata: {\"a\":\ndata: 1}\n\n").unwrap();
        assert_eq!((found.kind.as_str(), found.data.as_slice()), ("result", b"{\"a\":\n1}".as_slice()));
    }
}
