//! A client's connection: interim answers (103) between hyper's own bytes, and an end when the client takes nothing.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use futures::task::AtomicWaker;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Sleep,
};

/// More bytes of interim answers than this are not kept for a client that does not take them.
const MAX_WAITING: usize = 64 << 10;

/// Interim answers on their way to a client by HTTP/1.1.
#[derive(Default)]
pub struct Interim {
    waiting: Mutex<BytesMut>,
    waker: AtomicWaker,
}

impl Interim {
    /// Sends a whole head as soon as no other answer is on its way.
    pub fn send(&self, head: &[u8]) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() + head.len() <= MAX_WAITING {
            waiting.extend_from_slice(head);
            drop(waiting);
            self.waker.wake();
        }
    }

    fn take(&self) -> Bytes {
        std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner)).freeze()
    }
}

/// A client's stream.
pub struct ClientIo<S> {
    stream: S,
    interim: Arc<Interim>,
    /// Of an interim answer that is on its way.
    rest: Bytes,
    /// Whether hyper has written nothing since it flushed: what it writes next is no middle of an answer that it had begun
    /// before an interim one came.
    is_flushed: bool,
    patience: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S> ClientIo<S> {
    /// `stream`, on which the client may take nothing for `patience`.
    pub fn new(stream: S, interim: Arc<Interim>, patience: Duration) -> Self {
        Self { stream, interim, rest: Bytes::new(), is_flushed: true, patience, stalled: None }
    }

    /// What a write has come to: one that waits for too long fails.
    fn patient<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let patience = self.patience;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes nothing")))
    }
}

impl<S: AsyncWrite + Unpin> ClientIo<S> {
    /// An interim answer goes before the answer's own head.
    fn poll_before_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if std::mem::take(&mut self.is_flushed) && self.rest.is_empty() {
            self.rest = self.interim.take();
        }
        self.poll_interim(cx)
    }

    /// An interim answer goes out whole before anything else does.
    fn poll_interim(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.rest.is_empty() {
            let written = Pin::new(&mut self.stream).poll_write(cx, &self.rest);
            match ready!(self.patient(cx, written))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.rest.advance(written),
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ClientIo<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ClientIo<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_before_write(cx))?;
        let written = Pin::new(&mut self.stream).poll_write(cx, data);
        self.patient(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_before_write(cx))?;
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, data);
        self.patient(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// hyper flushes when all that it has to write is written: never in the middle of an answer's head, and with a head
    /// still to come while the app has sent interim answers alone.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        this.interim.waker.register(cx.waker());
        loop {
            ready!(this.poll_interim(cx))?;
            this.rest = this.interim.take();
            if this.rest.is_empty() {
                break;
            }
        }
        this.is_flushed = true;
        let flushed = Pin::new(&mut this.stream).poll_flush(cx);
        this.patient(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.patient(cx, shut)
    }
}
