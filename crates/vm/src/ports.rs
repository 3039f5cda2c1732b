//! The host's end of the ports' connection: one bare HTTP/2 connection per VM, made again after a break.
//!
//! It is apart from calls to the agent, so that neither holds the other up; see [`heyvm_agent_protocol::ports`].

use std::{
    io,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use h2::client::SendRequest;
use heyvm_agent_protocol::ports::{self, STREAMS};
use http::{Request, StatusCode};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{Mutex, OwnedSemaphorePermit, Semaphore},
};

use crate::{Error, agent};

/// The guest has answered, or does not, after this: its hello may take half a minute, its program ten seconds.
const DIAL_DEADLINE: Duration = Duration::from_secs(60);

/// A byte stream to a port in the guest.
pub trait PortStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> PortStream for T {}

/// Why a port of a guest could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Nothing listens on the port.
    #[error("nothing listens on port {0}")]
    NothingListens(u16),
    /// The agent does not answer.
    #[error(transparent)]
    Agent(#[from] Error),
}

/// The way to a VM's ports. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Ports(Arc<Inner>);

struct Inner {
    socket: Box<dyn Fn() -> PathBuf + Send + Sync>,
    connection: Mutex<Option<SendRequest<Bytes>>>,
    room: Arc<Semaphore>,
}

impl Ports {
    /// Ports behind a Unix socket, which is looked up again for every connection.
    pub fn new(socket: impl Fn() -> PathBuf + Send + Sync + 'static) -> Self {
        let room = Arc::new(Semaphore::new(STREAMS as usize));
        Self(Arc::new(Inner { socket: Box::new(socket), connection: Mutex::default(), room }))
    }

    /// Whether the VM has a ports' connection: one that an earlier version started has none.
    #[expect(clippy::disallowed_methods, reason = "looks at a socket of ours, which is in memory while its VM runs")]
    pub fn exists(&self) -> bool {
        (self.0.socket)().exists()
    }

    /// A byte stream to `port` on the guest's loopback.
    pub async fn dial(&self, port: u16) -> Result<Box<dyn PortStream>, DialError> {
        let room = Arc::clone(&self.0.room).try_acquire_owned().map_err(|_| {
            Error::Unreachable(format!("it has {STREAMS} connections to its ports already, as many as there may be"))
        })?;
        let dialed = tokio::time::timeout(DIAL_DEADLINE, self.open(port)).await;
        let stream = dialed.map_err(|_| unreachable(&io::ErrorKind::TimedOut.into()))??;
        Ok(Box::new(Counted { stream, _room: room }))
    }

    async fn open(&self, port: u16) -> Result<ports::Stream, DialError> {
        let mut connection = self.connection().await.map_err(|error| unreachable(&error))?;
        let request = Request::post(format!("http://ports/{port}")).body(()).map_err(io::Error::other);
        let request = request.map_err(|error| unreachable(&error))?;
        let broken = |error: h2::Error| unreachable(&io::Error::other(error));
        let (answer, send) = connection.send_request(request, false).map_err(broken)?;
        let (head, receive) = answer.await.map_err(broken)?.into_parts();
        match head.status {
            StatusCode::OK => Ok(ports::Stream::new(receive, send)),
            StatusCode::NOT_FOUND => Err(DialError::NothingListens(port)),
            StatusCode::GATEWAY_TIMEOUT => refused(format!("port {port} does not accept connections")),
            StatusCode::INSUFFICIENT_STORAGE => refused("it has no memory or descriptors left for a connection".into()),
            status => refused(format!("status {status}")),
        }
    }

    async fn connection(&self) -> io::Result<SendRequest<Bytes>> {
        let mut kept = self.0.connection.lock().await;
        if let Some(connection) = kept.clone()
            && let Ok(ready) = connection.ready().await
        {
            return Ok(ready);
        }
        *kept = None;
        let stream = agent::meet(&(self.0.socket)()).await?;
        let (sender, connection) = ports::client().handshake(stream).await.map_err(io::Error::other)?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "the connection to a VM's ports broke");
            }
        });
        *kept = Some(sender.clone());
        sender.ready().await.map_err(io::Error::other)
    }
}

fn refused<T>(why: String) -> Result<T, DialError> {
    Err(Error::Unreachable(why).into())
}

fn unreachable(error: &io::Error) -> DialError {
    let why = match error.kind() {
        io::ErrorKind::TimedOut => "the guest's agent does not answer".into(),
        _ => error.to_string(),
    };
    Error::Unreachable(why).into()
}

/// A stream and the room that it takes.
struct Counted {
    stream: ports::Stream,
    _room: OwnedSemaphorePermit,
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
