//! An agent that a guest's root has replaced: it greets as the real one does, and then misbehaves.

use std::{convert::Infallible, io, path::Path};

use heyvm_agent_protocol::hello;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt, Empty, StreamBody, combinators::BoxBody};
use hyper::{
    body::{Bytes, Frame},
    server::conn::http2,
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncWriteExt, BufStream},
    net::{UnixListener, UnixStream},
    task::JoinSet,
};

/// How an agent misbehaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Misbehaviour {
    /// Every call fails with a status whose details are no base64.
    InvalidDetails,
    /// The same, at the end of an answer that began well.
    InvalidDetailsInTrailers,
    /// Calls are taken and never answered.
    Silence,
    /// Bytes without end in place of the greeting.
    Garbage,
    /// Its disk is said to be full, and no other call is answered. Not one of [`MISBEHAVIOURS`]: it may be true.
    FullDisk,
}

/// All that only a replaced agent does.
pub const MISBEHAVIOURS: [Misbehaviour; 4] = [
    Misbehaviour::InvalidDetails,
    Misbehaviour::InvalidDetailsInTrailers,
    Misbehaviour::Silence,
    Misbehaviour::Garbage,
];

/// Serves hosts at `socket`, which must not exist, for as long as the future is polled.
pub async fn serve(socket: &Path, how: Misbehaviour) -> io::Result<Infallible> {
    let listener = UnixListener::bind(socket)?;
    let mut hosts = JoinSet::new();
    loop {
        hosts.spawn(meet(listener.accept().await?.0, how));
    }
}

/// A host that leaves is an error like any other here, and of no interest.
async fn meet(stream: UnixStream, how: Misbehaviour) -> io::Result<()> {
    let mut stream = BufStream::new(stream);
    if how == Misbehaviour::Garbage {
        loop {
            stream.write_all(&[b'x'; 4096]).await?;
        }
    }
    hello::answer(&mut stream).await?;
    let answer = service_fn(move |asked: Request<_>| async move {
        match how {
            Misbehaviour::FullDisk if asked.uri().path().ends_with("/Metrics") => Ok(full_disk()),
            Misbehaviour::FullDisk | Misbehaviour::Silence | Misbehaviour::Garbage => std::future::pending().await,
            Misbehaviour::InvalidDetails => Ok::<_, Infallible>(failed_at_once()),
            Misbehaviour::InvalidDetailsInTrailers => Ok(failed_at_the_end()),
        }
    });
    let serving = http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), answer);
    serving.await.map_err(io::Error::other)
}

type Answer = Response<BoxBody<Bytes, Infallible>>;

fn status() -> HeaderMap {
    let entries = [("grpc-status", "13"), ("grpc-message", "no"), ("grpc-status-details-bin", "!!!")];
    entries.into_iter().map(|(name, value)| (name.parse().expect("a name"), HeaderValue::from_static(value))).collect()
}

fn failed_at_once() -> Answer {
    let mut answer = Response::new(Empty::new().boxed());
    *answer.headers_mut() = status();
    answer.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    answer
}

fn full_disk() -> Answer {
    // A MetricsReply, uncompressed, its length before it: disk_total (3) and disk_used (4) are 1 GiB each.
    let message = b"\0\0\0\0\x0c\x18\x80\x80\x80\x80\x04\x20\x80\x80\x80\x80\x04";
    let done = HeaderMap::from_iter([("grpc-status".parse().expect("a name"), HeaderValue::from_static("0"))]);
    let frames = futures::stream::iter([Ok(Frame::data(Bytes::from_static(message))), Ok(Frame::trailers(done))]);
    let mut answer = Response::new(BodyExt::boxed(StreamBody::new(frames)));
    answer.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    answer
}

fn failed_at_the_end() -> Answer {
    let trailers = futures::stream::iter([Ok(Frame::trailers(status()))]);
    let mut answer = Response::new(BodyExt::boxed(StreamBody::new(trailers)));
    answer.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    answer
}
