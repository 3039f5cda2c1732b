//! One connection: HTTP/1.1 or HTTP/2 as its first bytes say, heads that are neither endless nor late, and an end in
//! order.

use std::{
    error::Error,
    pin::pin,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use http::{Request, Response};
use hyper::{
    body::{Body, Incoming},
    service::{Service, service_fn},
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;

/// Largest head of a request, in bytes; above it the answer is 431.
const REQUEST_HEAD: usize = 64 << 10;
const REQUEST_HEADERS: usize = 200;
/// Requests that one HTTP/2 connection may have at a time.
const HTTP2_STREAMS: u32 = 128;
const HTTP2_WINDOW: u32 = 1 << 20;
const HTTP2_PING: Duration = Duration::from_secs(30);

/// Serves a connection to its end. Who takes longer than `patience` for the head of a request is not waited for; after
/// `shutdown` no new request is taken. Upgrades are the service's own matter.
///
/// # Errors
/// What broke the connection.
pub async fn serve_connection<S, V, B>(
    stream: S,
    service: V,
    patience: Duration,
    shutdown: CancellationToken,
) -> Result<(), Box<dyn Error + Send + Sync>>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    V: Service<Request<Incoming>, Response = Response<B>>,
    V::Future: Send + 'static,
    V::Error: Into<Box<dyn Error + Send + Sync>>,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let heard = AtomicBool::new(false);
    let service = service_fn(|request| {
        heard.store(true, Ordering::Relaxed);
        service.call(request)
    });
    let builder = protocol(patience);
    let mut connection = pin!(builder.serve_connection_with_upgrades(TokioIo::new(stream), service));
    let mut first_request = pin!(tokio::time::sleep(patience));
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
        .initial_connection_window_size(HTTP2_WINDOW);
    builder
}
