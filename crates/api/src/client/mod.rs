//! A typed client of the API, over a Unix socket, HTTP or HTTPS.
//!
//! - [`Server`], [`Remote`] (`server`): where it is.  `events`: answers that tell of progress.

mod events;
mod server;

use std::{io, time::Duration};

use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use hyper_util::{
    client::legacy,
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use serde::{Serialize, de::DeserializeOwned};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{self, client::IntoClientRequest},
};
use uuid::Uuid;

use crate::{ApiError, ErrorCode, error::ErrorBody, headers, system::ProgressEvent};
use events::Events;
pub use server::{Connection, Remote, Server, notice_silence};

/// Largest JSON answer that is read, in bytes.
const MAX_ANSWER: usize = 64 << 20;
/// Servers close a connection that is idle for longer.
const IDLE: Duration = Duration::from_secs(15);
/// A server that keeps a caller waiting for so long is asked whether it is there, and has as long to say so.
const PATIENCE: Duration = Duration::from_secs(15);
/// One that has missed so many of these questions in a row is given up.
const MISSED: u32 = 2;

/// The body of a request.
pub type Body = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

/// A client. Cheap to clone: clones share their connections to a remote server; a call over a socket has its own.
#[derive(Debug, Clone)]
pub struct Client {
    server: Server,
    /// Who asks, and for whom: goes with every call.
    identity: HeaderMap,
    http: legacy::Client<Server, Body>,
}

/// One page of a list.
#[derive(Debug, Clone)]
pub struct Page<T> {
    /// What is on it.
    pub entries: Vec<T>,
    /// Where the next one begins; none after the last.
    pub next: Option<String>,
    /// On the last page: what to ask with for changes from then on.
    pub revision: Option<String>,
}

impl Client {
    /// A client of `server`; nothing is sent yet.
    pub fn new(server: Server) -> Self {
        let mut http = legacy::Client::builder(TokioExecutor::new());
        http.pool_timer(TokioTimer::new()).pool_idle_timeout(IDLE);
        if matches!(server, Server::Socket(_)) {
            http.pool_max_idle_per_host(0);
        }
        Self { http: http.build(server.clone()), server, identity: HeaderMap::new() }
    }

    /// Sends `Authorization: Bearer` with every call. An error when no header can hold the token.
    pub fn with_bearer(mut self, token: &str) -> Result<Self, ApiError> {
        let mut value = HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| {
            ApiError::new(ErrorCode::Unauthorized, "the token has characters that no token has")
                .hint("log in again, or copy the API key anew")
        })?;
        value.set_sensitive(true);
        self.identity.insert(header::AUTHORIZATION, value);
        Ok(self)
    }

    /// Asks for an account: only for those whom the server trusts to. An error when no header can hold its id.
    pub fn for_account(mut self, id: &str) -> Result<Self, ApiError> {
        let value = HeaderValue::from_str(id)
            .map_err(|_| ApiError::new(ErrorCode::InvalidArgument, format!("{id:?} is no account's id")))?;
        self.identity.insert(headers::ACCOUNT, value);
        Ok(self)
    }

    /// Has the sandbox that is made next have this id: only for those whom the server trusts to.
    pub fn with_sandbox_id(mut self, id: Uuid) -> Self {
        if let Ok(value) = HeaderValue::from_str(&id.to_string()) {
            self.identity.insert(headers::SANDBOX_ID, value);
        }
        self
    }

    /// A byte stream to the server, on which nothing has been said yet.
    pub async fn connect(&self) -> io::Result<Box<dyn Connection>> {
        self.server.connect().await
    }

    /// A call without a body.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        self.json(self.call(request(Method::GET, path), empty()).await?).await
    }

    /// Every page of a list, one after another. `path` has a query already, or none.
    pub async fn list<T: DeserializeOwned>(&self, path: &str) -> Result<Vec<T>, ApiError> {
        let mut all = Vec::new();
        let mut next = path.to_owned();
        loop {
            let page = self.page(&next).await?;
            all.extend(page.entries);
            let Some(cursor) = page.next else { return Ok(all) };
            let separator = if path.contains('?') { '&' } else { '?' };
            next = format!("{path}{separator}cursor={cursor}");
        }
    }

    /// One page of a list.
    pub async fn page<T: DeserializeOwned>(&self, path: &str) -> Result<Page<T>, ApiError> {
        let response = self.checked(self.call(request(Method::GET, path), empty()).await?).await?;
        let header = |name: &str| response.headers().get(name)?.to_str().ok().map(str::to_owned);
        let (next, revision) = (header(headers::NEXT_CURSOR), header(headers::REVISION));
        Ok(Page { next, revision, entries: self.json(response).await? })
    }

    /// A call with a JSON body.
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ApiError> {
        let request = request(Method::POST, path).header(header::CONTENT_TYPE, "application/json");
        self.json(self.call(request, full(body)).await?).await
    }

    /// A DELETE.
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        self.json(self.call(request(Method::DELETE, path), empty()).await?).await
    }

    /// A DELETE whose answer is of no interest.
    pub async fn delete_quietly(&self, path: &str) -> Result<(), ApiError> {
        self.checked(self.call(request(Method::DELETE, path), empty()).await?).await.map(drop)
    }

    /// A long call: its progress is told as it goes, its result returned.
    pub async fn post_with_progress<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        idempotency_key: Option<&str>,
        mut progress: impl FnMut(ProgressEvent),
    ) -> Result<T, ApiError> {
        let mut request = request(Method::POST, path)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, "text/event-stream");
        if let Some(key) = idempotency_key {
            request = request.header("idempotency-key", key);
        }
        let response = self.checked(self.call(request, full(body)).await?).await?;
        let kind = response.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        // Not every server tells its progress.
        if !kind.starts_with("text/event-stream") {
            return self.json(response).await;
        }
        let mut events = Events::new(response.into_body());
        while let Some(event) = self.unless_silent(events.next()).await?.map_err(|why| self.server.broken(why))? {
            match event.kind.as_str() {
                "progress" => progress(self.parse(&event.data)?),
                "result" => return self.parse(&event.data),
                "error" => return Err(self.parse::<ErrorBody>(&event.data)?.error),
                _ => {}
            }
        }
        Err(self.server.broken("it ended before its result"))
    }

    /// Sends a stream of bytes.
    pub async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        content_type: &str,
        bytes: impl Stream<Item = io::Result<Bytes>> + Send + 'static,
    ) -> Result<T, ApiError> {
        let request = request(Method::PUT, path).header(header::CONTENT_TYPE, content_type);
        let body = StreamBody::new(bytes.map(|piece| piece.map(Frame::data).map_err(Into::into)));
        self.json(self.call(request, BodyExt::boxed_unsync(body)).await?).await
    }

    /// An answer's bytes as they come.
    pub async fn stream(
        &self,
        path: &str,
        accept: &str,
    ) -> Result<impl Stream<Item = io::Result<Bytes>> + use<>, ApiError> {
        let request = request(Method::GET, path).header(header::ACCEPT, accept);
        let response = self.checked(self.call(request, empty()).await?).await?;
        let pieces = Box::pin(response.into_body().into_data_stream());
        let pieces = stream::try_unfold((self.clone(), pieces), |(client, mut pieces)| async move {
            let silent = |error| io::Error::new(io::ErrorKind::TimedOut, error);
            match client.unless_silent(pieces.next()).await.map_err(silent)? {
                Some(piece) => Ok(Some((piece.map_err(io::Error::other)?, (client, pieces)))),
                None => Ok(None),
            }
        });
        Ok(pieces.boxed())
    }

    /// Resolves when the server has stopped answering, however long its other answers may take: one that leaves a caller
    /// waiting is asked for its health, and once more before it is given up.
    pub async fn until_silent(&self) -> ApiError {
        let mut missed = 0;
        while missed < MISSED {
            tokio::time::sleep(PATIENCE).await;
            missed = if self.answers().await { 0 } else { missed + 1 };
        }
        self.server.silent()
    }

    /// Whether the server answers anything in time.
    async fn answers(&self) -> bool {
        let Ok(request) = request(Method::GET, &format!("{}/health", self.server.base())).body(empty()) else {
            return false;
        };
        matches!(tokio::time::timeout(PATIENCE, self.http.request(request)).await, Ok(Ok(_)))
    }

    /// Waits for work that the server has a part in.
    async fn unless_silent<T>(&self, work: impl Future<Output = T>) -> Result<T, ApiError> {
        tokio::select! {
            biased;
            done = work => Ok(done),
            silent = self.until_silent() => Err(silent),
        }
    }

    /// A WebSocket.
    pub async fn websocket(&self, path: &str) -> Result<WebSocketStream<Box<dyn Connection>>, ApiError> {
        let stream = self.connect().await.map_err(|error| self.server.unreachable(&error))?;
        // TLS, where there is any, is the stream's own.
        let base = self.server.base();
        let rest = base.split_once("://").map_or(base.as_str(), |(_, rest)| rest);
        let request = format!("ws://{rest}{path}").into_client_request();
        let mut request = request.map_err(|error| cannot_be_sent(&error))?;
        request.headers_mut().extend(self.identity.clone());
        match self.unless_silent(tokio_tungstenite::client_async(request, stream)).await? {
            Ok((socket, _)) => Ok(socket),
            Err(tungstenite::Error::Http(response)) => {
                let body = response.body().as_deref().unwrap_or_default();
                Err(self.server.error_of(response.status(), body))
            }
            Err(error) => Err(self.server.broken(error)),
        }
    }

    /// A byte stream that begins with an upgrade to `protocol`.
    pub async fn upgrade(&self, path: &str, protocol: &str) -> Result<Box<dyn Connection>, ApiError> {
        let request =
            request(Method::GET, path).header(header::CONNECTION, "upgrade").header(header::UPGRADE, protocol);
        let response = self.call(request, empty()).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            self.checked(response).await?;
            return Err(self.server.broken("it does not change the protocol"));
        }
        let stream = hyper::upgrade::on(response).await.map_err(|error| self.server.broken(error))?;
        Ok(Box::new(TokioIo::new(stream)))
    }

    /// Sends a request as it is: what a forwarder needs. Its URI is a path with its query; host, base path and who asks
    /// are this client's. The answer may be an error, or an upgrade (`hyper::upgrade::on`).
    pub async fn send(&self, mut request: Request<Body>) -> Result<Response<Incoming>, ApiError> {
        let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
        let uri: Uri = format!("{}{path}", self.server.base()).parse().map_err(|error| cannot_be_sent(&error))?;
        *request.uri_mut() = uri;
        *request.version_mut() = http::Version::HTTP_11;
        request.headers_mut().remove(header::HOST);
        request.headers_mut().extend(self.identity.clone());
        self.unless_silent(self.http.request(request)).await?.map_err(|error| {
            let source = std::error::Error::source(&error);
            match source.and_then(|source| source.downcast_ref::<io::Error>()).filter(|_| error.is_connect()) {
                Some(connecting) => self.server.unreachable(connecting),
                None => self.server.broken(source.map_or_else(|| error.to_string(), ToString::to_string)),
            }
        })
    }

    async fn call(&self, request: http::request::Builder, body: Body) -> Result<Response<Incoming>, ApiError> {
        self.send(request.body(body).map_err(|error| cannot_be_sent(&error))?).await
    }

    async fn json<T: DeserializeOwned>(&self, response: Response<Incoming>) -> Result<T, ApiError> {
        let body = self.checked(response).await?.into_body();
        let bytes = self.collect(body).await?;
        // A call without an answer has no body.
        self.parse(if bytes.is_empty() { b"null" } else { &bytes })
    }

    async fn collect(&self, body: Incoming) -> Result<Bytes, ApiError> {
        let limited = http_body_util::Limited::new(body, MAX_ANSWER);
        let collected = self.unless_silent(limited.collect()).await?;
        Ok(collected.map_err(|error| self.server.broken(error))?.to_bytes())
    }

    async fn checked(&self, response: Response<Incoming>) -> Result<Response<Incoming>, ApiError> {
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        Err(self.server.error_of(status, &self.collect(response.into_body()).await?))
    }

    fn parse<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T, ApiError> {
        serde_json::from_slice(bytes)
            .map_err(|error| self.server.broken(format!("it is not what it should be: {error}")))
    }
}

fn request(method: Method, path: &str) -> http::request::Builder {
    Request::builder().method(method).uri(path)
}

fn cannot_be_sent(error: &dyn std::error::Error) -> ApiError {
    ApiError::new(ErrorCode::InvalidArgument, format!("the request cannot be sent: {error}"))
        .hint("names and paths with other than visible ASCII characters are percent-encoded in a URL")
}

/// No body.
pub fn empty() -> Body {
    Full::default().map_err(|never| match never {}).boxed_unsync()
}

fn full(body: &impl Serialize) -> Body {
    let bytes = serde_json::to_vec(body).unwrap_or_default();
    Full::new(Bytes::from(bytes)).map_err(|never| match never {}).boxed_unsync()
}
