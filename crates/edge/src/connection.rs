//! One connection: HTTP/1.1 or HTTP/2 as its first bytes say, heads that are neither endless nor late, and an end in
//! order.

use std::{
    error::Error,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use http::{Request, Response, Version};
use hyper::{
    body::{Body, Frame, Incoming, SizeHint},
    service::{Service, service_fn},
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Notify,
};
use tokio_util::sync::CancellationToken;

/// Largest head of a request, in bytes; above it the answer is 431.
const REQUEST_HEAD: usize = 64 << 10;
const REQUEST_HEADERS: usize = 200;
/// Requests that one HTTP/2 connection may have at a time.
const HTTP2_STREAMS: u32 = 128;
/// Bytes of one request's body that wait for its sandbox, and of all of a connection's.
const HTTP2_WINDOW: u32 = 256 << 10;
const HTTP2_CONNECTION_WINDOW: u32 = HTTP2_STREAMS * HTTP2_WINDOW;
const HTTP2_PING: Duration = Duration::from_secs(30);

/// How long a connection may do nothing.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For the head of a request.
    pub head: Duration,
    /// By HTTP/2 without any stream; by HTTP/1.1 it is the head's time.
    pub idle: Duration,
}

/// A request of an HTTP/2 connection that is not over yet. It is among the request's extensions; a tunnel keeps it.
#[derive(Debug, Clone)]
pub struct Stream {
    _counted: Arc<Counted>,
}

#[derive(Debug)]
struct Counted(Arc<Streams>);

impl Drop for Counted {
    fn drop(&mut self) {
        if self.0.open.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.changed.notify_one();
        }
    }
}

/// The streams of a connection.
#[derive(Debug, Default)]
struct Streams {
    open: AtomicUsize,
    changed: Notify,
}

impl Streams {
    fn begin(self: &Arc<Self>) -> Stream {
        self.open.fetch_add(1, Ordering::Relaxed);
        self.changed.notify_one();
        Stream { _counted: Arc::new(Counted(Arc::clone(self))) }
    }

    /// Resolves when streams have come, and there has been none for `limit` since.
    async fn idle_for(&self, limit: Duration) {
        self.changed.notified().await;
        loop {
            if self.open.load(Ordering::Relaxed) > 0 {
                self.changed.notified().await;
            } else if tokio::time::timeout(limit, self.changed.notified()).await.is_err() {
                return;
            }
        }
    }
}

/// An answer's body, whose stream is over when it is dropped.
struct Tracked<B> {
    body: B,
    _stream: Option<Stream>,
}

impl<B: Body + Unpin> Body for Tracked<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Serves a connection to its end. A client that takes longer than its `patience` is not waited for; after `shutdown`
/// no new request is taken. Upgrades are the service's own matter.
///
/// # Errors
/// What broke the connection.
pub async fn serve_connection<S, V, B>(
    stream: S,
    service: V,
    patience: Patience,
    shutdown: CancellationToken,
) -> Result<(), Box<dyn Error + Send + Sync>>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    V: Service<Request<Incoming>, Response = Response<B>>,
    V::Future: Send + 'static,
    V::Error: Into<Box<dyn Error + Send + Sync>>,
    B: Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let heard = AtomicBool::new(false);
    let streams = Arc::new(Streams::default());
    let service = service_fn(|mut request: Request<Incoming>| {
        heard.store(true, Ordering::Relaxed);
        let stream = (request.version() == Version::HTTP_2).then(|| streams.begin());
        if let Some(stream) = &stream {
            request.extensions_mut().insert(stream.clone());
        }
        let answering = service.call(request);
        async move { answering.await.map(|response| response.map(|body| Tracked { body, _stream: stream })) }
    });
    let builder = protocol(patience.head);
    let mut connection = pin!(builder.serve_connection_with_upgrades(TokioIo::new(stream), service));
    let mut first_request = pin!(tokio::time::sleep(patience.head));
    let mut idle = pin!(streams.idle_for(patience.idle));
    let (mut listening, mut closing) = (true, false);
    loop {
        tokio::select! {
            served = connection.as_mut() => return served,
            () = first_request.as_mut(), if listening => {
                // Covers the bytes before HTTP/1.1 or HTTP/2 is known; afterwards each has its own time-out.
                listening = false;
                if !heard.load(Ordering::Relaxed) {
                    return Err("no request came".into());
                }
            }
            () = idle.as_mut(), if !closing => {
                closing = true;
                connection.as_mut().graceful_shutdown();
            }
            () = shutdown.cancelled(), if !closing => {
                closing = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

fn protocol(patience: Duration) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(patience)
        .max_headers(REQUEST_HEADERS)
        .max_buf_size(REQUEST_HEAD);
    builder
        .http2()
        .timer(TokioTimer::new())
        .enable_connect_protocol()
        .keep_alive_interval(HTTP2_PING)
        .max_concurrent_streams(HTTP2_STREAMS)
        .max_header_list_size(REQUEST_HEAD as u32)
        .initial_stream_window_size(HTTP2_WINDOW)
        .initial_connection_window_size(HTTP2_CONNECTION_WINDOW);
    builder
}
