//! TLS: a certificate that is given or got from an authority (ACME, RFC 8555), and exchanged while connections go on.
//!
//! - [`Tls`]: handshakes (TLS 1.2 and 1.3, HTTP/2 and HTTP/1.1) and the care of the certificate.
//! - `certificate`: reading, checking and serving one.  `files`: one that others renew.  `acme`: one that we renew.
//! - `challenges`: proofs by HTTP.  `hook`: proofs by DNS, through the operator's program.
//!
//! One certificate is served to all, whatever name they ask for: which sandbox answers is decided by `Host` alone.

mod acme;
mod certificate;
mod challenges;
mod files;
mod hook;

use std::{io, path::PathBuf, sync::Arc, time::SystemTime};

use rustls::{ServerConfig, crypto::ring, version};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::sync::CancellationToken;

pub use acme::{AcmeSettings, LETS_ENCRYPT};
pub(crate) use challenges::Challenges;

/// Where the certificate comes from.
#[derive(Debug, Clone, Default)]
pub enum TlsSettings {
    /// None: plain HTTP.
    #[default]
    Off,
    /// Files that others renew. They are read again when they change.
    Certificate {
        /// The certificate and those between it and its root, in PEM.
        chain: PathBuf,
        /// Its private key, in PEM.
        key: PathBuf,
    },
    /// An authority that speaks ACME.
    Acme(AcmeSettings),
}

/// Why there is no certificate, or no new one.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file holds no certificate or key.
    #[error("{path} holds no {what} in PEM")]
    Pem {
        /// The file.
        path: PathBuf,
        /// What is missing.
        what: &'static str,
    },
    /// The certificate cannot be used; it may not fit its key.
    #[error("{path}: the certificate cannot be used: {source}")]
    Certificate {
        /// The certificate's file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// The settings contradict each other.
    #[error("{0}")]
    Settings(&'static str),
    /// TLS itself could not be set up.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The authority refused, or did not answer.
    #[error("the certificate authority: {0}")]
    Authority(#[from] instant_acme::Error),
    /// The authority does not believe that a name is ours.
    #[error("the certificate authority did not accept the proof for {name}: {why}")]
    Proof {
        /// The name.
        name: String,
        /// What the authority said.
        why: String,
    },
    /// The operator's program failed.
    #[error("{program} {verb} {name} failed: {why}", program = program.display())]
    Hook {
        /// The program.
        program: PathBuf,
        /// `add` or `remove`.
        verb: &'static str,
        /// The DNS name.
        name: String,
        /// Its status and the last line that it wrote.
        why: String,
    },
}

impl TlsError {
    fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }
}

/// Handshakes, and the certificate behind them.
pub struct Tls {
    acceptor: TlsAcceptor,
    served: Arc<certificate::Served>,
    challenges: Arc<Challenges>,
    source: Source,
}

enum Source {
    Files(files::Files),
    Acme(acme::Acme),
}

impl Tls {
    /// Reads the certificate, where there is one already; `None` where TLS is off. A given certificate must be there
    /// and fit its key; an authority is only asked by [`Tls::maintain`].
    pub fn open(settings: TlsSettings) -> Result<Option<Arc<Self>>, TlsError> {
        let served = Arc::new(certificate::Served::default());
        let challenges = Arc::new(Challenges::default());
        let source = match settings {
            TlsSettings::Off => return Ok(None),
            TlsSettings::Certificate { chain, key } => Source::Files(files::Files::open(chain, key, &served)?),
            TlsSettings::Acme(settings) => {
                Source::Acme(acme::Acme::open(settings, Arc::clone(&challenges), Arc::clone(&served))?)
            }
        };
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&version::TLS13, &version::TLS12])?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&served) as Arc<dyn rustls::server::ResolvesServerCert>);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        config.ticketer = ring::Ticketer::new()?;
        Ok(Some(Arc::new(Self { acceptor: TlsAcceptor::from(Arc::new(config)), served, challenges, source })))
    }

    /// Keeps the certificate fresh until the end. With ACME and HTTP-01, [`Edge::serve_redirects`](crate::Edge) must be
    /// listening on port 80 by then.
    pub async fn maintain(&self, ending: CancellationToken) {
        tokio::select! {
            () = ending.cancelled() => {}
            () = async {
                match &self.source {
                    Source::Files(files) => files.watch(&self.served).await,
                    Source::Acme(acme) => acme.renew().await,
                }
            } => {}
        }
    }

    /// A handshake. Bounding its time is the caller's matter.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        self.acceptor.accept(stream).await
    }

    /// Until when the served certificate is valid; `None` while there is none.
    pub fn expires(&self) -> Option<SystemTime> {
        self.served.current().map(|certificate| certificate.ends)
    }

    pub(crate) fn challenges(&self) -> &Challenges {
        &self.challenges
    }
}
