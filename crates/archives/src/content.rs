//! An archive's bytes on their way in: counted, hashed, and checked on a thread of their own as they pass.

use std::io::{self, Read};

use bytes::{Buf, Bytes};
use sha2::{Digest, Sha256};
use tokio::{
    sync::mpsc::{self, Receiver, Sender},
    task::JoinHandle,
};

use crate::{Error, Limits, check};

/// Pieces that may wait for the check.
const WAITING: usize = 16;

/// The bytes that have passed.
pub struct Content {
    hash: Sha256,
    size: u64,
    limit: u64,
    pieces: Sender<Bytes>,
    check: JoinHandle<Result<(), Error>>,
}

impl Content {
    /// Of nothing yet.
    pub fn new(limits: Limits) -> Self {
        let (pieces, receiver) = mpsc::channel(WAITING);
        let check = tokio::task::spawn_blocking(move || check(Pieces { receiver, current: Bytes::new() }, &limits));
        Self { hash: Sha256::new(), size: 0, limit: limits.compressed, pieces, check }
    }

    /// Takes note of the next bytes; what makes the archive bad is told as soon as it shows.
    pub async fn pass(&mut self, piece: &Bytes) -> Result<(), Error> {
        self.size += piece.len() as u64;
        if self.size > self.limit {
            return Err(Error::TooLarge { limit: self.limit });
        }
        self.hash.update(piece);
        // The check ends before its input does only when it refuses.
        if self.pieces.send(piece.clone()).await.is_err() {
            (&mut self.check).await.map_err(Error::Internal)??;
        }
        Ok(())
    }

    /// Hash (SHA-256, in hex) and size of what passed, once the check agrees.
    pub async fn finish(self) -> Result<(String, u64), Error> {
        drop(self.pieces);
        self.check.await.map_err(Error::Internal)??;
        Ok((hex::encode(self.hash.finalize()), self.size))
    }
}

struct Pieces {
    receiver: Receiver<Bytes>,
    current: Bytes,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.receiver.blocking_recv() {
                Some(piece) => self.current = piece,
                None => return Ok(0),
            }
        }
        let count = self.current.len().min(buffer.len());
        self.current.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}
