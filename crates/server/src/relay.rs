//! What goes on to another server: bodies, and upgraded connections (WebSockets, byte streams).

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use heyvm_edge::tunnel;
use http::{HeaderMap, Response, StatusCode, header};
use hyper::{
    body::{Body, Frame, Incoming, SizeHint},
    upgrade::OnUpgrade,
};

use crate::problem::Problem;

/// A byte stream in which neither end has said anything for this long is ended. Long, because a debugger or a database's
/// client may well be left open over night; finite, because nobody tells of an end that has gone.
pub const STREAM_IDLE: Duration = Duration::from_secs(24 * 60 * 60);

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

/// Joins the two ends, if the other server has agreed. They end with each other, after a day without a
/// word, and when `until` comes.
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
        tokio::select! {
            () = tunnel::carry_upgraded(visitor, server, STREAM_IDLE) => {}
            () = until => {}
        }
    });
}
