//! Mutual TLS towards the regions: who may be a region's daemon, and who we are to it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    version::TLS13,
};

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read, or is no PEM.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// It has no certificate in it.
    #[error("{0} has no certificate in it")]
    Empty(PathBuf),
    /// The certificates do not fit.
    #[error("the certificates do not fit: {0}")]
    Unfit(#[from] rustls::Error),
}

/// A client's side: servers that `ca` has signed, and nobody else; ourselves by `certificate` and `key`. TLS 1.3 alone.
pub fn client_config(ca: &Path, certificate: &Path, key: &Path) -> Result<Arc<ClientConfig>, Error> {
    let mut roots = RootCertStore::empty();
    for root in certificates(ca)? {
        roots.add(root)?;
    }
    let key = PrivateKeyDer::from_pem_file(key).map_err(|source| Error::File { path: key.to_owned(), source })?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(roots)
        .with_client_auth_cert(certificates(certificate)?, key)?;
    Ok(Arc::new(config))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let failed = |source| Error::File { path: path.to_owned(), source };
    let all: Vec<_> = CertificateDer::pem_file_iter(path).map_err(failed)?.collect::<Result<_, _>>().map_err(failed)?;
    if all.is_empty() { Err(Error::Empty(path.to_owned())) } else { Ok(all) }
}
