//! Visitors' connections: accepted within limits, served, ended in order.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use http::{Request, Response};
use hyper::{body::Incoming, service::service_fn};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::OwnedSemaphorePermit,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{Edge, Tls, Visitor, body::AnswerBody, connection::serve_connection};

/// How long to wait after an accept failed, as it does when there are no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const SWEEP: Duration = Duration::from_secs(5);

/// What a listener is for.
#[derive(Clone)]
enum Port {
    Plain,
    Tls(Arc<Tls>),
    /// Leads to TLS on this port.
    Redirect(Arc<Tls>, u16),
}

/// A connection that was accepted, and the room it takes.
struct Accepted {
    stream: TcpStream,
    peer: SocketAddr,
    _room: OwnedSemaphorePermit,
    handshake: Option<OwnedSemaphorePermit>,
}

impl Edge {
    /// Serves a listener by plain HTTP until `shutdown`; requests that are under way then have the grace time to end.
    pub async fn serve(self: &Arc<Self>, listener: TcpListener, shutdown: CancellationToken) {
        self.serve_port(listener, Port::Plain, shutdown).await;
    }

    /// The same by TLS.
    pub async fn serve_tls(self: &Arc<Self>, listener: TcpListener, tls: Arc<Tls>, shutdown: CancellationToken) {
        self.serve_port(listener, Port::Tls(tls), shutdown).await;
    }

    /// Serves the plain port beside a TLS listener on the port `https`: redirects, and a certificate authority's
    /// questions.
    pub async fn serve_redirects(
        self: &Arc<Self>,
        listener: TcpListener,
        tls: Arc<Tls>,
        https: u16,
        shutdown: CancellationToken,
    ) {
        self.serve_port(listener, Port::Redirect(tls, https), shutdown).await;
    }

    async fn serve_port(self: &Arc<Self>, listener: TcpListener, port: Port, shutdown: CancellationToken) {
        self.listeners.fetch_add(1, Ordering::SeqCst);
        let connections = TaskTracker::new();
        let mut sweep = tokio::time::interval(SWEEP);
        loop {
            tokio::select! {
                accepted = self.accept(&listener, &port) => match accepted {
                    Ok(accepted) => {
                        connections.spawn(Arc::clone(self).connection(accepted, port.clone(), shutdown.clone()));
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
        let in_time = tokio::time::timeout(self.settings.grace, connections.wait()).await.is_ok();
        let last = self.listeners.fetch_sub(1, Ordering::SeqCst) == 1;
        if last || !in_time {
            self.ending.cancel();
        }
        connections.wait().await;
    }

    async fn accept(&self, listener: &TcpListener, port: &Port) -> io::Result<Accepted> {
        // Beyond the limits visitors wait in the listener's queue.
        let room = Arc::clone(&self.visitors).acquire_owned().await.map_err(io::Error::other)?;
        let handshake = match port {
            Port::Tls(_) => Some(Arc::clone(&self.handshakes).acquire_owned().await.map_err(io::Error::other)?),
            Port::Plain | Port::Redirect(..) => None,
        };
        let (stream, peer) = listener.accept().await?;
        // Small pieces go out as they come.
        stream.set_nodelay(true)?;
        Ok(Accepted { stream, peer, _room: room, handshake })
    }

    async fn connection(self: Arc<Self>, accepted: Accepted, port: Port, shutdown: CancellationToken) {
        let Accepted { stream, peer, _room, handshake } = accepted;
        let visitor = Visitor { address: peer.ip(), secure: matches!(port, Port::Tls(_)) };
        let edge = Arc::clone(&self);
        let answer = move |request| {
            let edge = Arc::clone(&edge);
            async move { edge.answer(request, visitor).await }
        };
        match port {
            Port::Plain => self.http(stream, peer, answer, shutdown).await,
            Port::Tls(tls) => {
                let shaken = tokio::select! {
                    shaken = tokio::time::timeout(self.settings.handshake_timeout, tls.accept(stream)) => shaken,
                    () = shutdown.cancelled() => return,
                };
                drop(handshake);
                match shaken {
                    Ok(Ok(stream)) => self.http(stream, peer, answer, shutdown).await,
                    Ok(Err(error)) => tracing::debug!(%peer, %error, "a handshake failed"),
                    Err(_) => tracing::debug!(%peer, "a handshake took too long"),
                }
            }
            Port::Redirect(tls, https) => {
                let edge = Arc::clone(&self);
                let answer = move |request: Request<Incoming>| {
                    std::future::ready(Ok(edge.redirect(&request, tls.challenges(), https)))
                };
                self.http(stream, peer, answer, shutdown).await;
            }
        }
    }

    async fn http<S, F, R>(self: Arc<Self>, stream: S, peer: SocketAddr, answer: F, shutdown: CancellationToken)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
        F: Fn(Request<Incoming>) -> R,
        R: Future<Output = Result<Response<AnswerBody>, Infallible>> + Send + 'static,
    {
        let served = serve_connection(stream, service_fn(answer), self.settings.header_timeout, shutdown);
        tokio::select! {
            served = served => if let Err(error) = served {
                tracing::debug!(%peer, %error, "a visitor's connection broke");
            },
            () = self.ending.cancelled() => {}
        }
    }
}
