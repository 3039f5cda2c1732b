//! Mutual TLS towards the regions: who may be a region's daemon, and who we are to it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{ClientConfig, RootCertStore, version::TLS13};

use crate::pem::{self, PemError};

/// What is wrong with what we are told to use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file is of no use.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: PemError,
    },
    /// The certificates do not fit.
    #[error("the certificates do not fit: {0}")]
    Unfit(#[from] rustls::Error),
}

/// A client's side: servers that `ca` has signed, and nobody else; ourselves by `certificate` and `key`. TLS 1.3 alone.
pub fn client_config(ca: &Path, certificate: &Path, key: &Path) -> Result<Arc<ClientConfig>, Error> {
    let of = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::File { path, source }
    };
    let mut roots = RootCertStore::empty();
    for root in pem::certificates(ca).map_err(of(ca))? {
        roots.add(root)?;
    }
    let chain = pem::certificates(certificate).map_err(of(certificate))?;
    let key = pem::private_key(key).map_err(of(key))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)?;
    Ok(Arc::new(config))
}
