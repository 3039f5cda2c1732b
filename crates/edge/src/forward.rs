//! One request on its way to a sandbox, and the answer on its way back.

use std::{convert::Infallible, sync::Arc};

use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header::CONNECTION, request, uri};
use hyper::{
    body::Incoming,
    client::conn::{TrySendError, http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::sync::OwnedSemaphorePermit;

use crate::{
    ByteStream, Edge, Route, Visitor,
    body::{AnswerBody, Progress, RequestBody, Stalled},
    headers, host,
    pool::{Lease, Sender1, Sender2},
    refusal::{Form, Refusal},
    site, tunnel, websocket,
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
    /// Answers one request, whatever comes of it. `peer` is the other end of the connection.
    pub(crate) async fn answer(
        self: &Arc<Self>,
        request: Request<Incoming>,
        peer: Visitor,
    ) -> Result<Response<AnswerBody>, Infallible> {
        let form = Form::of(request.headers(), self.unasked);
        let visitor = peer.behind(&self.settings.trusted_proxies, request.headers());
        let is_framing_known = headers::is_framing_known(request.headers());
        let ends_connection = !is_framing_known && request.version() < Version::HTTP_2;
        let answered = match host::authority(&request) {
            _ if !is_framing_known => Err(Refusal::BadRequest("has another transfer coding than chunked")),
            Ok(authority) => match self.site.as_ref().filter(|site| site.has(host::name(&authority))) {
                Some(site) => site::answer(site.as_ref(), request, &authority, visitor).await,
                None => self.forward(request, authority, visitor).await,
            },
            Err(refusal) => Err(refusal),
        };
        let mut response = answered.unwrap_or_else(|refusal| {
            tracing::debug!(code = refusal.code(), "refused");
            refusal.response(form)
        });
        if ends_connection {
            // Nobody can tell where such a request ends: what follows it is not taken for another.
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        Ok(response)
    }

    async fn forward(
        self: &Arc<Self>,
        mut request: Request<Incoming>,
        authority: String,
        visitor: Visitor,
    ) -> Result<Response<AnswerBody>, Refusal> {
        let connects = is_websocket_connect(&request)?;
        let target = self.target(authority).await?;
        let wanted = headers::upgrade(request.headers()).filter(|_| request.version() == Version::HTTP_11);
        let visitor_upgrade = (wanted.is_some() || connects).then(|| hyper::upgrade::on(&mut request));
        let is_grpc = request.version() == Version::HTTP_2 && headers::is_grpc(request.headers());

        let (mut head, body) = request.into_parts();
        head.extensions = http::Extensions::new();
        self.admit(&target.route.access, &mut head, &format!("{}://{}", visitor.scheme(), target.authority)).await?;
        let permit = self.limits.enter(&target.route.sandbox).ok_or(Refusal::Busy)?;
        let wanted = if connects { Some(websocket::to_upgrade(&mut head)) } else { wanted };
        headers::to_sandbox(&mut head, visitor, &target.authority, wanted);
        // What follows an extended CONNECT is the tunnel's.
        let (body, progress) = if connects { RequestBody::none() } else { RequestBody::new(body) };
        let exchange = async {
            if is_grpc { self.exchange2(&target, head, body).await } else { self.exchange1(&target, head, body).await }
        };
        let exchanged = self.in_time(&progress, exchange).await;
        // A visitor's broken body breaks the connection to the sandbox, which is not the sandbox's fault.
        let (response, lease) = exchanged
            .map_err(|refusal| if progress.is_broken() { Refusal::BadRequest("has a broken body") } else { refusal })?;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return self.switch(response, visitor_upgrade, permit, &target.authority, connects);
        }
        if connects && response.status().is_success() {
            return Err(Refusal::BadAnswer("it does not speak WebSocket here".into()));
        }
        let (mut head, body) = response.into_parts();
        headers::to_visitor(&mut head.headers, &target.authority, false);
        head.version = Version::HTTP_11;
        Ok(Response::from_parts(head, AnswerBody::from_sandbox(body, lease, permit)))
    }

    async fn target(&self, authority: String) -> Result<Target, Refusal> {
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
            stalled = progress.stalled(self.settings.response_timeout, self.settings.body_timeout) => Err(match stalled {
                Stalled::Sandbox => Refusal::TimedOut,
                Stalled::Visitor => Refusal::SlowVisitor,
            }),
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
        authority: &str,
        connects: bool,
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
        headers::to_visitor(&mut head.headers, authority, true);
        if connects {
            head.status = StatusCode::OK;
            head.version = Version::HTTP_2;
            websocket::to_connected(&mut head.headers);
        }
        Ok(Response::from_parts(head, AnswerBody::from(bytes::Bytes::new())))
    }
}

/// Whether this is WebSocket over HTTP/2. Every other CONNECT wants a tunnel to elsewhere.
fn is_websocket_connect<B>(request: &Request<B>) -> Result<bool, Refusal> {
    match websocket::asked(request) {
        Some(protocol) if protocol.eq_ignore_ascii_case("websocket") => Ok(true),
        Some(_) => Err(Refusal::BadRequest("wants another protocol than WebSocket")),
        None if request.method() == Method::CONNECT => Err(Refusal::BadRequest("wants a tunnel to elsewhere")),
        None => Ok(false),
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
