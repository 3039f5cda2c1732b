//! Visitors' connections: accepted, served by HTTP/1.1 or HTTP/2 as their first bytes say, ended in order.

use std::{
    io,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::Edge;

/// Largest head of a request, in bytes; above it the answer is 431.
const REQUEST_HEAD: usize = 64 << 10;
const REQUEST_HEADERS: usize = 200;
/// Requests that one HTTP/2 connection may have at a time.
const HTTP2_STREAMS: u32 = 128;
const HTTP2_WINDOW: u32 = 1 << 20;
const HTTP2_PING: Duration = Duration::from_secs(30);
/// How long to wait after an accept failed, as it does when there are no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const SWEEP: Duration = Duration::from_secs(5);

impl Edge {
    /// Serves a listener until `shutdown`; requests that are under way then have the grace time to end.
    pub async fn serve(self: &Arc<Self>, listener: TcpListener, shutdown: CancellationToken) {
        let connections = TaskTracker::new();
        let mut sweep = tokio::time::interval(SWEEP);
        loop {
            tokio::select! {
                accepted = self.accept(&listener) => match accepted {
                    Ok((stream, peer, permit)) => {
                        let (edge, shutdown) = (Arc::clone(self), shutdown.clone());
                        connections.spawn(async move {
                            edge.connection(stream, peer, shutdown).await;
                            drop(permit);
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "accepting a connection failed");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                _ = sweep.tick() => self.pool.sweep(),
                () = shutdown.cancelled() => break,
            }
        }
        drop(listener);
        connections.close();
        let _ = tokio::time::timeout(self.settings.grace, connections.wait()).await;
        self.ending.cancel();
        connections.wait().await;
    }

    async fn accept(
        &self,
        listener: &TcpListener,
    ) -> io::Result<(TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit)> {
        // Beyond the limit visitors wait in the listener's queue.
        let permit = Arc::clone(&self.visitors).acquire_owned().await.map_err(io::Error::other)?;
        let (stream, peer) = listener.accept().await?;
        // Small pieces go out as they come.
        stream.set_nodelay(true)?;
        Ok((stream, peer, permit))
    }

    async fn connection(self: Arc<Self>, stream: TcpStream, peer: SocketAddr, shutdown: CancellationToken) {
        let heard = Arc::new(AtomicBool::new(false));
        let service = service_fn(|request| {
            heard.store(true, Ordering::Relaxed);
            let edge = Arc::clone(&self);
            async move { edge.answer(request, peer).await }
        });
        let builder = self.protocol();
        let mut connection = pin!(builder.serve_connection_with_upgrades(TokioIo::new(stream), service));
        let mut first_request = pin!(tokio::time::sleep(self.settings.header_timeout));
        let mut listening = true;
        let mut closing = false;
        loop {
            tokio::select! {
                served = connection.as_mut() => {
                    if let Err(error) = served {
                        tracing::debug!(%peer, error = %error, "a visitor's connection broke");
                    }
                    return;
                }
                () = first_request.as_mut(), if listening => {
                    // Covers the bytes before HTTP/1.1 or HTTP/2 is known; afterwards each has its own time-out.
                    listening = false;
                    if !heard.load(Ordering::Relaxed) {
                        return;
                    }
                }
                () = shutdown.cancelled(), if !closing => {
                    closing = true;
                    connection.as_mut().graceful_shutdown();
                }
                () = self.ending.cancelled() => return,
            }
        }
    }

    fn protocol(&self) -> auto::Builder<TokioExecutor> {
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(self.settings.header_timeout)
            .max_headers(REQUEST_HEADERS)
            .max_buf_size(REQUEST_HEAD);
        builder
            .http2()
            .timer(TokioTimer::new())
            .keep_alive_interval(HTTP2_PING)
            .max_concurrent_streams(HTTP2_STREAMS)
            .max_header_list_size(REQUEST_HEAD as u32)
            .initial_stream_window_size(HTTP2_WINDOW)
            .initial_connection_window_size(HTTP2_WINDOW);
        builder
    }
}
