//! A certificate that others renew: its files are looked at, and read again when they have changed.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use super::{
    TlsError,
    certificate::{Certificate, Served},
};

const LOOK: Duration = Duration::from_secs(5);

/// Chain and key.
pub struct Files {
    chain: PathBuf,
    key: PathBuf,
    seen: Mutex<Stamps>,
}

type Stamps = [Option<(SystemTime, u64)>; 2];

impl Files {
    /// Reads both.
    pub fn open(chain: PathBuf, key: PathBuf, served: &Served) -> Result<Self, TlsError> {
        let seen = Mutex::new([stamp(&chain), stamp(&key)]);
        let files = Self { chain, key, seen };
        served.set(files.read()?);
        Ok(files)
    }

    /// Serves what the files hold, whenever that changes and can be used; goes on with what it has until then.
    pub async fn watch(&self, served: &Served) {
        loop {
            tokio::time::sleep(LOOK).await;
            let now = [stamp(&self.chain), stamp(&self.key)];
            if std::mem::replace(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner), now) == now {
                continue;
            }
            match self.read() {
                Ok(certificate) => {
                    tracing::info!(chain = %self.chain.display(), "a new certificate is served");
                    served.set(certificate);
                }
                // Its two files may not have been written in one moment; the second one is noticed, too.
                Err(error) => tracing::warn!(%error, "the old certificate is served on"),
            }
        }
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
