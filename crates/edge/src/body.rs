//! Bodies on their way: the visitor's, whose progress holds off the time-out, and the sandbox's, at whose end its
//! connection is free again.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::{sync::OwnedSemaphorePermit, time::Instant};

use crate::{
    pool::Lease,
    site::{BodyError, SiteBody},
};

/// A visitor's body on its way to the sandbox, or none.
pub struct RequestBody {
    inner: Option<Incoming>,
    progress: Arc<Progress>,
}

/// How far a request's body has come.
pub struct Progress {
    waiting_for_visitor: AtomicBool,
    broken: AtomicBool,
    last: Mutex<Instant>,
}

/// Who does not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stalled {
    /// Sends nothing of its body.
    Visitor,
    /// Does not answer.
    Sandbox,
}

impl RequestBody {
    /// The body of a request.
    pub fn new(inner: Incoming) -> (Self, Arc<Progress>) {
        let inner = (!inner.is_end_stream()).then_some(inner);
        Self::of(inner)
    }

    /// No body.
    pub fn none() -> (Self, Arc<Progress>) {
        Self::of(None)
    }

    fn of(inner: Option<Incoming>) -> (Self, Arc<Progress>) {
        let progress = Arc::new(Progress {
            waiting_for_visitor: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            last: Mutex::new(Instant::now()),
        });
        (Self { inner, progress: Arc::clone(&progress) }, progress)
    }

    /// The body of a request without one, if this is one.
    pub fn empty_again(&self) -> Option<Self> {
        self.inner.is_none().then(|| Self { inner: None, progress: Arc::clone(&self.progress) })
    }
}

impl Progress {
    /// Resolves when the sandbox has done nothing for `sandbox`, or the visitor has sent nothing for `visitor`; says who
    /// is waited for.
    pub async fn stalled(&self, sandbox: Duration, visitor: Duration) -> Stalled {
        loop {
            let waiting_for_visitor = self.waiting_for_visitor.load(Ordering::Relaxed);
            let end = *self.lock() + if waiting_for_visitor { visitor } else { sandbox };
            if end <= Instant::now() {
                return if waiting_for_visitor { Stalled::Visitor } else { Stalled::Sandbox };
            }
            // Who is waited for may change meanwhile.
            tokio::time::sleep_until(end.min(Instant::now() + sandbox.min(visitor))).await;
        }
    }

    /// Whether the visitor's body was not what its head promised, or came to no end.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Instant> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        let Some(inner) = &mut this.inner else { return Poll::Ready(None) };
        let polled = Pin::new(inner).poll_frame(cx);
        this.progress.waiting_for_visitor.store(polled.is_pending(), Ordering::Relaxed);
        *this.progress.lock() = Instant::now();
        if matches!(polled, Poll::Ready(Some(Err(_)))) {
            this.progress.broken.store(true, Ordering::Relaxed);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or(SizeHint::with_exact(0), Body::size_hint)
    }
}

/// A body on its way to the visitor: the sandbox's, or one of our own.
pub enum AnswerBody {
    /// From the sandbox.
    Sandbox {
        /// The bytes.
        inner: Incoming,
        /// Given back when the body has come to its end, ended when it has not.
        lease: Option<Lease>,
        /// The sandbox's room for this request.
        _permit: OwnedSemaphorePermit,
    },
    /// A site's.
    Site(SiteBody),
    /// Ours.
    Own(Full<Bytes>),
}

impl From<Bytes> for AnswerBody {
    fn from(bytes: Bytes) -> Self {
        Self::Own(Full::new(bytes))
    }
}

impl AnswerBody {
    /// A sandbox's body. A connection whose answer has no body is free at once.
    pub fn from_sandbox(inner: Incoming, lease: Option<Lease>, permit: OwnedSemaphorePermit) -> Self {
        let mut body = Self::Sandbox { inner, lease, _permit: permit };
        if body.is_end_stream() {
            body.give_back();
        }
        body
    }

    fn give_back(&mut self) {
        if let Self::Sandbox { lease, .. } = self
            && let Some(lease) = lease.take()
        {
            lease.give_back();
        }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        match this {
            Self::Own(inner) => {
                Pin::new(inner).poll_frame(cx).map(|frame| frame.map(|frame| frame.map_err(|e| match e {})))
            }
            Self::Site(inner) => Pin::new(inner).poll_frame(cx),
            Self::Sandbox { inner, .. } => {
                let frame = ready!(Pin::new(&mut *inner).poll_frame(cx));
                if frame.is_none() || inner.is_end_stream() {
                    this.give_back();
                }
                Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Sandbox { inner, .. } => inner.is_end_stream(),
            Self::Site(inner) => inner.is_end_stream(),
            Self::Own(inner) => inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Sandbox { inner, .. } => inner.size_hint(),
            Self::Site(inner) => inner.size_hint(),
            Self::Own(inner) => inner.size_hint(),
        }
    }
}
