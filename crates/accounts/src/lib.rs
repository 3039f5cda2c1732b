//! Who may use a heyvm server, and what for. Knows no HTTP.
//!
//! ```text
//! password ─┐ limits, password               ┌─▶ access token: JWT, EdDSA, an hour
//! API key ──┴─▶ Accounts ─▶ session (store) ─┴─▶ refresh token: good for one use
//!                  ▲                  ▲
//!      identify(JWT or API key) ──────┘ each time, so that what is revoked, ended or disabled counts at once
//! ```
//!
//! - [`Accounts`] (here): settings, opening, [`Accounts::identify`].  `sessions`: logging in and out, refreshing.
//! - `users`, `keys`: people and API keys, made, listed, shut out.  `audit`: what was done.
//! - `password`: argon2id.  `limits`: how often one may try.
//! - `signing`: the keys that tokens are signed with, and their rotation.  `seal`: those keys at rest.  `token`: JWT.
//!
//! Several servers may share one store: nothing is remembered here but signing keys and attempts to log in.
#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test may block its own thread"))]
#![forbid(unsafe_code)]

mod audit;
mod errors;
mod keys;
mod limits;
mod password;
mod seal;
mod sessions;
mod signing;
#[cfg(test)]
mod tests;
mod token;
mod users;

use std::{fmt, num::NonZeroU32, sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use heyvm_api::{ApiError, ErrorCode, accounts::Scope};
use heyvm_store::{Store, accounts::SessionOwner};
use sha2::{Digest, Sha256};

pub use audit::DEFAULT_PAGE;
pub use heyvm_store::accounts::{AccountRow as Account, Quotas};
pub use limits::Metered;
pub use seal::Secret;
pub use users::NewUser;

use errors::unauthorized;
use keys::API_KEY;
use limits::Limits;
use password::Passwords;
use signing::Signing;

/// How often credentials are looked at again of which something is under way. What is revoked ends within 5 s.
const LAPSE_POLL: Duration = Duration::from_secs(2);
/// No credential is longer.
const MAX_CREDENTIAL: usize = 4096;

/// What an operator may decide.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `iss` of the tokens: the server's URL.
    pub issuer: String,
    /// How long an access token is good for.
    pub token_lifetime: Duration,
    /// How long a session lasts that nobody refreshes.
    pub session_lifetime: Duration,
    /// How long a key signs.
    pub key_rotation: Duration,
    /// How long before it signs a key is published, so that others have it by then.
    pub key_lead: Duration,
    /// Attempts to log in with one e-mail address, per minute; from one network address it is five times as many.
    pub logins_per_minute: NonZeroU32,
    /// How long entries stay in the audit log.
    pub audit_retention: Duration,
    /// Seals the signing keys in the store; without it they are as safe as the store itself.
    pub secret: Option<Secret>,
    /// What time it is.
    pub clock: Clock,
}

impl Default for Settings {
    fn default() -> Self {
        const DAY: Duration = Duration::from_secs(24 * 3600);
        Self {
            issuer: "heyvm".into(),
            token_lifetime: Duration::from_secs(3600),
            session_lifetime: 30 * DAY,
            key_rotation: 30 * DAY,
            key_lead: Duration::from_secs(3600),
            logins_per_minute: NonZeroU32::MIN.saturating_add(9),
            audit_retention: 90 * DAY,
            secret: None,
            clock: Clock::default(),
        }
    }
}

/// What time it is: milliseconds since 1970. The system's, unless a test has another.
#[derive(Clone)]
pub struct Clock(pub Arc<dyn Fn() -> i64 + Send + Sync>);

impl Default for Clock {
    fn default() -> Self {
        Self(Arc::new(|| Utc::now().timestamp_millis()))
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Clock")
    }
}

/// Who asks, and what they may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The account.
    pub account_id: String,
    /// The user; none behind an API key that the operator made.
    pub user_id: Option<String>,
    /// Their e-mail address.
    pub email: Option<String>,
    /// What the credentials allow.
    pub scope: Scope,
    /// Id of the API key or the session that the credentials are of.
    pub credential: String,
    /// The API key, or the one that the session was given for.
    pub api_key_id: Option<String>,
}

impl Identity {
    /// As the audit log names them: the e-mail address, or `key:` and the id of the API key.
    pub fn actor(&self) -> String {
        let key = || format!("key:{}", self.api_key_id.as_deref().unwrap_or(&self.credential));
        self.email.clone().unwrap_or_else(key)
    }
}

/// Accounts, users and their credentials, over one store.
pub struct Accounts {
    store: Store,
    settings: Settings,
    signing: Signing,
    passwords: Passwords,
    limits: Limits,
}

impl Accounts {
    /// For a server, which signs tokens: makes a signing key when there is none.
    ///
    /// # Errors
    /// `invalid_argument` for a secret that is too short, `host_not_ready` where the store's keys are sealed with
    /// another, `daemon_unavailable` where the store does not answer.
    pub async fn open(store: Store, settings: Settings) -> Result<Arc<Self>, ApiError> {
        let accounts = Self::new(store, settings)?;
        accounts.signing.open(accounts.now()).await?;
        Ok(Arc::new(accounts))
    }

    /// For an operator's command, which makes users and keys and signs nothing.
    ///
    /// # Errors
    /// None in practice: no secret is needed.
    pub fn administer(store: Store) -> Result<Self, ApiError> {
        Self::new(store, Settings::default())
    }

    fn new(store: Store, settings: Settings) -> Result<Self, ApiError> {
        let signing = Signing::new(store.clone(), &settings)?;
        let limits = Limits::new(settings.logins_per_minute);
        Ok(Self { store, settings, signing, passwords: Passwords::default(), limits })
    }

    /// Whose credentials these are: an access token or an API key.
    ///
    /// # Errors
    /// `unauthorized` for whatever is no credential, or none any more.
    pub async fn identify(&self, credential: &str) -> Result<Identity, ApiError> {
        if credential.len() > MAX_CREDENTIAL {
            return Err(unauthorized("the credentials are too long to be any"));
        }
        if credential.starts_with(API_KEY) {
            return self.identity_of_key(credential).await;
        }
        let claims = self.signing.verify(credential, self.now()).await?;
        let owner = self.store.session(&claims.sid).await?;
        let owner = owner.filter(|owner| owner.session.account_id == claims.account_id);
        let owner = owner.ok_or_else(|| unauthorized("the session has ended"))?;
        self.identity_of_session(owner)
    }

    /// Returns once the credentials of an identity are no longer good: revoked, ended, expired or disabled. For what goes
    /// on for long after it was allowed.
    pub async fn lapsed(&self, identity: &Identity) {
        loop {
            tokio::time::sleep(LAPSE_POLL).await;
            match self.still_identified(identity).await {
                Ok(()) => {}
                Err(error) if error.code == ErrorCode::Unauthorized => return,
                // That the store is away for a moment ends nothing.
                Err(error) => tracing::warn!(%error, "could not check whether credentials are still good"),
            }
        }
    }

    async fn still_identified(&self, identity: &Identity) -> Result<(), ApiError> {
        if identity.api_key_id.as_ref() == Some(&identity.credential) {
            let owner = self.store.api_key_of_id(&identity.credential).await?;
            let owner = owner.ok_or_else(|| unauthorized("the API key is gone"))?;
            return self.still_good(owner.disabled_at, owner.key.revoked_at, owner.key.expires_at);
        }
        let owner = self.store.session(&identity.credential).await?;
        let owner = owner.ok_or_else(|| unauthorized("the session has ended"))?;
        self.identity_of_session(owner).map(drop)
    }

    /// Counts a call of an account that leaves a row behind.
    ///
    /// # Errors
    /// `rate_limited` where there were too many within a minute.
    pub fn meter(&self, call: Metered, account: &str) -> Result<(), ApiError> {
        self.limits.meter(call, account)
    }

    fn identity_of_session(&self, owner: SessionOwner) -> Result<Identity, ApiError> {
        let (session, now) = (owner.session, self.now());
        if session.ended_at.is_some() || session.expires_at <= now {
            return Err(unauthorized("the session has ended"));
        }
        self.still_good(owner.disabled_at, owner.key_revoked_at, owner.key_expires_at)?;
        Ok(Identity {
            account_id: session.account_id,
            user_id: session.user_id,
            email: owner.email,
            scope: scope(&session.scope),
            credential: session.id,
            api_key_id: session.api_key_id,
        })
    }

    /// Whether neither user nor API key is shut out.
    fn still_good(&self, disabled: Option<i64>, revoked: Option<i64>, expires: Option<i64>) -> Result<(), ApiError> {
        if disabled.is_some() {
            return Err(unauthorized("the user is disabled"));
        }
        if revoked.is_some() {
            return Err(unauthorized("the API key is revoked"));
        }
        if expires.is_some_and(|expires| expires <= self.now()) {
            return Err(unauthorized("the API key has expired"));
        }
        Ok(())
    }

    /// Whether this looks like a credential of ours, good or not: an API key, or a JWT that says it comes from here.
    pub fn is_ours(&self, credential: &str) -> bool {
        credential.starts_with(API_KEY) || token::issuer_of(credential).is_some_and(|from| from == self.settings.issuer)
    }

    /// The public keys that access tokens can be verified with (RFC 7517), those that will sign next among them.
    ///
    /// # Errors
    /// Where the store does not answer.
    pub async fn jwks(&self) -> Result<serde_json::Value, ApiError> {
        self.signing.jwks(self.now()).await
    }

    /// Publishes a new signing key, which signs after the lead that the settings give. Tokens signed before stay good.
    ///
    /// # Errors
    /// Where the store does not answer.
    pub async fn rotate(&self) -> Result<(), ApiError> {
        self.signing.rotate(self.now()).await
    }

    /// What is to be done from time to time, once a minute or so, by any of the servers: rotates the signing key when
    /// it is due, forgets keys, sessions, attempts and entries of the audit log that count no more.
    ///
    /// # Errors
    /// Where the store does not answer.
    pub async fn maintain(&self) -> Result<(), ApiError> {
        const KEPT: i64 = 24 * 3600 * 1000;
        self.limits.forget();
        self.signing.maintain(self.now()).await?;
        self.store.forget_audit(self.now() - millis(self.settings.audit_retention)).await?;
        self.store.forget_sessions(self.now() - KEPT).await.map_err(Into::into)
    }

    /// Milliseconds since 1970.
    fn now(&self) -> i64 {
        (self.settings.clock.0)()
    }
}

/// A scope as the store has it. One that a later version wrote allows the least.
fn scope(text: &str) -> Scope {
    text.parse().unwrap_or(Scope::Read)
}

fn time(millis: i64) -> DateTime<Utc> {
    DateTime::from_timestamp_millis(millis).unwrap_or_default()
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX / 4)
}

/// What stands in the store for a secret that has entropy enough of its own.
fn hash(secret: &str) -> String {
    hex::encode(Sha256::digest(secret))
}

/// `prefix` and 43 letters and digits: more than 256 bits.
fn random(prefix: &str) -> String {
    use rand::{Rng, distr::Alphanumeric};
    prefix.chars().chain(rand::rng().sample_iter(Alphanumeric).take(43).map(char::from)).collect()
}
