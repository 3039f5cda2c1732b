//! A certificate that others renew: its files are looked at, and read again when they have changed.
#![expect(clippy::disallowed_methods, reason = "runs at the start, and on threads that may wait")]

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use tokio::task::spawn_blocking;

use super::{
    TlsError,
    certificate::{Certificate, Served},
};

const LOOK: Duration = Duration::from_secs(5);

/// Chain and key.
#[derive(Clone)]
pub struct Files {
    chain: PathBuf,
    key: PathBuf,
    seen: Stamps,
}

type Stamps = [Option<(SystemTime, u64)>; 2];

impl Files {
    /// Reads both.
    pub fn open(chain: PathBuf, key: PathBuf, served: &Served) -> Result<Self, TlsError> {
        let mut files = Self { chain, key, seen: [None; 2] };
        files.seen = files.stamps();
        served.set(files.read()?);
        Ok(files)
    }

    /// Serves what the files hold, whenever that changes and can be used; goes on with what it has until then.
    pub async fn watch(&self, served: &Served) {
        let mut seen_before = self.seen;
        loop {
            tokio::time::sleep(LOOK).await;
            let (files, seen) = (self.clone(), seen_before);
            let looked = spawn_blocking(move || {
                let now = files.stamps();
                (now, (now != seen).then(|| files.read()))
            });
            let Ok((now, read)) = looked.await else { continue };
            seen_before = now;
            let Some(read) = read else { continue };
            match read {
                Ok(certificate) => {
                    tracing::info!(chain = %self.chain.display(), "a new certificate is served");
                    served.set(certificate);
                }
                // Its two files may not have been written in one moment; the second one is noticed, too.
                Err(error) => tracing::warn!(%error, "the old certificate is served on"),
            }
        }
    }

    fn stamps(&self) -> Stamps {
        [stamp(&self.chain), stamp(&self.key)]
    }

    fn read(&self) -> Result<Certificate, TlsError> {
        let bytes = |path: &Path| fs::read(path).map_err(TlsError::file(path));
        Certificate::read(&bytes(&self.chain)?, &bytes(&self.key)?, &self.chain)
    }
}

fn stamp(path: &Path) -> Option<(SystemTime, u64)> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.modified().ok()?, metadata.len()))
}
