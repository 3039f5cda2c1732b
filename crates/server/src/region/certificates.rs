//! The files that say who the region is and whom it knows. They are read again when they change: a rotated certificate
//! needs no restart, and one that cannot be read leaves the last good one in use.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use heyvm_cloud::pem;
use rustls::{
    RootCertStore, ServerConfig,
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};

use crate::{Error, config::RegionConfig};

/// How often the files are looked at, at most.
const LOOK: Duration = Duration::from_secs(1);

/// The files, and what was last read from them.
pub struct Certificates {
    files: RegionConfig,
    now: Mutex<State>,
}

struct State {
    tls: Arc<ServerConfig>,
    stamps: Stamps,
    looked: Instant,
}

/// What tells one content of the files from another without reading them.
type Stamps = [Option<(i64, i64, u64, u64)>; 3];

impl Certificates {
    /// Reads the files.
    pub fn open(files: RegionConfig) -> Result<Self, Error> {
        let stamps = stamps(&files);
        let tls = read(&files).map_err(|problem| Error::Config { path: "config.toml".into(), problem })?;
        Ok(Self { files, now: Mutex::new(State { tls, stamps, looked: Instant::now() }) })
    }

    /// How TLS is spoken now. Whoever finds that a look is due waits for it; others have what is known meanwhile.
    pub async fn current(self: &Arc<Self>) -> Arc<ServerConfig> {
        let is_due = {
            let mut now = self.lock();
            let is_due = now.looked.elapsed() >= LOOK;
            if is_due {
                now.looked = Instant::now();
            }
            is_due
        };
        if is_due {
            let this = Arc::clone(self);
            if let Err(error) = tokio::task::spawn_blocking(move || this.look()).await {
                tracing::error!(%error, "the region's certificates could not be looked at");
            }
        }
        Arc::clone(&self.lock().tls)
    }

    fn look(&self) {
        let stamps = stamps(&self.files);
        if stamps == self.lock().stamps {
            return;
        }
        let read = read(&self.files);
        let mut now = self.lock();
        now.stamps = stamps;
        match read {
            Ok(tls) => {
                tracing::info!("the region's certificates were read again");
                now.tls = tls;
            }
            Err(problem) => tracing::error!(problem, "the region's certificates stay as they were"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[expect(clippy::disallowed_methods, reason = "runs at the start, and on threads that may wait")]
fn stamps(files: &RegionConfig) -> Stamps {
    [&files.certificate, &files.key, &files.client_ca].map(|path| {
        let meta = fs::metadata(path).ok()?;
        Some((meta.mtime(), meta.mtime_nsec(), meta.ino(), meta.len()))
    })
}

/// TLS 1.3 alone, for clients with a certificate that `client_ca` has signed. An error names the key of the file.
fn read(files: &RegionConfig) -> Result<Arc<ServerConfig>, String> {
    let told =
        |key: &str, path: &Path, why: &dyn std::fmt::Display| format!("region.{key} ({}): {why}", path.display());
    let chain = pem::certificates(&files.certificate).map_err(|why| told("certificate", &files.certificate, &why))?;
    let key = pem::private_key(&files.key).map_err(|why| told("key", &files.key, &why))?;
    let mut roots = RootCertStore::empty();
    for authority in pem::certificates(&files.client_ca).map_err(|why| told("client_ca", &files.client_ca, &why))? {
        roots.add(authority).map_err(|why| told("client_ca", &files.client_ca, &why))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build();
    let verifier = verifier.map_err(|why| told("client_ca", &files.client_ca, &why))?;
    let tls = ServerConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13]);
    let tls = tls.map_err(|why| why.to_string())?.with_client_cert_verifier(verifier);
    let mut tls = tls.with_single_cert(chain, key).map_err(|why| told("certificate", &files.certificate, &why))?;
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    // Whoever comes again shows a certificate again: it may have expired.
    tls.session_storage = Arc::new(NoServerSessionStorage {});
    tls.send_tls13_tickets = 0;
    Ok(Arc::new(tls))
}
