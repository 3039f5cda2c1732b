//! One request on its way to a sandbox, and the answer on its way back.

use std::{convert::Infallible, net::SocketAddr, sync::Arc};

use http::{Method, Request, Response, StatusCode, Uri, Version, request, uri};
use hyper::{
    body::Incoming,
    client::conn::{TrySendError, http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::sync::OwnedSemaphorePermit;

use crate::{
    ByteStream, Edge, Route,
    body::{AnswerBody, Progress, RequestBody},
    headers::{self, Visitor},
    host,
    pool::{Lease, Sender1, Sender2},
    refusal::{Form, Refusal},
    tunnel,
};

/// Largest head of a sandbox's answer, in bytes.
const ANSWER_HEAD: usize = 64 << 10;
const HTTP2_WINDOW: u32 = 1 << 20;

/// Where a request goes.
struct Target {
    route: Route,
    authority: String,
}

impl Edge {
    /// Answers one request, whatever comes of it.
    pub(crate) async fn answer(
        self: &Arc<Self>,
        request: Request<Incoming>,
        peer: SocketAddr,
    ) -> Result<Response<AnswerBody>, Infallible> {
        let form = Form::of(request.headers());
        let answered = self.forward(request, peer).await;
        Ok(answered.unwrap_or_else(|refusal| {
            tracing::debug!(?refusal, "refused");
            refusal.response(form)
        }))
    }

    async fn forward(
        self: &Arc<Self>,
        mut request: Request<Incoming>,
        peer: SocketAddr,
    ) -> Result<Response<AnswerBody>, Refusal> {
        let target = self.target(&request).await?;
        let permit = self.limits.enter(&target.route.sandbox).ok_or(Refusal::Busy)?;
        let wanted = headers::upgrade(request.headers()).filter(|_| request.version() == Version::HTTP_11);
        let visitor_upgrade = wanted.is_some().then(|| hyper::upgrade::on(&mut request));
        let is_grpc = request.version() == Version::HTTP_2 && headers::is_grpc(request.headers());

        let (mut head, body) = request.into_parts();
        head.extensions = http::Extensions::new();
        headers::to_sandbox(&mut head, &Visitor { address: peer.ip(), authority: &target.authority }, wanted);
        let (body, progress) = RequestBody::new(body);
        let exchange = async {
            if is_grpc { self.exchange2(&target, head, body).await } else { self.exchange1(&target, head, body).await }
        };
        let (response, lease) = self.in_time(&progress, exchange).await?;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return self.switch(response, visitor_upgrade, permit);
        }
        let (mut head, body) = response.into_parts();
        headers::to_visitor(&mut head.headers, false);
        head.version = Version::HTTP_11;
        Ok(Response::from_parts(head, AnswerBody::from_sandbox(body, lease, permit)))
    }

    async fn target(&self, request: &Request<Incoming>) -> Result<Target, Refusal> {
        let authority = host::authority(request)?;
        if request.method() == Method::CONNECT {
            return Err(Refusal::BadRequest("wants a tunnel to elsewhere"));
        }
        let subdomain = host::subdomain(&authority, &self.settings.base_domain)
            .ok_or(Refusal::NoConnection(crate::ConnectError::UnknownSubdomain))?;
        let route = self.upstreams.route(subdomain).await?;
        Ok(Target { route, authority })
    }

    async fn in_time<T>(
        &self,
        progress: &Progress,
        exchange: impl Future<Output = Result<T, Refusal>>,
    ) -> Result<T, Refusal> {
        tokio::select! {
            done = exchange => done,
            () = progress.stalled(self.settings.response_timeout) => Err(Refusal::TimedOut),
        }
    }

    /// HTTP/1.1, over an idle connection where there is one.
    async fn exchange1(
        &self,
        target: &Target,
        mut head: request::Parts,
        body: RequestBody,
    ) -> Result<(Response<Incoming>, Option<Lease>), Refusal> {
        head.version = Version::HTTP_11;
        head.uri = origin_form(&head.uri)?;
        // What may be sent a second time, should an idle connection turn out to have ended.
        let again = body.empty_again().filter(|_| head.method.is_idempotent()).map(|body| (head.clone(), body));
        let mut request = Request::from_parts(head, body);
        if let Some(mut sender) = self.pool.take(&target.route) {
            match sender.try_send_request(request).await {
                Ok(response) => return Ok((response, Some(self.pool.lend(sender, &target.route)))),
                Err(mut error) => {
                    request = unsent(&mut error).or(again_after(&error, again)).ok_or_else(|| broken(&error))?
                }
            }
        }
        let mut sender = self.connect1(target).await?;
        let response = sender.try_send_request(request).await.map_err(|error| broken(&error))?;
        Ok((response, Some(self.pool.lend(sender, &target.route))))
    }

    /// HTTP/2, over the route's shared connection.
    async fn exchange2(
        &self,
        target: &Target,
        mut head: request::Parts,
        body: RequestBody,
    ) -> Result<(Response<Incoming>, Option<Lease>), Refusal> {
        head.version = Version::HTTP_2;
        head.uri = absolute_form(&head.uri, &target.authority)?;
        headers::for_http2(&mut head.headers);
        let mut request = Request::from_parts(head, body);
        if let Some(mut sender) = self.pool.shared(&target.route) {
            match sender.try_send_request(request).await {
                Ok(response) => return Ok((response, None)),
                Err(mut error) => request = unsent(&mut error).ok_or_else(|| broken(&error))?,
            }
        }
        let mut sender = self.connect2(target).await?;
        self.pool.share(&target.route, sender.clone());
        let response = sender.try_send_request(request).await.map_err(|error| broken(&error))?;
        Ok((response, None))
    }

    async fn stream(&self, target: &Target) -> Result<TokioIo<Box<dyn ByteStream>>, Refusal> {
        Ok(TokioIo::new(self.upstreams.connect(&target.route).await?))
    }

    async fn connect1(&self, target: &Target) -> Result<Sender1, Refusal> {
        let stream = self.stream(target).await?;
        let mut builder = http1::Builder::new();
        builder.max_header_size(ANSWER_HEAD);
        let (sender, connection) =
            builder.handshake(stream).await.map_err(|error| Refusal::BadAnswer(error.to_string()))?;
        tokio::spawn(connection.with_upgrades());
        Ok(sender)
    }

    async fn connect2(&self, target: &Target) -> Result<Sender2, Refusal> {
        let stream = self.stream(target).await?;
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder.initial_stream_window_size(HTTP2_WINDOW).initial_connection_window_size(HTTP2_WINDOW);
        let (sender, connection) =
            builder.handshake(stream).await.map_err(|error| Refusal::BadAnswer(error.to_string()))?;
        tokio::spawn(connection);
        Ok(sender)
    }

    fn switch(
        &self,
        mut response: Response<Incoming>,
        visitor: Option<hyper::upgrade::OnUpgrade>,
        permit: OwnedSemaphorePermit,
    ) -> Result<Response<AnswerBody>, Refusal> {
        let visitor = visitor.ok_or_else(|| Refusal::BadAnswer("it changes the protocol unasked".into()))?;
        let sandbox = hyper::upgrade::on(&mut response);
        let idle = self.settings.tunnel_idle;
        let ending = self.ending.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = tunnel::carry(visitor, sandbox, idle) => {}
                () = ending.cancelled() => {}
            }
            drop(permit);
        });
        let (mut head, _) = response.into_parts();
        headers::to_visitor(&mut head.headers, true);
        Ok(Response::from_parts(head, AnswerBody::from(bytes::Bytes::new())))
    }
}

/// The request, if nothing of it was sent.
fn unsent(error: &mut TrySendError<Request<RequestBody>>) -> Option<Request<RequestBody>> {
    error.take_message()
}

/// The request once more, if the connection ended instead of giving an answer.
fn again_after(
    error: &TrySendError<Request<RequestBody>>,
    again: Option<(request::Parts, RequestBody)>,
) -> Option<Request<RequestBody>> {
    let error = error.error();
    let ended = !error.is_parse() && !error.is_user();
    again.filter(|_| ended).map(|(head, body)| Request::from_parts(head, body))
}

fn broken(error: &TrySendError<Request<RequestBody>>) -> Refusal {
    let error = error.error();
    if error.is_incomplete_message() || error.is_closed() || error.is_canceled() {
        return Refusal::BadAnswer("the connection ended before it".into());
    }
    Refusal::BadAnswer(error.to_string())
}

fn origin_form(uri: &Uri) -> Result<Uri, Refusal> {
    let mut parts = uri::Parts::default();
    parts.path_and_query = uri.path_and_query().cloned().or_else(|| Some(uri::PathAndQuery::from_static("/")));
    Uri::from_parts(parts).map_err(|_| Refusal::BadRequest("has no path"))
}

fn absolute_form(uri: &Uri, authority: &str) -> Result<Uri, Refusal> {
    let mut parts = uri.clone().into_parts();
    parts.scheme = Some(uri::Scheme::HTTP);
    parts.authority = authority.parse().ok();
    parts.path_and_query = parts.path_and_query.or_else(|| Some(uri::PathAndQuery::from_static("/")));
    Uri::from_parts(parts).map_err(|_| Refusal::BadRequest("has no path"))
}
