//! The virtio-serial port that leads to the host.
//!
//! Without a host the port is hung up and reads give nothing; a watch on it would report that over and over. So the
//! wait for a host looks at changes alone, through a watch of its own.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::Path,
    pin::Pin,
    task::{Context, Poll, ready},
};

use nix::{
    libc::O_NONBLOCK,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    unistd,
};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd};

use crate::descriptor;

/// The open port with a host at its other end.
pub struct Port {
    fd: AsyncFd<OwnedFd>,
}

/// Opens the port anew and waits until a host has something to say.
pub async fn wait_for_host(path: &Path) -> io::Result<Port> {
    let port = File::options().read(true).write(true).custom_flags(O_NONBLOCK).open(path)?;
    let changes = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    changes.add(&port, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0))?;
    let watched = descriptor::watch(changes.0.try_clone()?, Interest::READABLE)?;
    while !watched.async_io(Interest::READABLE, |_| host_is_there(&changes)).await? {}
    drop(watched);
    Ok(Port { fd: descriptor::watch(port.into(), Interest::READABLE | Interest::WRITABLE)? })
}

/// `WouldBlock` when nothing has changed.
fn host_is_there(changes: &Epoll) -> io::Result<bool> {
    let mut events = [EpollEvent::empty()];
    if changes.wait(&mut events, EpollTimeout::ZERO)? == 0 {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    let state = events[0].events();
    Ok(state.contains(EpollFlags::EPOLLIN) && !state.contains(EpollFlags::EPOLLHUP))
}

impl AsyncRead for Port {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.fd.poll_read_ready(cx))?;
            // The host has left, if only for a moment: what comes now is another conversation.
            if guard.ready().is_read_closed() {
                return Poll::Ready(Ok(()));
            }
            match guard.try_io(|fd| Ok(unistd::read(fd, buffer.initialize_unfilled())?)) {
                Ok(read) => return Poll::Ready(read.map(|length| buffer.advance(length))),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.fd.poll_write_ready(cx))?;
            if guard.ready().is_write_closed() {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            if let Ok(written) = guard.try_io(|fd| Ok(unistd::write(fd, data)?)) {
                return Poll::Ready(written);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
