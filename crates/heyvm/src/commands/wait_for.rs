//! `wait-for`: a port inside, or a URL from here.

use std::{
    net::Ipv4Addr,
    sync::Arc,
    time::{Duration, Instant},
};

use heyvm_api::{ApiError, ErrorCode, names};
use rustls::{ClientConfig, pki_types::ServerName};
use rustls_platform_verifier::BuilderVerifierExt;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use url::{Host, Url};

use super::{Context, Outcome, bind::parse_port, encoded, path};
use crate::output;

/// `wait-for`.
#[derive(Debug, clap::Args)]
pub struct WaitForArgs {
    /// Id, name or slug
    #[arg(required_unless_present = "url", conflicts_with = "url")]
    pub sandbox: Option<String>,
    /// Port in the sandbox
    #[arg(required_unless_present = "url", allow_negative_numbers = true)]
    pub port: Option<String>,
    /// Path that must answer 2xx or 3xx
    #[arg(long, conflicts_with = "url")]
    pub path: Option<String>,
    /// URL that must answer 2xx or 3xx, from here
    #[arg(long)]
    pub url: Option<String>,
    /// How long to wait
    #[arg(long, default_value = "60s")]
    pub timeout: String,
}

const PAUSE: Duration = Duration::from_millis(100);
/// One try takes no longer.
const TRY_DEADLINE: Duration = Duration::from_secs(10);

/// Exit status 1 and `"ready": false` at the deadline.
pub async fn wait_for(context: &Context, args: WaitForArgs) -> Outcome {
    let timeout = names::parse_duration("--timeout", &args.timeout)?;
    let (answer, ready) = match (args.url, args.sandbox, args.port) {
        (Some(url), ..) => {
            let waited = url_answers(&parse(&url)?, timeout).await;
            if let Err(reason) = &waited {
                output::note(&format!("{url}: {reason}"));
            }
            (json!({"ready": waited.is_ok(), "url": url}), waited.is_ok())
        }
        (None, Some(who), Some(port)) => inside(context, &who, &port, args.path.as_deref(), timeout).await?,
        _ => {
            return Err(ApiError::new(ErrorCode::InvalidArgument, "a sandbox and a port, or --url")
                .hint("heyvm wait-for --help"));
        }
    };
    output::answer(context.format, &answer, || if ready { "ready".into() } else { "not ready".into() });
    Ok(i32::from(!ready))
}

async fn inside(
    context: &Context,
    who: &str,
    port: &str,
    http_path: Option<&str>,
    timeout: Duration,
) -> Result<(Value, bool), ApiError> {
    let port = parse_port(port)?;
    let http_path = http_path.map(|path| format!("&path={}", encoded(path))).unwrap_or_default();
    let query = format!("/wait?port={port}&timeout_seconds={}{http_path}", timeout.as_secs_f64());
    let answer: Value = context.client().await?.get(&path(who, &query)).await?;
    let ready = answer["ready"].as_bool().unwrap_or(false);
    Ok((json!({"ready": ready, "port": port}), ready))
}

fn parse(text: &str) -> Result<Url, ApiError> {
    let url = Url::parse(text).map_err(|error| {
        ApiError::new(ErrorCode::InvalidArgument, format!("--url {text:?}: {error}"))
            .hint("for example http://abc123.localhost:8480/health")
    })?;
    match url.scheme() {
        "http" | "https" if url.host_str().is_some() => Ok(url),
        scheme => Err(ApiError::new(ErrorCode::InvalidArgument, format!("--url speaks http and https, not {scheme}"))
            .hint("for example http://abc123.localhost:8480/health")),
    }
}

/// Tries until the deadline; else tells why it is not ready.
async fn url_answers(url: &Url, timeout: Duration) -> Result<(), String> {
    let deadline = Instant::now() + timeout;
    let mut reason = String::from("it does not answer in time");
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).min(TRY_DEADLINE);
        match tokio::time::timeout(left, status(url)).await {
            Ok(Ok(200..400)) => return Ok(()),
            Ok(Ok(status)) => reason = format!("it answers {status}"),
            Ok(Err(error)) => reason = told(&error),
            // The last try is cut short: what was found before it says more.
            Err(_) => {}
        }
        if Instant::now() + PAUSE >= deadline {
            return Err(reason);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// What failed, for a person; of a certificate also what helps.
fn told(error: &std::io::Error) -> String {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(why)) => {
            format!("its certificate is not trusted here ({why}); SSL_CERT_FILE names those that are")
        }
        _ => error.to_string(),
    }
}

async fn status(url: &Url) -> std::io::Result<u16> {
    let port = url.port_or_known_default().unwrap_or(80);
    let stream = match url.host() {
        // Not every resolver knows that names below localhost are this machine.
        Some(Host::Domain(name)) if name == "localhost" || name.ends_with(".localhost") => {
            TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?
        }
        Some(Host::Domain(name)) => TcpStream::connect((name, port)).await?,
        Some(Host::Ipv4(address)) => TcpStream::connect((address, port)).await?,
        Some(Host::Ipv6(address)) => TcpStream::connect((address, port)).await?,
        None => return Err(std::io::Error::other("the URL names no host")),
    };
    match url.scheme() {
        "https" => ask(url, tls(url, stream).await?).await,
        _ => ask(url, stream).await,
    }
}

/// What the system trusts is trusted here; `SSL_CERT_FILE` names other certificates.
async fn tls(url: &Url, stream: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
    let host = url.host_str().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_owned();
    let name = ServerName::try_from(host).map_err(std::io::Error::other)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_platform_verifier())
        .map_err(std::io::Error::other)?;
    TlsConnector::from(Arc::new(config.with_no_client_auth())).connect(name, stream).await
}

async fn ask(url: &Url, mut stream: impl AsyncRead + AsyncWrite + Unpin) -> std::io::Result<u16> {
    let target = &url[url::Position::BeforePath..url::Position::AfterQuery];
    let host = &url[url::Position::BeforeHost..url::Position::AfterPort];
    let request = format!("GET {target} HTTP/1.1\r\nHost: {host}\r\nAccept: */*\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut line = String::new();
    BufReader::new(stream.take(1024)).read_line(&mut line).await?;
    let status = line.split_ascii_whitespace().nth(1).and_then(|word| word.parse().ok());
    status.ok_or_else(|| std::io::Error::other("the answer is not HTTP"))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    async fn waited(address: std::net::SocketAddr) -> Result<(), String> {
        url_answers(&parse(&format!("http://{address}/health")).unwrap(), Duration::from_millis(300)).await
    }

    #[tokio::test]
    async fn what_is_not_ready_says_why() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                stream.write_all(b"HTTP/1.1 503 Service Unavailable\r\n\r\n").await.unwrap();
                // Whatever is asked is read, so that closing does not reset the connection.
                stream.shutdown().await.unwrap();
                tokio::io::copy(&mut stream, &mut tokio::io::sink()).await.unwrap();
            }
        });
        assert_eq!(waited(address).await.unwrap_err(), "it answers 503");
        serving.abort();
        assert!(serving.await.unwrap_err().is_cancelled());
        let refused = waited(address).await.unwrap_err();
        assert!(refused.contains("refused"), "{refused}");
    }

    #[tokio::test]
    async fn what_never_answers_says_so() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let reason = waited(listener.local_addr().unwrap()).await.unwrap_err();
        assert_eq!(reason, "it does not answer in time");
    }

    #[test]
    fn a_certificate_that_is_not_trusted_is_told_as_such() {
        let why = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let reason = told(&std::io::Error::new(std::io::ErrorKind::InvalidData, why));
        assert!(reason.contains("UnknownIssuer") && reason.contains("SSL_CERT_FILE"), "{reason}");
    }
}
