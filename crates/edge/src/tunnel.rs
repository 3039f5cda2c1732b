//! Upgraded connections: bytes both ways, each direction ending by itself, until both have or nobody has said anything
//! for long.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional},
    time::Instant,
};

/// Carries bytes both ways until both ends have ended, one of them breaks, or neither has said anything for `idle`.
pub async fn carry<A, B>(one: A, other: B, idle: Duration)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let activity = Activity::new();
    let mut one = Watched { inner: one, activity: Arc::clone(&activity) };
    let mut other = Watched { inner: other, activity: Arc::clone(&activity) };
    tokio::select! {
        carried = copy_bidirectional(&mut one, &mut other) => {
            if let Err(error) = carried {
                tracing::debug!(%error, "a tunnel broke");
            }
        }
        () = activity.silent_for(idle) => tracing::debug!("a tunnel was idle for too long"),
    }
}

/// The same between two connections that are agreeing on another protocol.
pub async fn carry_upgraded(visitor: OnUpgrade, sandbox: OnUpgrade, idle: Duration) {
    match tokio::try_join!(visitor, sandbox) {
        Ok((visitor, sandbox)) => carry(TokioIo::new(visitor), TokioIo::new(sandbox), idle).await,
        Err(error) => tracing::debug!(%error, "an upgrade was not completed"),
    }
}

/// When something was last said, in milliseconds since `start`.
struct Activity {
    start: Instant,
    last: AtomicU64,
}

impl Activity {
    fn new() -> Arc<Self> {
        Arc::new(Self { start: Instant::now(), last: AtomicU64::new(0) })
    }

    fn note(&self) {
        let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now, Ordering::Relaxed);
    }

    async fn silent_for(&self, limit: Duration) {
        loop {
            let due = self.start + Duration::from_millis(self.last.load(Ordering::Relaxed)) + limit;
            if due <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(due).await;
        }
    }
}

/// A stream that notes when something came from it.
struct Watched<T> {
    inner: T,
    activity: Arc<Activity>,
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buffer))?;
        if buffer.filled().len() > before {
            self.activity.note();
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_tunnel_in_which_nothing_is_said_ends() {
        let (mut client, one) = duplex(64);
        let (mut app, other) = duplex(64);
        let idle = Duration::from_secs(60);
        let tunnel = tokio::spawn(carry(one, other, idle));
        for _ in 0..3 {
            tokio::time::sleep(idle - Duration::from_secs(1)).await;
            client.write_all(b"?").await.unwrap();
            assert_eq!(app.read_u8().await.unwrap(), b'?');
        }
        let since = Instant::now();
        tunnel.await.unwrap();
        assert_eq!(since.elapsed().as_secs(), idle.as_secs());
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    }
}
