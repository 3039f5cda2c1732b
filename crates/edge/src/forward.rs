//! One request on its way to a sandbox, and the answer on its way back.

use std::{
    convert::Infallible,
    pin::pin,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use http::{
    HeaderValue, Method, Request, Response, StatusCode, Uri, Version,
    header::{CONNECTION, EXPECT},
    request, uri,
};
use hyper::{
    body::Incoming,
    client::conn::{TrySendError, http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};

use crate::{
    Edge, LocalPort, Route, Visitor,
    body::{AnswerBody, Gate, Progress, RequestBody, Stalled},
    client_io::Interim,
    connection::Stream,
    headers, host,
    limits::Room,
    pool::{Connection1, Lease, Sender2, Watched},
    refusal::{Form, Refusal},
    serve::Peer,
    site, tunnel, websocket,
};

/// Largest head of a sandbox's answer, in bytes.
const ANSWER_HEAD: usize = 64 << 10;
/// Header lines of a sandbox's answer, and of an interim one.
const ANSWER_HEADERS: usize = 500;
/// Bytes of an answer that wait for its client. All requests of a route share a connection, whose window holds many.
const HTTP2_WINDOW: u32 = 256 << 10;
const HTTP2_CONNECTION_WINDOW: u32 = 1 << 30;
/// An app that knows no `Expect` is waited for this long.
const EXPECT_PATIENCE: Duration = Duration::from_secs(1);

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
        peer: &Peer,
    ) -> Result<Response<AnswerBody>, Infallible> {
        let form = Form::of(request.headers(), self.unasked);
        let visitor = peer.visitor.behind(&self.settings.trusted_proxies, request.headers());
        let is_framing_known = headers::is_framing_known(request.headers());
        let ends_connection = !is_framing_known && request.version() < Version::HTTP_2;
        let answered = match host::authority(&request) {
            _ if !is_framing_known => Err(Refusal::BadRequest("has another transfer coding than chunked")),
            Ok(authority) => match self.site.as_ref().filter(|site| site.has(host::name(&authority))) {
                Some(site) => site::answer(site.as_ref(), request, &authority, visitor).await,
                None if peer.for_site_alone => Err(Refusal::Full),
                None => self.forward(request, authority, visitor, peer).await,
            },
            Err(refusal) => Err(refusal),
        };
        let mut response = answered.unwrap_or_else(|refusal| {
            tracing::debug!(code = refusal.code(), "refused");
            refusal.response(form)
        });
        if ends_connection || (peer.for_site_alone && response.status() == StatusCode::SERVICE_UNAVAILABLE) {
            // No one can say where a request of unknown framing ends: what follows it is not taken for another.
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        Ok(response)
    }

    async fn forward(
        self: &Arc<Self>,
        mut request: Request<Incoming>,
        authority: String,
        visitor: Visitor,
        peer: &Peer,
    ) -> Result<Response<AnswerBody>, Refusal> {
        if let Some(local) = &peer.local
            && let Some(instead) = local.instead(&request, &authority)?
        {
            return Ok(instead);
        }
        let connects = is_websocket_connect(&request)?;
        let target = self.target(authority, peer.local.as_deref()).await?;
        let version = request.version();
        let wanted = headers::upgrade(request.headers()).filter(|_| version == Version::HTTP_11);
        let visitor_upgrade = (wanted.is_some() || connects).then(|| hyper::upgrade::on(&mut request));
        let is_grpc = version == Version::HTTP_2 && headers::is_grpc(request.headers());

        let (mut head, body) = request.into_parts();
        let stream = head.extensions.remove::<Stream>();
        head.extensions = http::Extensions::new();
        self.admit(&target.route.access, &mut head, &format!("{}://{}", visitor.scheme(), target.authority)).await?;
        let room = self.limits.enter(&target.route.sandbox, visitor.address).ok_or(Refusal::Busy)?;
        let wanted = if connects { Some(websocket::to_upgrade(&mut head)) } else { wanted };
        headers::to_sandbox(&mut head, visitor, &target.authority, wanted);
        // What follows an extended CONNECT is the tunnel's.
        let (body, progress) = if connects { RequestBody::none() } else { RequestBody::new(body) };
        let gate = headers::expects_continue(&head.headers).then(Arc::<Gate>::default);
        let interim = (version == Version::HTTP_11).then(|| Arc::clone(&peer.interim));
        let exchange = async {
            if is_grpc {
                head.headers.remove(EXPECT);
                return self.exchange2(&target, head, body).await;
            }
            let interim = Interims { gate: gate.clone(), to: interim };
            self.exchange1(&target, head, body.behind(gate.clone()), interim).await
        };
        let exchange = opening(gate.as_deref(), exchange);
        let exchanged = self.in_time(&target.route, &progress, exchange).await;
        // A visitor's broken body breaks the connection to the sandbox, which is not the sandbox's fault.
        let (response, lease) = exchanged
            .map_err(|refusal| if progress.is_broken() { Refusal::BadRequest("has a broken body") } else { refusal })?;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return self.switch(response, visitor_upgrade, (room, stream), &target.authority, connects);
        }
        if connects && response.status().is_success() {
            return Err(Refusal::BadAnswer("it does not speak WebSocket here".into()));
        }
        let (mut head, body) = response.into_parts();
        headers::to_visitor(&mut head.headers, &target.authority, false);
        head.version = Version::HTTP_11;
        let body = AnswerBody::from_sandbox(body, lease, room);
        // By HTTP/1.1 the connection itself ends when nothing is taken from it.
        let body = if version == Version::HTTP_2 { body.stallable(&self.answers) } else { body };
        Ok(Response::from_parts(head, body))
    }

    async fn target(&self, authority: String, local: Option<&LocalPort>) -> Result<Target, Refusal> {
        let subdomain = match local {
            Some(local) => &local.subdomain,
            None => host::subdomain(&authority, &self.settings.base_domain)
                .ok_or(Refusal::NoConnection(crate::ConnectError::UnknownSubdomain))?,
        };
        let route = self.upstreams.route(subdomain).await?;
        Ok(Target { route, authority })
    }

    async fn in_time<T>(
        &self,
        route: &Route,
        progress: &Progress,
        exchange: impl Future<Output = Result<T, Refusal>>,
    ) -> Result<T, Refusal> {
        let response_timeout = route.response_timeout.unwrap_or(self.settings.response_timeout);
        tokio::select! {
            done = exchange => done,
            stalled = progress.stalled(response_timeout, self.settings.body_timeout) => Err(match stalled {
                Stalled::Sandbox => Refusal::TimedOut,
                Stalled::Visitor => Refusal::SlowVisitor,
            }),
        }
    }

    /// HTTP/1.1, over an idle connection where there is one and the request could be sent again: the app may be ending
    /// that connection at this very moment.
    async fn exchange1(
        &self,
        target: &Target,
        mut head: request::Parts,
        body: RequestBody,
        interim: Interims,
    ) -> Result<(Response<Incoming>, Option<Lease>), Refusal> {
        head.version = Version::HTTP_11;
        head.uri = origin_form(&head.uri)?;
        if let Some(again) = body.again()
            && let Some(mut connection) = self.pool.take(&target.route)
        {
            let request = interim.watch(Request::from_parts(head.clone(), body));
            match connection.sender.try_send_request(request).await {
                Ok(response) => return Ok(self.lent(response, connection, target)),
                Err(error) if !connection.has_answered() && has_ended(&error) => {
                    return self.exchange_fresh(target, Request::from_parts(head, again), &interim).await;
                }
                Err(error) => return Err(broken(&error)),
            }
        }
        self.exchange_fresh(target, Request::from_parts(head, body), &interim).await
    }

    async fn exchange_fresh(
        &self,
        target: &Target,
        request: Request<RequestBody>,
        interim: &Interims,
    ) -> Result<(Response<Incoming>, Option<Lease>), Refusal> {
        let mut connection = self.connect1(target).await?;
        let sent = connection.sender.try_send_request(interim.watch(request)).await;
        Ok(self.lent(sent.map_err(|error| broken(&error))?, connection, target))
    }

    fn lent(
        &self,
        response: Response<Incoming>,
        connection: Connection1,
        target: &Target,
    ) -> (Response<Incoming>, Option<Lease>) {
        let lease = self.pool.lend(connection, &target.route, response.headers());
        (response, Some(lease))
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

    async fn connect1(&self, target: &Target) -> Result<Connection1, Refusal> {
        let answered = Arc::new(AtomicBool::new(false));
        let inner = self.upstreams.connect(&target.route).await?;
        let stream = TokioIo::new(Watched { inner, answered: Arc::clone(&answered) });
        let mut builder = http1::Builder::new();
        builder.max_header_size(ANSWER_HEAD).max_headers(ANSWER_HEADERS);
        let (sender, connection) =
            builder.handshake(stream).await.map_err(|error| Refusal::BadAnswer(error.to_string()))?;
        tokio::spawn(connection.with_upgrades());
        Ok(Connection1::new(sender, answered))
    }

    async fn connect2(&self, target: &Target) -> Result<Sender2, Refusal> {
        let stream = TokioIo::new(self.upstreams.connect(&target.route).await?);
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder.initial_stream_window_size(HTTP2_WINDOW).initial_connection_window_size(HTTP2_CONNECTION_WINDOW);
        let (sender, connection) =
            builder.handshake(stream).await.map_err(|error| Refusal::BadAnswer(error.to_string()))?;
        tokio::spawn(connection);
        Ok(sender)
    }

    fn switch(
        &self,
        mut response: Response<Incoming>,
        visitor: Option<hyper::upgrade::OnUpgrade>,
        held: (Room, Option<Stream>),
        authority: &str,
        connects: bool,
    ) -> Result<Response<AnswerBody>, Refusal> {
        let visitor = visitor.ok_or_else(|| Refusal::BadAnswer("it changes the protocol unasked".into()))?;
        let sandbox = hyper::upgrade::on(&mut response);
        let idle = self.settings.tunnel_idle;
        let ending = self.ending.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = tunnel::carry_upgraded(visitor, sandbox, idle) => {}
                () = ending.cancelled() => {}
            }
            drop(held);
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

/// Whether the connection ended instead of giving an answer.
fn has_ended(error: &TrySendError<Request<RequestBody>>) -> bool {
    !error.error().is_parse() && !error.error().is_user()
}

/// What becomes of an app's interim answers.
struct Interims {
    /// Opened by 100.
    gate: Option<Arc<Gate>>,
    /// Gets the others.
    to: Option<Arc<Interim>>,
}

impl Interims {
    fn watch(&self, mut request: Request<RequestBody>) -> Request<RequestBody> {
        let (gate, to) = (self.gate.clone(), self.to.clone());
        hyper::ext::on_informational(&mut request, move |answer| match (answer.status(), &gate, &to) {
            (StatusCode::CONTINUE, Some(gate), _) => gate.open(),
            (StatusCode::EARLY_HINTS, _, Some(to)) => to.send(&headers::early_hints(answer.headers())),
            _ => {}
        });
        request
    }
}

/// Opens the gate when the app does not say anything.
async fn opening<T>(gate: Option<&Gate>, exchange: impl Future<Output = T>) -> T {
    let Some(gate) = gate else { return exchange.await };
    let mut exchange = pin!(exchange);
    match tokio::time::timeout(EXPECT_PATIENCE, &mut exchange).await {
        Ok(done) => done,
        Err(_) => {
            gate.open();
            exchange.await
        }
    }
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
