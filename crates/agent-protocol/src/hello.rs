//! The hello: finds the start of a fresh conversation on a byte stream that may still hold an old one.
//!
//! A virtio-serial port keeps bytes across a reconnect of the host, and an end that has not noticed the reconnect yet
//! may swallow some. So the host sends `HEYVM1 `, 32 hex digits of a fresh nonce and a newline, again and again until
//! the guest repeats that very line; both then start HTTP/2 right behind it. The guest skips copies that were on their
//! way: HTTP/2 begins with another letter.

use std::{io, time::Duration};

use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncWrite, AsyncWriteExt};

const MAGIC: &[u8] = b"HEYVM1 ";
const NONCE: usize = 32;
/// Length of the hello line in bytes: magic, nonce, newline.
pub const LEN: usize = MAGIC.len() + NONCE + 1;
/// More stale bytes than this before a hello mean that the other end is not speaking this protocol: an old conversation
/// has at most its window of 8 MiB on the way.
pub const MAX_STALE: usize = 16 << 20;
/// A guest that is busy with the end of an old conversation swallows the first hello; it is said again after this and
/// then after twice as long each time, up to the second figure.
const AGAIN_AFTER: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(640)];

/// Host side: sends the hello with `nonce` (32 hex digits) and discards everything up to the guest's echo of it.
///
/// Waits for as long as the guest takes; the caller gives up.
/// More than [`MAX_STALE`] bytes without it are [`io::ErrorKind::InvalidData`].
pub async fn greet<S: AsyncBufRead + AsyncWrite + Unpin>(stream: &mut S, nonce: &str) -> io::Result<()> {
    debug_assert_eq!(nonce.len(), NONCE);
    let line = [MAGIC, nonce.as_bytes(), b"\n"].concat();
    let mut search = Search::default();
    let [mut patience, longest] = AGAIN_AFTER;
    loop {
        stream.write_all(&line).await?;
        stream.flush().await?;
        let echo = search.next_line(stream, |candidate| candidate == line);
        if let Ok(echoed) = tokio::time::timeout(patience, echo).await {
            return echoed.map(drop);
        }
        patience = longest.min(2 * patience);
    }
}

/// Guest side: discards everything up to the next hello and repeats it; returns when the conversation begins.
pub async fn answer<S: AsyncBufRead + AsyncWrite + Unpin>(stream: &mut S) -> io::Result<()> {
    let mut line = Search::default().next_line(stream, is_hello).await?;
    loop {
        stream.write_all(&line).await?;
        stream.flush().await?;
        match next_hello(stream, &line).await? {
            // Another host has come before this one has said anything.
            Some(newer) => line = newer,
            None => return Ok(()),
        }
    }
}

fn is_hello(candidate: &[u8]) -> bool {
    candidate.starts_with(MAGIC)
        && candidate.ends_with(b"\n")
        && candidate[MAGIC.len()..LEN - 1].iter().all(u8::is_ascii_hexdigit)
}

/// Skips copies of `answered`; `None` when the conversation begins, a line when another hello comes first.
async fn next_hello<S: AsyncBufRead + Unpin>(stream: &mut S, answered: &[u8]) -> io::Result<Option<Vec<u8>>> {
    loop {
        match stream.fill_buf().await?.first() {
            None => return Err(io::ErrorKind::UnexpectedEof.into()),
            Some(&letter) if letter != MAGIC[0] => return Ok(None),
            Some(_) => {}
        }
        let line = Search::default().next_line(stream, is_hello).await?;
        if line != answered {
            return Ok(Some(line));
        }
    }
}

/// A search for a line among stale bytes; it can be broken off and continued.
#[derive(Default)]
struct Search {
    /// The last bytes that were consumed: a line may begin among them.
    tail: Vec<u8>,
    consumed: usize,
}

impl Search {
    /// Consumes everything up to the end of the first line that is wanted, and nothing behind it.
    async fn next_line<S: AsyncBufRead + Unpin>(
        &mut self,
        stream: &mut S,
        wanted: impl Fn(&[u8]) -> bool,
    ) -> io::Result<Vec<u8>> {
        while self.consumed <= MAX_STALE {
            let carried = self.tail.len();
            let buffer = stream.fill_buf().await?;
            if buffer.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.tail.extend_from_slice(buffer);
            if let Some(at) = self.tail.windows(LEN).position(&wanted) {
                let line = self.tail[at..at + LEN].to_vec();
                stream.consume(at + LEN - carried);
                return Ok(line);
            }
            let read = self.tail.len() - carried;
            stream.consume(read);
            self.consumed += read;
            self.tail.drain(..self.tail.len().saturating_sub(LEN - 1));
        }
        Err(io::Error::new(io::ErrorKind::InvalidData, "the guest sends something else than the agent's hello"))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, BufStream, DuplexStream, duplex};

    use super::*;

    const NONCE: &str = "0123456789abcdef0123456789abcdef";

    fn pair() -> (BufStream<DuplexStream>, BufStream<DuplexStream>) {
        let (host, guest) = duplex(4096);
        (BufStream::new(host), BufStream::new(guest))
    }

    async fn greet_and_begin(host: &mut BufStream<DuplexStream>) {
        greet(host, NONCE).await.unwrap();
        host.write_all(b"PRI").await.unwrap();
        host.flush().await.unwrap();
    }

    async fn assert_begun(guest: &mut BufStream<DuplexStream>) {
        let mut after = [0; 3];
        guest.read_exact(&mut after).await.unwrap();
        assert_eq!(&after, b"PRI");
    }

    #[tokio::test]
    async fn both_ends_meet_behind_stale_bytes() {
        let (mut host, mut guest) = pair();
        guest.write_all(b"old frames HEYVM1 not-a-nonce\n").await.unwrap();
        guest.flush().await.unwrap();
        host.write_all(b"\0\0\x04 rest of an old request").await.unwrap();
        let ((), answered) = tokio::join!(greet_and_begin(&mut host), answer(&mut guest));
        answered.unwrap();
        assert_begun(&mut guest).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_hello_that_was_swallowed_is_said_again() {
        let (mut host, mut guest) = pair();
        let swallow_then_answer = async {
            let mut swallowed = [0; LEN];
            guest.read_exact(&mut swallowed).await.unwrap();
            answer(&mut guest).await.unwrap();
        };
        tokio::join!(greet_and_begin(&mut host), swallow_then_answer);
        assert_begun(&mut guest).await;
    }

    #[tokio::test]
    async fn copies_and_earlier_hosts_are_skipped() {
        let (mut host, mut guest) = pair();
        let line = |digit: &str| format!("HEYVM1 {}\n", digit.repeat(NONCE.len()));
        let said = [line("a"), line("a"), line("b"), line("b"), "PRI".into()].concat();
        host.write_all(said.as_bytes()).await.unwrap();
        host.flush().await.unwrap();
        answer(&mut guest).await.unwrap();
        let mut echoed = vec![0; 2 * LEN];
        host.read_exact(&mut echoed).await.unwrap();
        assert_eq!(echoed, [line("a"), line("b")].concat().as_bytes());
        assert_begun(&mut guest).await;
    }

    #[tokio::test]
    async fn an_end_of_stream_is_an_error() {
        let (mut host, guest) = pair();
        drop(guest);
        assert!(greet(&mut host, NONCE).await.is_err());
    }

    #[tokio::test]
    async fn nothing_behind_the_echo_is_consumed() {
        for stale in [0, 1, LEN, 8191, 8192, 8193, 100_000] {
            let (host, guest) = duplex(1 << 20);
            let (mut host, mut guest) = (BufStream::new(host), guest);
            let line = format!("HEYVM1 {NONCE}\n");
            let said = [vec![b'H'; stale], line.into_bytes(), b"HTTP/2".to_vec()].concat();
            guest.write_all(&said).await.unwrap();
            greet(&mut host, NONCE).await.unwrap();
            let mut after = [0; 6];
            host.read_exact(&mut after).await.unwrap();
            assert_eq!(&after, b"HTTP/2", "behind {stale} stale bytes");
        }
    }

    #[tokio::test]
    async fn endless_garbage_ends_the_search() {
        let (mut host, mut guest) = pair();
        let flood = async {
            let garbage = [b'x'; 4096];
            while guest.write_all(&garbage).await.is_ok() {}
        };
        let error = tokio::select! {
            () = flood => unreachable!("the host reads for as long as it has a budget"),
            greeted = greet(&mut host, NONCE) => greeted.unwrap_err(),
        };
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
