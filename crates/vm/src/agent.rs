//! The host's end of the agent connection: one HTTP/2 connection per VM for calls, made anew after a break, beside the
//! one for its ports (`ports`).

use std::{
    io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt;
use heyvm_agent_protocol::{
    CHUNK, MAX_MESSAGE, hello,
    v1::{DialInput, agent_client::AgentClient},
};
use hyper_util::rt::TokioIo;
use rand::RngCore;
use tokio::{
    io::{AsyncRead, AsyncWrite, BufReader, ReadBuf},
    net::UnixStream,
    sync::{mpsc, watch},
};
use tokio_util::{io::StreamReader, sync::PollSender};
use tonic::{Code, transport::Endpoint};

pub use crate::ports::{DialError, PortStream};
use crate::{Error, agent_channel::AgentChannel, ports::Ports, qemu::Place};

/// A guest that does not answer the hello for this long is not there. One that was just resumed answers late where the
/// host's disk is busy: it reads its memory from there.
const HELLO_DEADLINE: Duration = Duration::from_secs(30);
/// A guest whose port gives something else than the agent's hello so many times in a row has no agent any more.
const GARBAGE_TRIES: u32 = 3;
/// What is read from the port at once.
const READ_BUFFER: usize = 64 << 10;
/// Bytes in flight per call: one virtio-serial round trip is long under emulation.
const STREAM_WINDOW: u32 = 1 << 20;
/// Holds the windows of all the calls that the agent takes at a time: output that no one reads must not keep others
/// waiting.
const CONNECTION_WINDOW: u32 = 1 << 30;

/// A handle on the VM's agent. Cheap to clone.
#[derive(Clone)]
pub struct AgentConnection {
    client: AgentClient<AgentChannel>,
    garbage: Arc<Garbage>,
    ports: Ports,
}

impl AgentConnection {
    /// A connection to the agent of the VM at `place`; nothing is sent before the first call.
    pub(crate) fn new(place: Place) -> Self {
        let of_ports = place.clone();
        Self::at(move || place.dir().agent_socket(), move || of_ports.dir().ports_socket())
    }

    /// A connection to the agent behind two Unix sockets, one for calls and one for ports, which are looked up again for
    /// every connection.
    pub fn at(
        socket: impl Fn() -> PathBuf + Send + 'static,
        ports: impl Fn() -> PathBuf + Send + Sync + 'static,
    ) -> Self {
        let garbage = Arc::new(Garbage::default());
        let counted = Arc::clone(&garbage);
        let channel = Endpoint::from_static("http://agent.invalid")
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .tcp_nodelay(false)
            .connect_with_connector_lazy(tower::service_fn(move |_| {
                let (socket, counted) = (socket(), Arc::clone(&counted));
                async move { Ok::<_, io::Error>(TokioIo::new(counted.meet(&socket).await?)) }
            }));
        let client = AgentClient::new(AgentChannel::new(channel))
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        Self { client, garbage, ports: Ports::new(ports) }
    }

    /// Resolves when the guest has sent garbage in place of the agent's hello too often. Nothing more is read from it.
    pub async fn speaks_garbage(&self) {
        let mut given_up = self.garbage.given_up.subscribe();
        if given_up.wait_for(|given_up| *given_up).await.is_err() {
            std::future::pending().await
        }
    }

    /// A client for the generated calls; reconnects when the connection has broken.
    pub async fn client(&self) -> Result<AgentClient<AgentChannel>, Error> {
        Ok(self.client.clone())
    }

    /// A byte stream to `port` on the guest's loopback.
    pub async fn dial(&self, port: u16) -> Result<Box<dyn PortStream>, DialError> {
        if self.ports.exists() { self.ports.dial(port).await } else { self.dial_by_call(port).await }
    }

    /// The way to a port of a VM that an earlier version started, whose agent has one connection for everything.
    async fn dial_by_call(&self, port: u16) -> Result<Box<dyn PortStream>, DialError> {
        let (sender, receiver) = mpsc::channel(16);
        let first = DialInput { port: u32::from(port), ..DialInput::default() };
        sender.send(first).await.map_err(|_| Error::Unreachable("the stream was closed".into()))?;
        let input = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let output = self.client.clone().dial(input).await.map_err(|status| match status.code() {
            Code::NotFound => DialError::NothingListens(port),
            _ => DialError::Agent(unreachable_agent(&status)),
        })?;
        let chunks =
            output.into_inner().take_while(|message| std::future::ready(!message.as_ref().is_ok_and(|m| m.half_close)));
        let bytes = chunks.map(|message| message.map(|m| Bytes::from(m.data)).map_err(io::Error::other));
        Ok(Box::new(DialStream { reader: StreamReader::new(Box::pin(bytes)), writer: PollSender::new(sender) }))
    }
}

/// A failed call as the error the rest of the host knows.
pub fn unreachable_agent(status: &tonic::Status) -> Error {
    let text = told(status);
    Error::Unreachable(if text.is_empty() { status.code().to_string() } else { text })
}

/// The message of a failed call. The guest writes it: it is cut and stripped before anyone sees it.
pub(crate) fn told(status: &tonic::Status) -> String {
    status.message().chars().filter(|c| !c.is_control()).take(200).collect()
}

/// Connects to a Unix socket whose path may be longer than an address holds.
#[expect(clippy::disallowed_methods, reason = "opens a directory of ours, which is in memory while its VM runs")]
pub(crate) async fn connect(socket: &Path) -> io::Result<UnixStream> {
    use std::os::fd::AsRawFd;
    let dir = std::fs::File::open(socket.parent().unwrap_or(Path::new("/")))?;
    let name = socket.file_name().unwrap_or_default();
    UnixStream::connect(Path::new(&format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name)).await
}

/// Counts a guest's garbage, so that reading it does not keep a processor busy for as long as the guest likes.
#[derive(Default)]
struct Garbage {
    in_a_row: AtomicU32,
    given_up: watch::Sender<bool>,
}

impl Garbage {
    async fn meet(&self, socket: &Path) -> io::Result<BufReader<UnixStream>> {
        if *self.given_up.borrow() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the guest's agent has been replaced"));
        }
        let met = meet(socket).await;
        match &met {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                if self.in_a_row.fetch_add(1, Ordering::Relaxed) + 1 >= GARBAGE_TRIES {
                    self.given_up.send_replace(true);
                }
            }
            Err(_) => {}
            Ok(_) => self.in_a_row.store(0, Ordering::Relaxed),
        }
        met
    }
}

pub(crate) async fn meet(socket: &Path) -> io::Result<BufReader<UnixStream>> {
    let mut stream = BufReader::with_capacity(READ_BUFFER, connect(socket).await?);
    let mut nonce = [0; 16];
    rand::rng().fill_bytes(&mut nonce);
    tokio::time::timeout(HELLO_DEADLINE, hello::greet(&mut stream, &hex::encode(nonce)))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the guest's agent does not answer"))??;
    Ok(stream)
}

type ByteStream = Pin<Box<dyn futures::Stream<Item = io::Result<Bytes>> + Send>>;

/// One `Dial` call as a byte stream.
struct DialStream {
    reader: StreamReader<ByteStream, Bytes>,
    writer: PollSender<DialInput>,
}

impl AsyncRead for DialStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.reader).poll_read(cx, buffer)
    }
}

impl DialStream {
    fn send(&mut self, cx: &mut Context<'_>, message: impl FnOnce() -> DialInput) -> Poll<io::Result<()>> {
        let closed = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        ready!(self.writer.poll_reserve(cx)).map_err(closed)?;
        Poll::Ready(self.writer.send_item(message()).map_err(closed))
    }
}

impl AsyncWrite for DialStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let length = data.len().min(CHUNK);
        ready!(self.send(cx, || DialInput { data: data[..length].to_vec(), ..DialInput::default() }))?;
        Poll::Ready(Ok(length))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.writer.is_closed() {
            ready!(self.send(cx, || DialInput { half_close: true, ..DialInput::default() }))?;
            self.writer.close();
        }
        Poll::Ready(Ok(()))
    }
}
