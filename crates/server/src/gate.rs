//! `heyvm --api`: a listener in the foreground that checks who asks and forwards to the daemon's socket.
//!
//! Without a secret, whoever reaches the listener may do everything. So it listens on loopback alone, and refuses what a
//! web page that a browser shows could send: another origin, or a host name that was made to lead here.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use heyvm_api::{ApiError, ErrorCode, headers};
use heyvm_edge::Edge;
use http::{HeaderMap, HeaderValue, header, uri::Authority};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode};
use subtle::ConstantTimeEq;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;

use crate::{Error, home, pages::Pages, problem::Problem, relay};

#[derive(Clone)]
struct Gate {
    home: Arc<PathBuf>,
    secret: Option<Arc<str>>,
    listen: SocketAddr,
}

/// Listens at `listen` and forwards every request to the daemon of `home`, until SIGTERM or SIGINT. With a secret every
/// call but `/health` needs credentials; without one it listens on loopback alone, unless `allow_remote`.
pub async fn run_api(
    home: PathBuf,
    listen: SocketAddr,
    secret: Option<String>,
    allow_remote: bool,
) -> Result<(), Error> {
    if secret.is_none() && !listen.ip().is_loopback() && !allow_remote {
        return Err(Error::Exposed(format!(
            "listening on {} would let others do everything: set JWT_SECRET in the environment, or say --allow-remote",
            listen.ip()
        )));
    }
    let listener = TcpListener::bind(listen).await.map_err(Error::io(format!("listening on {listen}")))?;
    let listen = listener.local_addr().map_err(Error::io("listening"))?;
    let gate = Gate { home: Arc::new(home), secret: secret.map(Arc::from), listen };
    eprintln!("heyvm: the REST API is at http://{listen} (its description: /docs); Ctrl-C ends it");
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::io("catching signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::io("catching signals"))?;
    let edge = gate.edge();
    // Open streams end with the listener: nobody is to wait for them.
    tokio::select! {
        () = edge.serve(listener, CancellationToken::new()) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

async fn forward(State(gate): State<Gate>, request: Request) -> Response {
    if let Err(problem) = gate.admit(request.headers(), request.uri().path()) {
        return problem.into_response();
    }
    let (head, body) = request.into_parts();
    let (body, broken) = relay::Passing::new(body);
    let answered = gate.pass_on(Request::from_parts(head, body)).await;
    answered.unwrap_or_else(|error| broken.explain(unavailable(error.as_ref())).into_response())
}

fn unavailable(error: &dyn std::error::Error) -> Problem {
    ApiError::new(ErrorCode::DaemonUnavailable, format!("the daemon does not answer: {error}"))
        .hint("heyvm daemon status says whether it runs; any heyvm command starts it")
        .into()
}

impl Gate {
    /// What serves it: a hostile request gets no further there.
    fn edge(self) -> Arc<Edge> {
        let routes = Router::new().fallback(forward).with_state(self);
        Edge::of_site(Arc::new(Pages::on_every_host(routes)), heyvm_edge::Settings::default())
    }

    fn admit(&self, headers: &HeaderMap, path: &str) -> Result<(), Problem> {
        if path == "/health" {
            return Ok(());
        }
        match &self.secret {
            Some(secret) => check_credentials(headers, secret),
            None => self.check_origin(headers),
        }
    }

    fn check_origin(&self, headers: &HeaderMap) -> Result<(), Problem> {
        let refused =
            |message: String| {
                Problem::from(ApiError::new(ErrorCode::Forbidden, message).hint(
                    "a web page may use this API only with credentials: start it with JWT_SECRET in the environment",
                ))
            };
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        if self.listen.ip().is_loopback() && !is_loopback(host) {
            return Err(refused(format!("the host name {host:?} is not this machine's loopback")));
        }
        match headers.get(header::ORIGIN).map(HeaderValue::to_str) {
            None => Ok(()),
            Some(Ok(origin)) if origin.strip_prefix("http://") == Some(host) => Ok(()),
            Some(_) => Err(refused("the request comes from a web page of another origin".into())),
        }
    }

    /// One request, one connection to the daemon: bodies stream both ways, upgrades become tunnels.
    async fn pass_on(
        &self,
        mut request: Request<relay::Passing>,
    ) -> Result<Response, Box<dyn std::error::Error + Send + Sync>> {
        let stream = home::connect(&self.home).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection.with_upgrades());
        // Clients of this listener are all the owner, and nobody else.
        for untrusted in [header::AUTHORIZATION.as_str(), headers::ACCOUNT, headers::SANDBOX_ID] {
            request.headers_mut().remove(untrusted);
        }
        *request.version_mut() = http::Version::HTTP_11;
        let path = request.uri().path_and_query().map_or("/", |path| path.as_str()).to_owned();
        *request.uri_mut() = path.parse()?;
        request.headers_mut().entry(header::HOST).or_insert(HeaderValue::from_static("localhost"));
        let visitor = hyper::upgrade::on(&mut request);
        let mut response = sender.send_request(request).await?;
        relay::upgraded(visitor, &mut response);
        Ok(response.map(Body::new))
    }
}

/// Whether a `Host` header means this machine itself.
fn is_loopback(host: &str) -> bool {
    let Ok(authority) = host.parse::<Authority>() else { return false };
    let name = authority.host().trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// `Authorization: Bearer` with the secret itself, or with a token that it has signed (JWT, HS256) and that has not
/// expired.
fn check_credentials(headers: &HeaderMap, secret: &str) -> Result<(), Problem> {
    let value = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let token = match value.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim(),
        _ => return Err(unauthorized("credentials are missing")),
    };
    if token.as_bytes().ct_eq(secret.as_bytes()).into() || is_signed(token, secret) {
        return Ok(());
    }
    Err(unauthorized("the credentials are not valid, or have expired"))
}

fn is_signed(token: &str, secret: &str) -> bool {
    let mut validation = Validation::new(Algorithm::HS256);
    validation.required_spec_claims.clear();
    validation.validate_aud = false;
    validation.validate_nbf = true;
    let key = DecodingKey::from_secret(secret.as_bytes());
    decode::<serde_json::Value>(token, &key, &validation).is_ok()
}

fn unauthorized(message: &str) -> Problem {
    ApiError::new(ErrorCode::Unauthorized, message)
        .hint("send Authorization: Bearer TOKEN, where TOKEN is JWT_SECRET or a token signed with it")
        .into()
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{EncodingKey, Header, encode};
    use serde_json::json;

    use super::*;

    fn headers(pairs: &[(header::HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect()
    }

    fn gate(listen: &str, secret: Option<&str>) -> Gate {
        Gate { home: Arc::default(), secret: secret.map(Arc::from), listen: listen.parse().unwrap() }
    }

    #[test]
    fn a_web_page_gets_nowhere() {
        let gate = gate("127.0.0.1:3000", None);
        let admitted = |pairs: &[_]| gate.admit(&headers(pairs), "/sandboxes").is_ok();
        assert!(admitted(&[(header::HOST, "localhost:3000")]));
        assert!(admitted(&[(header::HOST, "127.0.0.1:3000")]));
        assert!(admitted(&[(header::HOST, "[::1]:3000")]));
        assert!(admitted(&[(header::HOST, "localhost:3000"), (header::ORIGIN, "http://localhost:3000")]));
        assert!(!admitted(&[(header::HOST, "localhost:3000"), (header::ORIGIN, "http://evil.example")]));
        assert!(!admitted(&[(header::HOST, "localhost:3000"), (header::ORIGIN, "null")]));
        assert!(!admitted(&[(header::HOST, "evil.example:3000")]));
        assert!(!admitted(&[]));
        assert!(gate.admit(&headers(&[(header::HOST, "evil.example")]), "/health").is_ok());
    }

    #[test]
    fn with_a_secret_only_those_who_know_it() {
        let gate = gate("0.0.0.0:3000", Some("s3cret"));
        let admitted = |token: &str| {
            let value = format!("Bearer {token}");
            gate.admit(&headers(&[(header::AUTHORIZATION, value.as_str())]), "/sandboxes").is_ok()
        };
        let token = |claims: serde_json::Value, secret: &str| {
            encode(&Header::new(Algorithm::HS256), &claims, &EncodingKey::from_secret(secret.as_bytes())).unwrap()
        };
        assert!(admitted("s3cret"));
        assert!(admitted(&token(json!({"sub": "a"}), "s3cret")));
        assert!(admitted(&token(json!({"exp": 4_000_000_000_u64}), "s3cret")));
        assert!(!admitted(&token(json!({"exp": 1}), "s3cret")));
        assert!(!admitted(&token(json!({"sub": "a"}), "other")));
        // {"alg":"none"}.{"sub":"a"}.
        assert!(!admitted("eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIn0."));
        assert!(!admitted("") && !admitted("s3cre") && !admitted("s3cret2"));
        assert!(gate.admit(&HeaderMap::new(), "/sandboxes").is_err());
    }

    #[tokio::test]
    async fn hostile_requests_get_nowhere() {
        let daemon = crate::trials::Daemon::start().await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let gate = Gate { home: Arc::new(daemon.home.path().to_owned()), ..gate("127.0.0.1:0", None) };
        tokio::spawn(async move { gate.edge().serve(listener, CancellationToken::new()).await });
        crate::trials::hostile::is_stood(address, "/sandboxes").await;
    }

    #[tokio::test]
    async fn it_does_not_listen_for_others_without_a_secret() {
        let ended = run_api(PathBuf::from("/nonexistent"), "0.0.0.0:0".parse().unwrap(), None, false).await;
        assert!(ended.unwrap_err().to_string().contains("--allow-remote"));
    }
}
