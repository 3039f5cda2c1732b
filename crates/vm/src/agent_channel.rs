//! The gRPC channel to a guest's agent. What the guest answers reaches gRPC's own code without the headers that it has no
//! need of: that code panics at some of them, and a guest's root can replace the agent by anything.

use std::task::{Context, Poll};

use bytes::Bytes;
use futures::future::{MapOk, TryFutureExt};
use http::{HeaderMap, HeaderName, Request, Response};
use http_body_util::{BodyExt, combinators::MapFrame};
use hyper::body::Frame;
use tonic::{
    body::Body,
    transport::{Channel, Error, channel::ResponseFuture},
};
use tower::Service;

/// Headers and trailers that a call's outcome is made of. `grpc-status-details-bin` is not among them: what is no base64
/// there makes tonic panic.
const NEEDED: [HeaderName; 4] = [
    http::header::CONTENT_TYPE,
    HeaderName::from_static("grpc-status"),
    HeaderName::from_static("grpc-message"),
    HeaderName::from_static("grpc-encoding"),
];

type Filtered = MapFrame<Body, fn(Frame<Bytes>) -> Frame<Bytes>>;

/// A channel whose answers carry needed headers alone. Cheap to clone.
#[derive(Clone)]
pub struct AgentChannel(Channel);

impl AgentChannel {
    /// Filters what comes over `channel`.
    pub(crate) fn new(channel: Channel) -> Self {
        Self(channel)
    }
}

impl Service<Request<Body>> for AgentChannel {
    type Response = Response<Filtered>;
    type Error = Error;
    type Future = MapOk<ResponseFuture, fn(Response<Body>) -> Response<Filtered>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Service::poll_ready(&mut self.0, cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Service::call(&mut self.0, request).map_ok(filtered)
    }
}

fn filtered(response: Response<Body>) -> Response<Filtered> {
    let (mut parts, body) = response.into_parts();
    parts.headers = needed(&parts.headers);
    Response::from_parts(parts, body.map_frame(filtered_frame))
}

fn filtered_frame(frame: Frame<Bytes>) -> Frame<Bytes> {
    match frame.into_trailers() {
        Ok(trailers) => Frame::trailers(needed(&trailers)),
        Err(data) => data,
    }
}

fn needed(all: &HeaderMap) -> HeaderMap {
    NEEDED.into_iter().filter_map(|name| all.get(&name).cloned().map(|value| (name, value))).collect()
}
