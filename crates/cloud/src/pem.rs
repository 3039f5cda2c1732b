//! Certificates and keys from PEM files. Errors tell nothing of what stands in a file.
#![expect(clippy::disallowed_methods, reason = "runs at the start, and on threads that may wait")]

use std::{fs, io, os::unix::fs::MetadataExt, path::Path};

use rustls::pki_types::{
    CertificateDer, PrivateKeyDer,
    pem::{self, PemObject},
};

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum PemError {
    /// There is none.
    #[error("there is no such file")]
    Missing,
    /// It cannot be read.
    #[error("{0}")]
    Unreadable(#[source] io::Error),
    /// Others than its owner and group may read a key.
    #[error("everyone on this machine may read it: chmod o= takes that away")]
    Open,
    /// What was looked for is not in it.
    #[error("it holds nothing of that kind in PEM")]
    Empty,
    /// It is something else.
    #[error("it is not PEM")]
    Malformed,
}

/// The certificates of a file, one at least.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let all: Vec<_> = CertificateDer::pem_file_iter(path)?.collect::<Result<_, _>>()?;
    if all.is_empty() { Err(PemError::Empty) } else { Ok(all) }
}

/// The private key of a file that is not everyone's to read.
pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, PemError> {
    if fs::metadata(path)?.mode() & 0o007 != 0 {
        return Err(PemError::Open);
    }
    Ok(PrivateKeyDer::from_pem_file(path)?)
}

impl From<io::Error> for PemError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::Missing,
            _ => Self::Unreadable(error),
        }
    }
}

impl From<pem::Error> for PemError {
    fn from(error: pem::Error) -> Self {
        match error {
            pem::Error::Io(error) => error.into(),
            pem::Error::NoItemsFound => Self::Empty,
            _ => Self::Malformed,
        }
    }
}
