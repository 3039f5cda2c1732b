//! What goes on to another server: bodies, and upgraded connections (WebSockets, byte streams).

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode, header};
use hyper::{
    body::{Body, Frame, Incoming, SizeHint},
    upgrade::OnUpgrade,
};
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional;

use crate::problem::Problem;

/// A body on its way to another server. When it breaks off so does the request there, which is not that server's fault.
pub struct Passing {
    inner: axum::body::Body,
    broken: Broken,
}

/// Whether a body has broken off.
#[derive(Clone, Default)]
pub struct Broken(Arc<AtomicBool>);

impl Passing {
    /// The body, and where it will be told that it broke off.
    pub fn new(inner: axum::body::Body) -> (Self, Broken) {
        let broken = Broken::default();
        (Self { inner, broken: broken.clone() }, broken)
    }
}

impl Broken {
    /// What to answer instead of `error`, that the other server's silence came to.
    pub fn explain(&self, error: Problem) -> Problem {
        if self.0.load(Ordering::Relaxed) { Problem::broke_off("it was not what its head promised") } else { error }
    }
}

impl Body for Passing {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        if matches!(frame, Some(Err(_))) {
            self.broken.0.store(true, Ordering::Relaxed);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Whether a request wants to change the protocol.
pub fn wants_upgrade(headers: &HeaderMap) -> bool {
    headers.contains_key(header::UPGRADE)
}

/// Joins the two ends, if the other server has agreed. They end with each other, and when `until` comes.
pub fn upgraded(
    visitor: OnUpgrade,
    response: &mut Response<Incoming>,
    until: impl Future<Output = ()> + Send + 'static,
) {
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return;
    }
    let server = hyper::upgrade::on(response);
    tokio::spawn(async move {
        if let (Ok(visitor), Ok(server)) = tokio::join!(visitor, server) {
            let (mut visitor, mut server) = (TokioIo::new(visitor), TokioIo::new(server));
            tokio::select! {
                // That one of the two breaks off is how such a connection ends.
                _ = copy_bidirectional(&mut visitor, &mut server) => {}
                () = until => {}
            }
        }
    });
}
