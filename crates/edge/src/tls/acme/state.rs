//! The directory that account and certificate are kept in. Synchronous: what is written there is on the disk afterwards.
#![expect(clippy::disallowed_methods, reason = "runs at the start, and on threads that may wait")]

use std::{
    fs, io,
    io::Write,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::Path,
};

use crate::tls::{TlsError, certificate::Certificate};

/// Private key and chain.
pub const CERTIFICATE: &str = "certificate.pem";

/// The kept certificate, if there is one.
pub fn certificate(state: &Path) -> Result<Option<Certificate>, TlsError> {
    let path = state.join(CERTIFICATE);
    let Some(pem) = read_if_there(&path).map_err(TlsError::file(&path))? else { return Ok(None) };
    Certificate::read(&pem, &pem, &path).map(Some)
}

/// The content of a file; `None` where there is none.
pub fn read_if_there(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some),
    }
}

/// A directory for our own eyes.
pub fn private_directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o700))
}

/// Whole or not at all, and for our own eyes.
pub fn private_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o600)).tempfile_in(directory)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}
