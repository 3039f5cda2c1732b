//! Bodies on their way: the visitor's, whose progress holds off the time-out, and the sandbox's, at whose end its
//! connection is free again.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures::task::AtomicWaker;
use http::HeaderMap;
use http_body_util::Full;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::Instant;

use crate::{
    limits::{Room, Stallable, Stallables},
    pool::Lease,
    site::{BodyError, SiteBody},
};

/// Bodies up to this many bytes are kept until the answer begins, so that they can be sent again.
const REPEATABLE: u64 = 64 << 10;

/// A visitor's body on its way to the sandbox, or none.
pub struct RequestBody {
    source: Option<Arc<Mutex<Source>>>,
    /// Of what is kept, the next piece to send.
    next: usize,
    progress: Arc<Progress>,
    gate: Option<Arc<Gate>>,
}

/// Where a body comes from, and what has come of it.
struct Source {
    inner: Incoming,
    /// Present while the body can be sent again.
    kept: Option<Vec<Bytes>>,
    trailers: Option<HeaderMap>,
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

/// Holds a body back until the app wants it (`Expect: 100-continue`).
#[derive(Default)]
pub struct Gate {
    is_open: AtomicBool,
    waker: AtomicWaker,
}

impl Gate {
    /// The body may go.
    pub fn open(&self) {
        self.is_open.store(true, Ordering::Release);
        self.waker.wake();
    }

    fn poll_open(&self, cx: &Context<'_>) -> Poll<()> {
        self.waker.register(cx.waker());
        if self.is_open.load(Ordering::Acquire) { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl RequestBody {
    /// The body of a request.
    pub fn new(inner: Incoming) -> (Self, Arc<Progress>) {
        Self::of((!inner.is_end_stream()).then_some(inner))
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
        let source = inner.map(|inner| {
            let kept = inner.size_hint().exact().is_some_and(|length| length <= REPEATABLE).then(Vec::new);
            Arc::new(Mutex::new(Source { inner, kept, trailers: None }))
        });
        (Self { source, next: 0, progress: Arc::clone(&progress), gate: None }, progress)
    }

    /// The same body, held back by `gate`.
    pub fn behind(self, gate: Option<Arc<Gate>>) -> Self {
        Self { gate, ..self }
    }

    /// The body once more from its beginning, where it can be sent again: none, and short ones.
    pub fn again(&self) -> Option<Self> {
        let can = self.source.as_ref().is_none_or(|source| lock(source).kept.is_some());
        can.then(|| Self {
            source: self.source.clone(),
            next: 0,
            progress: Arc::clone(&self.progress),
            gate: self.gate.clone(),
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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

    fn lock(&self) -> MutexGuard<'_, Instant> {
        lock(&self.last)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        let Some(source) = &this.source else { return Poll::Ready(None) };
        if let Some(gate) = &this.gate {
            ready!(gate.poll_open(cx));
        }
        let mut source = lock(source);
        let Source { inner, kept, trailers } = &mut *source;
        if let Some(piece) = kept.as_ref().and_then(|kept| kept.get(this.next)) {
            this.next += 1;
            return Poll::Ready(Some(Ok(Frame::data(piece.clone()))));
        }
        if inner.is_end_stream() {
            return Poll::Ready(trailers.clone().map(|trailers| Ok(Frame::trailers(trailers))));
        }
        let polled = Pin::new(inner).poll_frame(cx);
        this.progress.waiting_for_visitor.store(polled.is_pending(), Ordering::Relaxed);
        *this.progress.lock() = Instant::now();
        match &polled {
            Poll::Ready(Some(Err(_))) => this.progress.broken.store(true, Ordering::Relaxed),
            Poll::Ready(Some(Ok(frame))) => {
                if let (Some(kept), Some(data)) = (kept, frame.data_ref()) {
                    kept.push(data.clone());
                    this.next += 1;
                }
                if let Some(came) = frame.trailers_ref() {
                    *trailers = Some(came.clone());
                }
            }
            _ => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.source.as_ref().is_none_or(|source| {
            let source = lock(source);
            let sent_again = source.kept.as_ref().is_some_and(|kept| self.next < kept.len());
            !sent_again && source.trailers.is_none() && source.inner.is_end_stream()
        })
    }

    fn size_hint(&self) -> SizeHint {
        let Some(source) = &self.source else { return SizeHint::with_exact(0) };
        let source = lock(source);
        let hint = source.inner.size_hint();
        let kept = source.kept.iter().flat_map(|kept| kept.iter().skip(self.next));
        let kept: u64 = kept.map(|piece| piece.len() as u64).sum();
        match hint.exact() {
            Some(rest) => SizeHint::with_exact(kept + rest),
            None => hint,
        }
    }
}

/// A body on its way to the visitor: the sandbox's, or one of our own.
pub enum AnswerBody {
    /// From the sandbox.
    Sandbox(Box<FromSandbox>),
    /// From the sandbox, to a visitor who may stop taking it without saying so.
    Stallable(Arc<Stallable<FromSandbox>>),
    /// A site's.
    Site(SiteBody),
    /// Ours.
    Own(Full<Bytes>),
}

/// The sandbox's bytes, and what they hold while they come.
pub struct FromSandbox {
    inner: Incoming,
    /// Given back when the body has come to its end, ended when it has not.
    lease: Option<Lease>,
    /// The sandbox's room for this request.
    _permit: Room,
}

impl FromSandbox {
    fn give_back(&mut self) {
        if let Some(lease) = self.lease.take() {
            lease.give_back();
        }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        if frame.is_none() || self.inner.is_end_stream() {
            self.give_back();
        }
        Poll::Ready(frame)
    }
}

impl From<Bytes> for AnswerBody {
    fn from(bytes: Bytes) -> Self {
        Self::Own(Full::new(bytes))
    }
}

impl AnswerBody {
    /// A sandbox's body. A connection whose answer has no body is free at once.
    pub fn from_sandbox(inner: Incoming, lease: Option<Lease>, room: Room) -> Self {
        let mut body = Box::new(FromSandbox { inner, lease, _permit: room });
        if body.inner.is_end_stream() {
            body.give_back();
        }
        Self::Sandbox(body)
    }

    /// The same body, which is dropped when its visitor takes nothing of it for long.
    pub fn stallable(self, bodies: &Stallables<FromSandbox>) -> Self {
        match self {
            Self::Sandbox(body) if !body.inner.is_end_stream() => Self::Stallable(bodies.watch(*body)),
            other => other,
        }
    }
}

/// The visitor took nothing of the body for long.
#[derive(Debug, thiserror::Error)]
#[error("the visitor has taken nothing for too long")]
struct Abandoned;

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Own(inner) => {
                Pin::new(inner).poll_frame(cx).map(|frame| frame.map(|frame| frame.map_err(|e| match e {})))
            }
            Self::Site(inner) => Pin::new(inner).poll_frame(cx),
            Self::Sandbox(body) => body.poll_frame(cx).map(|frame| frame.map(|frame| frame.map_err(Into::into))),
            Self::Stallable(watched) => match watched.poll(|body| body.poll_frame(cx)) {
                Some(polled) => polled.map(|frame| frame.map(|frame| frame.map_err(Into::into))),
                None => Poll::Ready(Some(Err(Abandoned.into()))),
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Sandbox(body) => body.inner.is_end_stream(),
            Self::Stallable(watched) => watched.look(|body| body.inner.is_end_stream()).unwrap_or(false),
            Self::Site(inner) => inner.is_end_stream(),
            Self::Own(inner) => inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Sandbox(body) => body.inner.size_hint(),
            Self::Stallable(watched) => watched.look(|body| body.inner.size_hint()).unwrap_or_default(),
            Self::Site(inner) => inner.size_hint(),
            Self::Own(inner) => inner.size_hint(),
        }
    }
}
