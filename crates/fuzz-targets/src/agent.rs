//! The wire between host and guest: the hello, and the messages after it.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use heyvm_agent_protocol::{hello, v1};
use prost::Message;
use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, ReadBuf};

const NONCE: &str = "0123456789abcdef0123456789abcdef";

/// Bytes from the other end of an agent's port, before both have met: for each end.
pub fn agent_hello(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime.block_on(async {
        let mut guest = Wire::new(data);
        if hello::answer(&mut guest).await.is_ok() {
            assert!(guest.sent.len() >= hello::LEN && guest.sent.len().is_multiple_of(hello::LEN), "echoes alone");
            assert!(
                guest.left.first().is_some_and(|letter| *letter != b'H'),
                "the conversation begins behind the hello"
            );
        }
        let mut host = Wire::new(data);
        if hello::greet(&mut host, NONCE).await.is_ok() {
            let line = format!("HEYVM1 {NONCE}\n");
            let read = data.len() - host.left.len();
            assert!(data[..read].ends_with(line.as_bytes()), "nothing is read behind the echo");
        }
    });
}

/// What has come, and what was sent.
struct Wire<'d> {
    left: &'d [u8],
    sent: Vec<u8>,
}

impl<'d> Wire<'d> {
    fn new(left: &'d [u8]) -> Self {
        Self { left, sent: Vec::new() }
    }
}

impl AsyncRead for Wire<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        let (now, later) = self.left.split_at(self.left.len().min(buffer.remaining()));
        buffer.put_slice(now);
        self.left = later;
        Poll::Ready(Ok(()))
    }
}

impl AsyncBufRead for Wire<'_> {
    fn poll_fill_buf(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<&[u8]>> {
        Poll::Ready(Ok(self.left))
    }

    fn consume(mut self: Pin<&mut Self>, count: usize) {
        self.left = &self.left[count..];
    }
}

impl AsyncWrite for Wire<'_> {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, data: &[u8]) -> Poll<std::io::Result<usize>> {
        self.sent.extend_from_slice(data);
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// One message; the first byte says of which kind. What can be read can be written, and read as the same again.
pub fn agent_messages(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    let readers = readers();
    readers[usize::from(*kind) % readers.len()](data);
}

fn readers() -> Vec<fn(&[u8])> {
    macro_rules! of {
        ($($message:ident),*) => { vec![$(read_again::<v1::$message>),*] };
    }
    // What a guest says to its host first, then what a host says.
    of! {
        PersonalizeReply, WarmUpReply, ExecOutput, StartMainReply, MainEvent, DialOutput, PortStatusReply, FileChunk,
        WriteFileReply, FileInfo, ListDirReply, RemoveReply, UnpackReply, MountOutput, MetricsReply, ShutdownReply,
        GrowDiskReply, FreezeDiskReply, ThawDiskReply, PersonalizeRequest, WarmUpRequest, ExecInput, StartMainRequest,
        WatchMainRequest, DialInput, PortStatusRequest, ReadFileRequest, WriteFileInput, StatRequest, ListDirRequest,
        RemoveRequest, UnpackInput, PackRequest, MountInput, MetricsRequest, ShutdownRequest, GrowDiskRequest,
        FreezeDiskRequest, ThawDiskRequest
    }
}

fn read_again<M: Message + Default + PartialEq>(data: &[u8]) {
    let Ok(message) = M::decode(data) else { return };
    let bytes = message.encode_to_vec();
    let again = M::decode(bytes.as_slice()).expect("what was written can be read");
    // A figure that is no number is not equal to itself.
    assert!(again == message || again.encode_to_vec() == bytes);
}
