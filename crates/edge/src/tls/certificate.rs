//! One certificate with its key: read from PEM, checked, and served until another takes its place.

use std::{
    path::Path,
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use rustls::{
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use x509_parser::{extensions::GeneralName, parse_x509_certificate};

use super::TlsError;

/// A certificate that can be served.
#[derive(Debug)]
pub struct Certificate {
    key: Arc<CertifiedKey>,
    /// The names it is for, in lower case.
    pub names: Vec<String>,
    /// Valid from here …
    pub begins: SystemTime,
    /// … to here.
    pub ends: SystemTime,
}

impl Certificate {
    /// Reads chain and key from PEM; `path` is the file that errors name.
    pub fn read(chain: &[u8], key: &[u8], path: &Path) -> Result<Self, TlsError> {
        let missing = |what| TlsError::Pem { path: path.to_owned(), what };
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(chain)
            .collect::<Result<_, _>>()
            .ok()
            .filter(|chain: &Vec<_>| !chain.is_empty())
            .ok_or(missing("certificate"))?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| missing("private key"))?;
        let (_, parsed) = parse_x509_certificate(&chain[0]).map_err(|_| missing("certificate"))?;
        let names = names_of(&parsed);
        let (begins, ends) = (parsed.validity().not_before, parsed.validity().not_after);
        let (begins, ends) = (time(begins.timestamp()), time(ends.timestamp()));
        let key = CertifiedKey::from_der(chain, key, &ring::default_provider())
            .map_err(|source| TlsError::Certificate { path: path.to_owned(), source })?;
        Ok(Self { key: Arc::new(key), names, begins, ends })
    }
}

fn names_of(certificate: &x509_parser::certificate::X509Certificate<'_>) -> Vec<String> {
    let Ok(Some(extension)) = certificate.subject_alternative_name() else { return Vec::new() };
    let names = extension.value.general_names.iter().filter_map(|name| match name {
        GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
        _ => None,
    });
    names.collect()
}

fn time(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

/// The certificate that handshakes get.
#[derive(Debug, Default)]
pub struct Served(RwLock<Option<Arc<Certificate>>>);

impl Served {
    /// Serves this one from now on.
    pub fn set(&self, certificate: Certificate) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(certificate));
    }

    /// The one that is served.
    pub fn current(&self) -> Option<Arc<Certificate>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl ResolvesServerCert for Served {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.current().map(|certificate| Arc::clone(&certificate.key))
    }
}
