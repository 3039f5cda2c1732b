//! Bytes that one thread makes and another sends: in pieces of a good size, a few of them ahead.

use std::io::{self, Write};

use bytes::Bytes;
use futures::{Stream, stream};
use tokio::sync::mpsc;

const PIECE: usize = 256 << 10;
/// Pieces made ahead of the receiver.
const AHEAD: usize = 4;

/// The end that is written to. Without [`finish`](Self::finish) the stream is cut off, so that half of what was to be sent
/// is not taken for all of it.
pub struct Outgoing {
    pieces: mpsc::Sender<io::Result<Bytes>>,
    data: Vec<u8>,
    finished: bool,
}

/// Both ends.
pub fn pipe() -> (Outgoing, impl Stream<Item = io::Result<Bytes>> + Send + Sync + 'static) {
    let (pieces, receiver) = mpsc::channel(AHEAD);
    let outgoing = Outgoing { pieces, data: Vec::with_capacity(PIECE), finished: false };
    let next = |mut receiver: mpsc::Receiver<_>| async { receiver.recv().await.map(|piece| (piece, receiver)) };
    (outgoing, stream::unfold(receiver, next))
}

impl Outgoing {
    /// All of it has been written.
    pub fn finish(mut self) -> io::Result<()> {
        self.flush()?;
        self.finished = true;
        Ok(())
    }
}

impl Write for Outgoing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = bytes.len().min(PIECE - self.data.len());
        self.data.extend_from_slice(&bytes[..length]);
        if self.data.len() == PIECE {
            self.flush()?;
        }
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.data.is_empty() {
            return Ok(());
        }
        let data = std::mem::replace(&mut self.data, Vec::with_capacity(PIECE));
        self.pieces.blocking_send(Ok(data.into())).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        if !self.finished {
            self.pieces.blocking_send(Err(io::Error::other("it was given up"))).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    async fn received(finish: bool) -> Vec<io::Result<Bytes>> {
        let (mut outgoing, incoming) = pipe();
        let writing = tokio::task::spawn_blocking(move || {
            outgoing.write_all(&[b'x'; PIECE + 1]).unwrap();
            if finish { outgoing.finish().unwrap() } else { drop(outgoing) }
        });
        let received = Box::pin(incoming).collect().await;
        writing.await.unwrap();
        received
    }

    #[tokio::test]
    async fn what_is_given_up_is_cut_off() {
        let whole = received(true).await;
        assert_eq!(whole.iter().map(|piece| piece.as_ref().unwrap().len()).sum::<usize>(), PIECE + 1);
        assert!(received(false).await.last().unwrap().is_err());
    }
}
