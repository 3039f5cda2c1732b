//! `heyvm --api`: a listener in the foreground that checks who asks and forwards to the daemon's socket.
//!
//! Without `JWT_SECRET` any local user reaches the listener. So it listens on loopback alone, refuses what a web page that
//! a browser shows could send (another origin, or a host name that was made to lead here), and marks requests without the
//! token of its start as restricted: they reach sandboxes, never the host (see [`crate::routes::restricted`]).

use std::{
    fs,
    io::{self, Write},
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

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

use crate::{Error, home, listening::Announcement, pages::Pages, problem::Problem, relay};

/// Bytes of a secret that no one guesses.
const LONG_ENOUGH: usize = 32;

#[derive(Clone)]
struct Gate {
    home: Arc<PathBuf>,
    credentials: Credentials,
    listen: SocketAddr,
}

/// What proves that a client is the owner.
#[derive(Clone)]
enum Credentials {
    /// `JWT_SECRET`, or a token signed with it: every call but `/health` needs it.
    Secret(Arc<str>),
    /// The token of this start: calls without it are restricted.
    Token(Arc<str>),
}

/// How far a client is trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trust {
    /// As the owner.
    Owner,
    /// As any local user.
    Restricted,
}

/// The file that holds the token of one listener, for as long as it listens.
struct TokenFile(PathBuf);

impl TokenFile {
    /// Writes `token` to a new file that its owner alone may read.
    #[expect(clippy::disallowed_methods, reason = "runs at the start, before anybody is served")]
    fn create(home: &Path, port: u16, token: &str) -> io::Result<Self> {
        let path = home.join(format!("run/api-{port}.token"));
        // Left behind by a listener that was killed: this process holds the port now.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = fs::File::options().write(true).create_new(true).mode(0o600).open(&path)?;
        writeln!(file, "{token}")?;
        Ok(Self(path))
    }
}

impl Drop for TokenFile {
    #[expect(clippy::disallowed_methods, reason = "runs at the end, when nobody is served any more")]
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::debug!(%error, "could not remove the token file");
        }
    }
}

fn new_token() -> String {
    hex::encode(rand::random::<[u8; 32]>())
}

/// Listens at `listen` and forwards every request to the daemon of `home`, until SIGTERM or SIGINT. With a secret every
/// call but `/health` needs credentials; without one it listens on loopback alone, unless `allow_remote`, and a token made
/// at the start stands for the owner.
pub async fn run_api(
    home: PathBuf,
    listen: SocketAddr,
    secret: Option<String>,
    allow_remote: bool,
) -> Result<(), Error> {
    if secret.is_none() && !listen.ip().is_loopback() && !allow_remote {
        return Err(Error::Exposed(format!(
            "listening on {} would let others use every sandbox: set JWT_SECRET in the environment, or say --allow-remote",
            listen.ip()
        )));
    }
    let listener = TcpListener::bind(listen).await.map_err(Error::io(format!("listening on {listen}")))?;
    let listen = listener.local_addr().map_err(Error::io("listening"))?;
    let _announcement = Announcement::of_api(&home, listen);
    eprintln!("heyvm: the REST API is at http://{listen} (its description: /docs); Ctrl-C ends it");
    let (credentials, _token_file) = match secret {
        Some(secret) => {
            if secret.len() < LONG_ENOUGH {
                eprintln!(
                    "heyvm: WARNING: JWT_SECRET has {} bytes and can be guessed; use {LONG_ENOUGH} or more (openssl rand -hex 32)",
                    secret.len()
                );
            }
            (Credentials::Secret(secret.into()), None)
        }
        None => {
            let token = new_token();
            let file = TokenFile::create(&home, listen.port(), &token).map_err(Error::io("writing the API's token"))?;
            eprintln!(
                "heyvm: calls that touch this host (mounts, images, kernels) need Authorization: Bearer {token} (kept in {})",
                file.0.display()
            );
            (Credentials::Token(token.into()), Some(file))
        }
    };
    let gate = Gate { home: Arc::new(home), credentials, listen };
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
    let trust = match gate.admit(request.headers(), request.uri().path()) {
        Ok(trust) => trust,
        Err(problem) => return problem.into_response(),
    };
    let (head, body) = request.into_parts();
    let (body, broken) = relay::Passing::new(body);
    let answered = gate.pass_on(Request::from_parts(head, body), trust).await;
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

    fn admit(&self, headers: &HeaderMap, path: &str) -> Result<Trust, Problem> {
        if path == "/health" {
            return Ok(Trust::Restricted);
        }
        match &self.credentials {
            Credentials::Secret(secret) => check_credentials(headers, secret).map(|()| Trust::Owner),
            Credentials::Token(token) if bearer(headers).is_some_and(|shown| same(shown, token)) => Ok(Trust::Owner),
            // Some clients send credentials that mean nothing here: they are as good as none.
            Credentials::Token(_) => self.check_origin(headers).map(|()| Trust::Restricted),
        }
    }

    fn check_origin(&self, headers: &HeaderMap) -> Result<(), Problem> {
        let refused =
            |message: String| {
                Problem::from(ApiError::new(ErrorCode::Forbidden, message).hint(
                    "a web page may use this API only with credentials: send the token that `heyvm --api` printed",
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
        trust: Trust,
    ) -> Result<Response, Box<dyn std::error::Error + Send + Sync>> {
        let stream = home::connect(&self.home).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection.with_upgrades());
        // Clients of this listener act for the owner alone, and do not say themselves how far they are trusted.
        for untrusted in [header::AUTHORIZATION.as_str(), headers::ACCOUNT, headers::SANDBOX_ID, headers::RESTRICTED] {
            request.headers_mut().remove(untrusted);
        }
        if trust == Trust::Restricted {
            request.headers_mut().insert(headers::RESTRICTED, HeaderValue::from_static("1"));
        }
        *request.version_mut() = http::Version::HTTP_11;
        let path = request.uri().path_and_query().map_or("/", |path| path.as_str()).to_owned();
        *request.uri_mut() = path.parse()?;
        request.headers_mut().entry(header::HOST).or_insert(HeaderValue::from_static("localhost"));
        let visitor = hyper::upgrade::on(&mut request);
        let mut response = sender.send_request(request).await?;
        relay::upgraded(visitor, &mut response, std::future::pending());
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
    let token = bearer(headers).ok_or_else(|| unauthorized("credentials are missing"))?;
    if same(token, secret) || is_signed(token, secret) {
        return Ok(());
    }
    Err(unauthorized("the credentials are not valid, or have expired"))
}

/// The token of `Authorization: Bearer`.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

/// Compares in a time that says nothing of the secret.
fn same(shown: &str, secret: &str) -> bool {
    shown.as_bytes().ct_eq(secret.as_bytes()).into()
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

    const TOKEN: &str = "the token of this start";

    fn gate(listen: &str, secret: Option<&str>) -> Gate {
        let credentials = match secret {
            Some(secret) => Credentials::Secret(secret.into()),
            None => Credentials::Token(TOKEN.into()),
        };
        Gate { home: Arc::default(), credentials, listen: listen.parse().unwrap() }
    }

    /// A gate before a daemon without VMs, and its address.
    async fn serve(daemon: &crate::trials::Daemon) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let gate = Gate { home: Arc::new(daemon.home.path().to_owned()), ..gate("127.0.0.1:0", None) };
        tokio::spawn(async move { gate.edge().serve(listener, CancellationToken::new()).await });
        address
    }

    async fn call(address: SocketAddr, call: &str, body: &serde_json::Value, token: Option<&str>) -> (u16, String) {
        let (method, path) = call.split_once(' ').unwrap();
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let request = http::Request::builder().method(method).uri(path).header(header::HOST, address.to_string());
        let mut request = request.header(header::CONTENT_TYPE, "application/json");
        // A client's own word on how far it is trusted counts for nothing.
        request = request.header(headers::ACCOUNT, "*");
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let response = sender.send_request(request.body(Body::from(body)).unwrap()).await.unwrap();
        let status = response.status().as_u16();
        let body = axum::body::to_bytes(Body::new(response.into_body()), 1 << 20).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn without_the_token_no_call_reaches_the_host() {
        let daemon = crate::trials::Daemon::start().await;
        let address = serve(&daemon).await;
        let secret = tempfile::tempdir().unwrap();
        let mount = json!({"host_path": secret.path(), "sandbox_path": "/m"});
        let of_the_host = [
            ("POST /sandboxes", json!({"name": "lpe", "size_class": "micro", "mounts": [mount]})),
            ("POST /sandboxes/lpe/mounts", mount.clone()),
            ("POST /images/import", json!({"path": "/etc/shadow", "name": "x:1"})),
            ("POST /images/prepare", json!(null)),
            ("DELETE /images/ubuntu:24.04", json!(null)),
            ("POST /kernels/import", json!({"path": "/root"})),
        ];
        for (what, body) in &of_the_host {
            for token in [None, Some("another"), Some("")] {
                let (status, answer) = call(address, what, body, token).await;
                assert_eq!(status, 403, "{what}: {answer}");
                assert!(answer.contains("Bearer"), "{what}: {answer}");
            }
            let (status, answer) = call(address, what, body, Some(TOKEN)).await;
            assert_ne!(status, 403, "{what}: {answer}");
        }
        let (status, _) = call(address, "GET /sandboxes", &json!(null), None).await;
        assert_eq!(status, 200);
        let (status, answer) = call(address, "GET /sandboxes/nobody", &json!(null), None).await;
        assert_eq!(status, 404, "{answer}");
    }

    #[test]
    fn the_token_is_its_owners_alone_and_goes_with_the_listener() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let home = tempfile::tempdir().unwrap();
        fs::create_dir(home.path().join("run")).unwrap();
        let victim = home.path().join("victim");
        fs::write(&victim, "kept").unwrap();
        symlink(&victim, home.path().join("run/api-3000.token")).unwrap();
        let file = TokenFile::create(home.path(), 3000, TOKEN).unwrap();
        assert_eq!(fs::metadata(&file.0).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_to_string(&file.0).unwrap().trim(), TOKEN);
        assert_eq!(fs::read_to_string(&victim).unwrap(), "kept");
        drop(file);
        assert!(!home.path().join("run/api-3000.token").exists());
        assert_ne!(new_token(), new_token());
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
        crate::trials::hostile::is_stood(serve(&daemon).await, "/sandboxes").await;
    }

    #[tokio::test]
    async fn it_does_not_listen_for_others_without_a_secret() {
        let ended = run_api(PathBuf::from("/nonexistent"), "0.0.0.0:0".parse().unwrap(), None, false).await;
        assert!(ended.unwrap_err().to_string().contains("--allow-remote"));
    }
}
