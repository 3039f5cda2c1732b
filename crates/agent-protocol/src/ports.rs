//! The ports' connection: bare HTTP/2 on a virtio-serial port of its own, one stream per connection to a program.
//!
//! The host sends `CONNECT`-like requests (`POST /8080`); the answer's status says whether the program accepted. Then
//! data goes both ways without any framing of ours, and END_STREAM ends one direction.
//!
//! Programs that do not read and clients that do not read cost their own stream's window and nothing else: the window
//! of the connection holds those of all streams, and a stream that is dropped is reset, which gives its share back.
//! Calls to the agent are on another connection, so that no traffic of a port keeps them waiting.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use h2::{Reason, RecvStream, SendStream, client, server};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::CHUNK;

/// Name of the virtio-serial port, as in `/sys/class/virtio-ports/*/name`.
pub const PORT_NAME: &str = "heyvm.ports";
/// Connections to one guest's programs at a time; the host opens no more.
pub const STREAMS: u32 = 1024;
/// Bytes of one direction of a stream that wait for a reader at its other end.
const STREAM_WINDOW: u32 = 128 << 10;
/// Holds the windows of all streams at once, so that unread ones never take the others' share.
const CONNECTION_WINDOW: u32 = 2 * STREAMS * STREAM_WINDOW;
const FRAME: u32 = 32 << 10;
/// Heads have a status or a path and nothing else.
const HEAD: u32 = 4 << 10;

/// The host's settings.
pub fn client() -> client::Builder {
    let mut builder = client::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buffer_size(STREAM_WINDOW as usize)
        .max_frame_size(FRAME)
        .max_header_list_size(HEAD)
        .enable_push(false);
    builder
}

/// The guest's settings. Clients come and go in crowds: streams that were reset before they were looked at are no attack.
pub fn server() -> server::Builder {
    let mut builder = server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buffer_size(STREAM_WINDOW as usize)
        .max_frame_size(FRAME)
        .max_header_list_size(HEAD)
        .max_concurrent_streams(2 * STREAMS)
        .max_concurrent_reset_streams(2 * STREAMS as usize)
        .max_pending_accept_reset_streams(2 * STREAMS as usize);
    builder
}

/// What comes from the other end.
pub struct Reader {
    stream: RecvStream,
    unread: Bytes,
}

/// What goes to the other end.
pub struct Writer {
    stream: SendStream<Bytes>,
    is_ended: bool,
}

/// Both directions. Dropping it resets the stream unless both have ended.
pub struct Stream {
    reader: Reader,
    writer: Writer,
}

impl Stream {
    /// The two halves of an HTTP/2 stream.
    pub fn new(receive: RecvStream, send: SendStream<Bytes>) -> Self {
        Self {
            reader: Reader { stream: receive, unread: Bytes::new() },
            writer: Writer { stream: send, is_ended: false },
        }
    }

    /// The directions one by one.
    pub fn into_split(self) -> (Reader, Writer) {
        (self.reader, self.writer)
    }
}

impl Writer {
    /// Resolves when the other end has reset the stream, or the connection has ended.
    pub async fn reset(&mut self) {
        std::future::poll_fn(|cx| self.stream.poll_reset(cx)).await.ok();
    }

    /// Resets the stream, so that the other end sees a broken connection instead of an ended one.
    pub fn break_off(&mut self) {
        self.stream.send_reset(Reason::CANCEL);
    }
}

fn broken(error: h2::Error) -> io::Error {
    if error.is_io() {
        return error.into_io().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into());
    }
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}

impl AsyncRead for Reader {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.unread.is_empty() {
            match ready!(this.stream.poll_data(cx)) {
                Some(data) => this.unread = data.map_err(broken)?,
                None => return Poll::Ready(Ok(())),
            }
        }
        let length = this.unread.len().min(buffer.remaining());
        buffer.put_slice(&this.unread[..length]);
        this.unread.advance(length);
        // Fails where the stream has ended meanwhile; its share has come back then.
        this.stream.flow_control().release_capacity(length).ok();
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Writer {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.is_ended {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let wanted = data.len().min(CHUNK);
        this.stream.reserve_capacity(wanted);
        while this.stream.capacity() == 0 {
            match ready!(this.stream.poll_capacity(cx)) {
                Some(capacity) => drop(capacity.map_err(broken)?),
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            }
        }
        let length = this.stream.capacity().min(wanted);
        this.stream.send_data(Bytes::copy_from_slice(&data[..length]), false).map_err(broken)?;
        Poll::Ready(Ok(length))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !std::mem::replace(&mut this.is_ended, true) {
            this.stream.send_data(Bytes::new(), true).map_err(broken)?;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.reader).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writer).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_shutdown(cx)
    }
}
