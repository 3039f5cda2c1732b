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

use crate::{
    Edge, LocalPort, Patience, Tls, Visitor,
    body::AnswerBody,
    client_io::{ClientIo, Interim},
    connection::serve_connection,
    limits::{Client, Counted},
};

/// How long to wait after an accept failed, as it does when there are no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const SWEEP: Duration = Duration::from_secs(5);

/// How long a client of TLS may be silent before its handshake: only those who begin one take room for it.
const FIRST_BYTES: Duration = Duration::from_secs(5);
/// A connection beyond the usual limit must be for the site, and say so soon.
const PATIENCE_WHEN_FULL: Duration = Duration::from_secs(5);

/// What a listener is for.
#[derive(Clone)]
enum Port {
    Plain,
    Tls(Arc<Tls>),
    /// Leads to TLS on this port.
    Redirect(Arc<Tls>, u16),
    /// One port of one sandbox.
    Local(Arc<LocalPort>),
}

/// A connection that was accepted, and the room it takes.
struct Accepted {
    stream: TcpStream,
    peer: SocketAddr,
    _room: OwnedSemaphorePermit,
    _of_client: Option<Counted<Client>>,
    for_site_alone: bool,
}

/// What is known of a connection when a request comes.
#[derive(Clone)]
pub(crate) struct Peer {
    /// The other end.
    pub visitor: Visitor,
    /// Where every request of it leads.
    pub local: Option<Arc<LocalPort>>,
    /// Whether it is one too many for sandboxes.
    pub for_site_alone: bool,
    /// Takes interim answers.
    pub interim: Arc<Interim>,
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

    /// Serves a listener on loopback that leads to one port of one sandbox.
    pub async fn serve_local(self: &Arc<Self>, listener: TcpListener, port: LocalPort, shutdown: CancellationToken) {
        self.serve_port(listener, Port::Local(Arc::new(port)), shutdown).await;
    }

    async fn serve_port(self: &Arc<Self>, listener: TcpListener, port: Port, shutdown: CancellationToken) {
        // A port of a sandbox may be given up while the others go on.
        let is_local = matches!(port, Port::Local(_));
        let ending = if is_local { self.ending.child_token() } else { self.ending.clone() };
        self.listeners.fetch_add(1, Ordering::SeqCst);
        let connections = TaskTracker::new();
        let mut sweep = tokio::time::interval(SWEEP);
        loop {
            tokio::select! {
                accepted = self.accept(&listener) => match accepted {
                    Ok(Some(accepted)) => {
                        let connection =
                            Arc::clone(self).connection(accepted, port.clone(), shutdown.clone(), ending.clone());
                        connections.spawn(connection);
                    }
                    Ok(None) => {}
                    Err(error) => {
                        tracing::warn!(%error, "accepting a connection failed");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                _ = sweep.tick(), if !is_local => {
                    self.pool.sweep();
                    self.answers.sweep(self.settings.body_timeout);
                }
                () = shutdown.cancelled() => break,
            }
        }
        drop(listener);
        connections.close();
        let in_time = tokio::time::timeout(self.settings.grace, connections.wait()).await.is_ok();
        let last = self.listeners.fetch_sub(1, Ordering::SeqCst) == 1;
        if is_local {
            ending.cancel();
        } else if last || !in_time {
            self.ending.cancel();
        }
        connections.wait().await;
    }

    /// `None` where the client has as many connections as it may.
    async fn accept(&self, listener: &TcpListener) -> io::Result<Option<Accepted>> {
        // Beyond the limits visitors wait in the listener's queue.
        let (room, for_site_alone) = tokio::select! {
            biased;
            room = Arc::clone(&self.visitors).acquire_owned() => (room.map_err(io::Error::other)?, false),
            room = Arc::clone(&self.visitors_of_site).acquire_owned() => (room.map_err(io::Error::other)?, true),
        };
        let (stream, peer) = listener.accept().await?;
        let is_trusted = self.settings.trusted_proxies.iter().any(|range| range.contains(&peer.ip().to_canonical()));
        let of_client = match is_trusted {
            true => None,
            false => match self.clients.enter(peer.ip().into(), self.settings.connections_per_client) {
                None => return Ok(None),
                counted => counted,
            },
        };
        // Small pieces go out as they come.
        stream.set_nodelay(true)?;
        Ok(Some(Accepted { stream, peer, _room: room, _of_client: of_client, for_site_alone }))
    }

    async fn connection(
        self: Arc<Self>,
        accepted: Accepted,
        port: Port,
        shutdown: CancellationToken,
        ending: CancellationToken,
    ) {
        let Accepted { stream, peer, _room, _of_client, for_site_alone } = accepted;
        let from = Peer {
            visitor: Visitor { address: peer.ip(), secure: matches!(port, Port::Tls(_)) },
            local: if let Port::Local(local) = &port { Some(Arc::clone(local)) } else { None },
            for_site_alone,
            interim: Arc::default(),
        };
        let served = async {
            match port {
                Port::Plain | Port::Local(_) => self.answer_all(stream, from, shutdown).await,
                Port::Tls(tls) => {
                    let shaken = tokio::select! {
                        shaken = self.handshake(&tls, stream) => shaken,
                        () = shutdown.cancelled() => return,
                    };
                    match shaken {
                        Ok(stream) => self.answer_all(stream, from, shutdown).await,
                        Err(error) => tracing::debug!(%peer, %error, "a handshake failed"),
                    }
                }
                Port::Redirect(tls, https) => {
                    let edge = Arc::clone(&self);
                    let answer = move |request: Request<Incoming>| {
                        std::future::ready(Ok(edge.redirect(&request, tls.challenges(), https)))
                    };
                    self.serve_http(stream, from, answer, shutdown).await;
                }
            }
        };
        tokio::select! {
            () = served => {}
            () = ending.cancelled() => {}
        }
    }

    /// Clients that say nothing take no room of those that shake hands.
    async fn handshake(&self, tls: &Tls, stream: TcpStream) -> io::Result<tokio_rustls::server::TlsStream<TcpStream>> {
        let late = |_| io::Error::from(io::ErrorKind::TimedOut);
        tokio::time::timeout(FIRST_BYTES.min(self.settings.handshake_timeout), stream.peek(&mut [0]))
            .await
            .map_err(late)??;
        let _room = self.handshakes.acquire().await.map_err(io::Error::other)?;
        tokio::time::timeout(self.settings.handshake_timeout, tls.accept(stream)).await.map_err(late)?
    }

    async fn answer_all<S>(self: &Arc<Self>, stream: S, from: Peer, shutdown: CancellationToken)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (edge, of_requests) = (Arc::clone(self), from.clone());
        let answer = move |request| {
            let (edge, from) = (Arc::clone(&edge), of_requests.clone());
            async move { edge.answer(request, &from).await }
        };
        self.serve_http(stream, from, answer, shutdown).await;
    }

    async fn serve_http<S, F, R>(&self, stream: S, from: Peer, answer: F, shutdown: CancellationToken)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
        F: Fn(Request<Incoming>) -> R,
        R: Future<Output = Result<Response<AnswerBody>, Infallible>> + Send + 'static,
    {
        let head = self.settings.header_timeout;
        let head = if from.for_site_alone { head.min(PATIENCE_WHEN_FULL) } else { head };
        let patience = Patience { head, idle: self.settings.idle_timeout };
        let stream = ClientIo::new(stream, from.interim, self.settings.body_timeout);
        if let Err(error) = serve_connection(stream, service_fn(answer), patience, shutdown).await {
            tracing::debug!(peer = %from.visitor.address, %error, "a visitor's connection broke");
        }
    }
}
