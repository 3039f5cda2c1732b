//! The hello: finds the start of a fresh conversation on a byte stream that may still hold an old one.
//!
//! A virtio-serial port keeps bytes across a reconnect of the host. So the host sends `HEYVM1 ` and 32 hex digits of
//! a fresh nonce and a newline until the guest repeats that very line; both then start HTTP/2 right behind it.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const MAGIC: &[u8] = b"HEYVM1 ";
const NONCE: usize = 32;
/// Length of the hello line in bytes: magic, nonce, newline.
pub const LEN: usize = MAGIC.len() + NONCE + 1;
/// More stale bytes than this before a hello mean that the other end is not speaking this protocol.
const MAX_STALE: usize = 64 << 20;

/// Host side: sends the hello with `nonce` (32 hex digits) and discards everything up to the guest's echo of it.
pub async fn greet<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, nonce: &str) -> io::Result<()> {
    debug_assert_eq!(nonce.len(), NONCE);
    let line = [MAGIC, nonce.as_bytes(), b"\n"].concat();
    stream.write_all(&line).await?;
    stream.flush().await?;
    let echoed = next_line(stream, |candidate| candidate == line).await?;
    debug_assert_eq!(echoed, line);
    Ok(())
}

/// Guest side: discards everything up to the next hello and repeats it.
pub async fn answer<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> io::Result<()> {
    let line = next_line(stream, |candidate| {
        candidate.starts_with(MAGIC)
            && candidate.ends_with(b"\n")
            && candidate[MAGIC.len()..LEN - 1].iter().all(u8::is_ascii_hexdigit)
    })
    .await?;
    stream.write_all(&line).await?;
    stream.flush().await
}

/// Never reads behind the line: first as much as a line is long, then byte by byte for as long as it is not one.
async fn next_line<S: AsyncRead + Unpin>(stream: &mut S, wanted: impl Fn(&[u8]) -> bool) -> io::Result<Vec<u8>> {
    let mut window = vec![0; LEN];
    stream.read_exact(&mut window).await?;
    for _ in 0..MAX_STALE {
        if wanted(&window) {
            return Ok(window);
        }
        window.rotate_left(1);
        window[LEN - 1] = stream.read_u8().await?;
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "no hello on the agent's port"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn both_ends_meet_behind_stale_bytes() {
        let (mut host, mut guest) = tokio::io::duplex(4096);
        guest.write_all(b"old frames HEYVM1 not-a-nonce\n").await.unwrap();
        host.write_all(b"\0\0\x04 rest of an old request").await.unwrap();
        let nonce = "0123456789abcdef0123456789abcdef";
        let (host_end, guest_end) = tokio::join!(greet(&mut host, nonce), answer(&mut guest));
        host_end.unwrap();
        guest_end.unwrap();
        host.write_all(b"after").await.unwrap();
        let mut after = [0; 5];
        guest.read_exact(&mut after).await.unwrap();
        assert_eq!(&after, b"after");
    }

    #[tokio::test]
    async fn an_end_of_stream_is_an_error() {
        let (mut host, guest) = tokio::io::duplex(64);
        drop(guest);
        assert!(greet(&mut host, "0123456789abcdef0123456789abcdef").await.is_err());
    }
}
