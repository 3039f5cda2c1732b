//! A certificate from an authority that speaks ACME (RFC 8555): got, kept in a directory, renewed before it ends.
//!
//! ```text
//! state/              0700
//!   account.json      0600  the account's key
//!   certificate.pem   0600  private key and chain, one file so that they change at once
//! ```
//! Names are proved by HTTP-01, or all of them by DNS-01 where the operator gives a hook; a wildcard wants the latter.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use instant_acme::{
    Account, AccountCredentials, AuthorizationStatus, ChallengeType, Identifier, NewAccount, NewOrder, Order,
    OrderStatus, RetryPolicy,
};
use tokio::task::spawn_blocking;

use super::{
    TlsError,
    certificate::{Certificate, Served},
    challenges::Challenges,
    hook,
};

mod state;

/// The directory of Let's Encrypt.
pub const LETS_ENCRYPT: &str = "https://acme-v02.api.letsencrypt.org/directory";

/// How long the authority may take for each step.
const PATIENCE: RetryPolicy =
    RetryPolicy::new().initial_delay(Duration::from_millis(500)).backoff(1.5).timeout(Duration::from_secs(180));
/// How long an order may take in all.
const ORDER: Duration = Duration::from_secs(900);
/// Clocks are set; what is due is looked at this often.
const LOOK: Duration = Duration::from_secs(3600);
const LONGEST_RETRY: Duration = Duration::from_secs(6 * 3600);

/// Which authority, for which names, proved how.
#[derive(Debug, Clone)]
pub struct AcmeSettings {
    /// URL of the authority's directory.
    pub directory: String,
    /// A certificate in PEM that the authority's own is signed by; the system's roots where there is none.
    pub trusted_root: Option<PathBuf>,
    /// Where the authority sends warnings: `mailto:` URLs.
    pub contacts: Vec<String>,
    /// Whether the operator agrees to the authority's terms of service; without, no authority is asked.
    pub terms_agreed: bool,
    /// Names for the certificate; `*.` begins a wildcard.
    pub names: Vec<String>,
    /// Makes and removes DNS records: `PROGRAM add|remove NAME VALUE`.
    pub dns_hook: Option<PathBuf>,
    /// Directory for account and certificate.
    pub state: PathBuf,
    /// How long to wait after a first failure; twice as long after each further one, up to six hours.
    pub first_retry: Duration,
}

impl AcmeSettings {
    /// A certificate of Let's Encrypt for these names.
    pub fn new(names: Vec<String>, state: PathBuf) -> Self {
        Self {
            directory: LETS_ENCRYPT.into(),
            trusted_root: None,
            contacts: Vec::new(),
            terms_agreed: false,
            names,
            dns_hook: None,
            state,
            first_retry: Duration::from_secs(60),
        }
    }

    fn check(&self) -> Result<(), TlsError> {
        let wildcard = self.names.iter().any(|name| name.starts_with("*."));
        match () {
            () if self.names.is_empty() => Err(TlsError::Settings("ACME: name at least one name for the certificate")),
            () if !self.terms_agreed => {
                Err(TlsError::Settings("ACME: say that you agree to the certificate authority's terms of service"))
            }
            () if wildcard && self.dns_hook.is_none() => {
                Err(TlsError::Settings("ACME: a wildcard wants a program that makes DNS records (dns_hook)"))
            }
            () => Ok(()),
        }
    }
}

/// The authority's client.
pub struct Acme {
    settings: AcmeSettings,
    challenges: Arc<Challenges>,
    served: Arc<Served>,
}

/// What was shown to the authority, and is taken back when it has looked.
enum Proof {
    Http(String),
    Dns { name: String, value: String },
}

impl Acme {
    /// Makes the directory and serves the certificate in it, if there is one.
    pub fn open(settings: AcmeSettings, challenges: Arc<Challenges>, served: Arc<Served>) -> Result<Self, TlsError> {
        settings.check()?;
        state::private_directory(&settings.state).map_err(TlsError::file(&settings.state))?;
        let acme = Self { settings, challenges, served };
        match state::certificate(&acme.settings.state) {
            Ok(kept) => kept.into_iter().for_each(|kept| acme.serve_if_newer(kept)),
            Err(error) => tracing::warn!(%error, "the kept certificate cannot be used: another one is asked for"),
        }
        Ok(acme)
    }

    /// Renews the certificate whenever two thirds of its time are over, for ever.
    pub async fn renew(&self) {
        let mut retry = self.settings.first_retry;
        loop {
            let wait = self.due_in();
            if !wait.is_zero() {
                tokio::time::sleep(wait.min(LOOK)).await;
                continue;
            }
            match self.order_in_time().await {
                Ok(()) => {
                    retry = self.settings.first_retry;
                    tracing::info!(names = ?self.settings.names, "a new certificate is served");
                }
                Err(error) => {
                    tracing::warn!(%error, again_in = ?retry, "no new certificate");
                    tokio::time::sleep(retry).await;
                    retry = (retry * 2).min(LONGEST_RETRY);
                    // Another process of the same directory may have been luckier.
                    let state = self.settings.state.clone();
                    if let Ok(Ok(Some(kept))) = spawn_blocking(move || state::certificate(&state)).await {
                        self.serve_if_newer(kept);
                    }
                }
            }
        }
    }

    async fn order_in_time(&self) -> Result<(), TlsError> {
        let ordered = tokio::time::timeout(ORDER, self.order()).await;
        ordered.unwrap_or_else(|_| Err(TlsError::Authority(instant_acme::Error::Timeout(None))))?;
        if self.due_in().is_zero() {
            // Without this, a clock that is wrong would have certificates ordered without end.
            return Err(TlsError::Settings(
                "the new certificate is to be renewed at once: is this host's clock right?",
            ));
        }
        Ok(())
    }

    /// How long until a new certificate is to be got.
    fn due_in(&self) -> Duration {
        let Some(current) = self.served.current() else { return Duration::ZERO };
        if !self.settings.names.iter().all(|name| current.names.contains(&name.to_ascii_lowercase())) {
            return Duration::ZERO;
        }
        let lifetime = current.ends.duration_since(current.begins).unwrap_or_default();
        let due = current.begins + lifetime * 2 / 3;
        due.duration_since(SystemTime::now()).unwrap_or_default()
    }

    async fn order(&self) -> Result<(), TlsError> {
        let account = self.account().await?;
        let names: Vec<Identifier> = self.settings.names.iter().cloned().map(Identifier::Dns).collect();
        let mut order = account.new_order(&NewOrder::new(&names)).await?;
        let mut proofs = Vec::new();
        let issued = self.proved_and_issued(&mut order, &mut proofs).await;
        for proof in proofs {
            self.take_back(proof).await;
        }
        let pem = issued?;
        let path = self.settings.state.join(state::CERTIFICATE);
        let certificate = Certificate::read(pem.as_bytes(), pem.as_bytes(), &path)?;
        keep(&path, pem.into_bytes()).await?;
        self.served.set(certificate);
        Ok(())
    }

    async fn proved_and_issued(&self, order: &mut Order, proofs: &mut Vec<Proof>) -> Result<String, TlsError> {
        self.prove(order, proofs).await?;
        match order.poll_ready(&PATIENCE).await? {
            OrderStatus::Ready | OrderStatus::Valid => {}
            _ => return Err(why_not(order).await),
        }
        let key = order.finalize().await?;
        let chain = order.poll_certificate(&PATIENCE).await?;
        Ok(format!("{key}{chain}"))
    }

    async fn prove(&self, order: &mut Order, proofs: &mut Vec<Proof>) -> Result<(), TlsError> {
        let by_dns = self.settings.dns_hook.as_deref();
        let kind = if by_dns.is_some() { ChallengeType::Dns01 } else { ChallengeType::Http01 };
        let mut authorizations = order.authorizations();
        while let Some(authorization) = authorizations.next().await {
            let mut authorization = authorization?;
            if authorization.status == AuthorizationStatus::Valid {
                continue;
            }
            let name = authorization.identifier().identifier.clone();
            let name = if let Identifier::Dns(name) = name { name } else { continue };
            let mut challenge = authorization.challenge(kind.clone()).ok_or_else(|| TlsError::Proof {
                name: name.clone(),
                why: "it offers no way of proof that is known here".into(),
            })?;
            let answer = challenge.key_authorization();
            match by_dns {
                Some(program) => {
                    let (name, value) = (format!("_acme-challenge.{name}"), answer.dns_value());
                    proofs.push(Proof::Dns { name: name.clone(), value: value.clone() });
                    hook::run(program, "add", &name, &value).await?;
                }
                None => {
                    proofs.push(Proof::Http(challenge.token.clone()));
                    self.challenges.add(&challenge.token, answer.as_str());
                }
            }
            challenge.set_ready().await?;
        }
        Ok(())
    }

    async fn take_back(&self, proof: Proof) {
        match (proof, &self.settings.dns_hook) {
            (Proof::Http(token), _) => self.challenges.remove(&token),
            (Proof::Dns { name, value }, Some(program)) => {
                if let Err(error) = hook::run(program, "remove", &name, &value).await {
                    tracing::warn!(%error, "a DNS record stays behind");
                }
            }
            (Proof::Dns { .. }, None) => {}
        }
    }

    /// The account in the directory, or a new one.
    async fn account(&self) -> Result<Account, TlsError> {
        let builder = match &self.settings.trusted_root {
            Some(root) => Account::builder_with_root(root)?,
            None => Account::builder()?,
        };
        let path = self.settings.state.join("account.json");
        let kept = path.clone();
        let kept = spawn_blocking(move || state::read_if_there(&kept)).await.map_err(io::Error::other).flatten();
        if let Some(kept) = kept.map_err(TlsError::file(&path))? {
            match serde_json::from_slice::<AccountCredentials>(&kept) {
                Ok(credentials) => return Ok(builder.from_credentials(credentials).await?),
                Err(error) => tracing::warn!(%error, "account.json cannot be read: a new account is made"),
            }
        }
        let contact: Vec<&str> = self.settings.contacts.iter().map(String::as_str).collect();
        let wanted = NewAccount { contact: &contact, terms_of_service_agreed: true, only_return_existing: false };
        let (account, credentials) = builder.create(&wanted, self.settings.directory.clone(), None).await?;
        let text = serde_json::to_vec(&credentials).map_err(io::Error::other).map_err(TlsError::file(&path))?;
        keep(&path, text).await?;
        Ok(account)
    }

    /// Serves the kept certificate, unless a newer one is served.
    fn serve_if_newer(&self, kept: Certificate) {
        if self.served.current().is_none_or(|current| current.ends < kept.ends) {
            self.served.set(kept);
        }
    }
}

async fn keep(path: &Path, bytes: Vec<u8>) -> Result<(), TlsError> {
    let file = path.to_owned();
    let kept = spawn_blocking(move || state::private_file(&file, &bytes)).await.map_err(io::Error::other).flatten();
    kept.map_err(TlsError::file(path))
}

/// What the authority says of the proofs that it did not accept.
async fn why_not(order: &mut Order) -> TlsError {
    let mut authorizations = order.authorizations();
    while let Some(Ok(mut authorization)) = authorizations.next().await {
        let name = authorization.identifier().to_string();
        let Ok(state) = authorization.refresh().await else { continue };
        if let Some(problem) = state.challenges.iter().find_map(|challenge| challenge.error.as_ref()) {
            return TlsError::Proof { name, why: problem.to_string() };
        }
    }
    TlsError::Proof { name: "the names".into(), why: "it did not say why".into() }
}
