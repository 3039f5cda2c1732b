//! The keys that tokens are signed with.
//!
//! ```text
//! key 1  published, signs ────────────────┬─ verifies ─┐ forgotten
//! key 2            published ──── lead ───┴─ signs ─────────────────┬─ verifies ─┐
//!                  (rotate)                            └ lifetime of a token
//! ```
//! All of it follows from the keys' rows and the time: servers that share a store agree without talking. A server
//! reads the keys anew when its copy is a minute old or a token names a key that it does not know.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use heyvm_api::{ApiError, ErrorCode};
use heyvm_store::{Store, accounts::SigningKeyRow};
use jsonwebtoken::{DecodingKey, EncodingKey};
use rand::Rng;
use ring::signature::{Ed25519KeyPair, KeyPair};
use serde_json::{Value, json};

use crate::{
    Settings,
    errors::{internal, unauthorized},
    millis,
    seal::Sealer,
    token::{self, Claims},
};

/// Age of a copy that is read anew in any case, and where a token names an unknown key.
const STALE: Duration = Duration::from_secs(60);
const STALE_FOR_UNKNOWN: Duration = Duration::from_secs(1);
/// What stands before the 32 bytes of an Ed25519 key in PKCS #8 (RFC 8410, section 7).
const PKCS8: [u8; 16] = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];

/// The signing keys of a store.
pub struct Signing {
    store: Store,
    sealer: Sealer,
    issuer: String,
    rotation: i64,
    lead: i64,
    token_lifetime: i64,
    copy: RwLock<Option<(Instant, Arc<Vec<Key>>)>>,
}

struct Key {
    generation: i64,
    kid: String,
    /// As it stands in a JWK.
    x: String,
    signs_from: i64,
    verifying: DecodingKey,
    /// None where it is sealed with a secret that is not known here.
    signing: Option<EncodingKey>,
}

impl Signing {
    /// The keys of this store; none is read yet.
    pub fn new(store: Store, settings: &Settings) -> Result<Self, ApiError> {
        Ok(Self {
            store,
            sealer: Sealer::new(settings.secret.as_ref()),
            issuer: settings.issuer.clone(),
            rotation: millis(settings.key_rotation),
            lead: millis(settings.key_lead),
            token_lifetime: millis(settings.token_lifetime),
            copy: RwLock::default(),
        })
    }

    /// Makes the first key where there is none, and makes sure that this server can sign.
    pub async fn open(&self, now: i64) -> Result<(), ApiError> {
        if self.read().await?.is_empty() {
            self.add(1, now, now).await?;
        }
        let keys = self.read().await?;
        signer(&keys, now)?.signing.as_ref().map(drop).ok_or_else(sealed)
    }

    /// A token that says this.
    pub async fn sign(&self, claims: impl FnOnce(&str) -> Claims, now: i64) -> Result<String, ApiError> {
        let keys = self.keys(STALE).await?;
        let key = signer(&keys, now)?;
        token::sign(&claims(&self.issuer), &key.kid, key.signing.as_ref().ok_or_else(sealed)?)
    }

    /// What a token says that one of the keys has signed.
    pub async fn verify(&self, token: &str, now: i64) -> Result<Claims, ApiError> {
        let kid = token::key_of(token)?;
        for age in [STALE, STALE_FOR_UNKNOWN] {
            let keys = self.keys(age).await?;
            if let Some(key) = self.verifying(&keys, now).find(|key| key.kid == kid) {
                return token::verify(token, &key.verifying, &self.issuer, now);
            }
        }
        Err(unauthorized("the token's key is not, or no longer, one of this server's"))
    }

    /// The public keys, as RFC 7517 has them.
    pub async fn jwks(&self, now: i64) -> Result<Value, ApiError> {
        let keys = self.keys(STALE_FOR_UNKNOWN).await?;
        let keys: Vec<_> = self
            .verifying(&keys, now)
            .map(
                |key| json!({"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "kid": key.kid, "x": key.x}),
            )
            .collect();
        Ok(json!({ "keys": keys }))
    }

    /// Publishes the next key.
    pub async fn rotate(&self, now: i64) -> Result<(), ApiError> {
        let keys = self.read().await?;
        let next = keys.last().map_or(1, |key| key.generation + 1);
        self.add(next, now, now + self.lead).await?;
        self.read().await.map(drop)
    }

    /// Rotates when it is due, and forgets keys that verify nothing any more.
    pub async fn maintain(&self, now: i64) -> Result<(), ApiError> {
        let keys = self.read().await?;
        let due = keys.last().is_some_and(|key| key.signs_from + self.rotation <= now + self.lead);
        if due {
            self.rotate(now).await?;
        }
        for old in keys.iter().filter(|key| !self.verifies(&keys, key, now)) {
            self.store.forget_signing_key(old.generation).await?;
        }
        Ok(())
    }

    fn verifying<'a>(&'a self, keys: &'a [Key], now: i64) -> impl Iterator<Item = &'a Key> {
        keys.iter().filter(move |key| self.verifies(keys, key, now))
    }

    /// Whether a token that it signed can still be good.
    fn verifies(&self, keys: &[Key], key: &Key, now: i64) -> bool {
        // Servers' clocks may differ a little.
        let slack = millis(STALE);
        let successor = keys.iter().find(|other| other.generation > key.generation);
        successor.is_none_or(|next| now < next.signs_from + self.token_lifetime + slack)
    }

    /// Adds a key, unless another server was first with this generation: then that one's is as good.
    async fn add(&self, generation: i64, now: i64, signs_from: i64) -> Result<(), ApiError> {
        let seed: [u8; 32] = rand::rng().random();
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed)
            .map_err(|error| ApiError::new(ErrorCode::Internal, format!("no signing key: {error}")))?;
        let kid = crate::random("").chars().take(16).collect::<String>();
        let row = SigningKeyRow {
            generation,
            public_key: URL_SAFE_NO_PAD.encode(pair.public_key()),
            private_key: self.sealer.seal(&kid, &seed)?,
            kid,
            created_at: now,
            signs_from,
        };
        match self.store.add_signing_key(&row).await {
            Ok(()) | Err(heyvm_store::Error::Exists) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The keys, from a copy that is not older than this.
    async fn keys(&self, age: Duration) -> Result<Arc<Vec<Key>>, ApiError> {
        let copy = self.copy.read().unwrap_or_else(PoisonError::into_inner).clone();
        match copy {
            Some((read, keys)) if read.elapsed() < age => Ok(keys),
            _ => self.read().await,
        }
    }

    async fn read(&self) -> Result<Arc<Vec<Key>>, ApiError> {
        let rows = self.store.signing_keys().await?;
        let keys = Arc::new(rows.iter().map(|row| self.key(row)).collect::<Result<Vec<_>, _>>()?);
        *self.copy.write().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), keys.clone()));
        Ok(keys)
    }

    fn key(&self, row: &SigningKeyRow) -> Result<Key, ApiError> {
        let seed = self.sealer.open(&row.kid, &row.private_key).filter(|seed| seed.len() == 32);
        Ok(Key {
            generation: row.generation,
            kid: row.kid.clone(),
            x: row.public_key.clone(),
            signs_from: row.signs_from,
            verifying: DecodingKey::from_ed_components(&row.public_key).map_err(|error| internal(&error))?,
            signing: seed.map(|seed| EncodingKey::from_ed_der(&[&PKCS8[..], &seed].concat())),
        })
    }
}

/// The latest that has begun to sign; the first where a clock is behind.
fn signer(keys: &[Key], now: i64) -> Result<&Key, ApiError> {
    let begun = keys.iter().rev().find(|key| key.signs_from <= now);
    begun.or(keys.first()).ok_or_else(|| {
        ApiError::new(ErrorCode::HostNotReady, "the store has no signing key")
            .hint("restart heyvm server: it makes one")
    })
}

fn sealed() -> ApiError {
    ApiError::new(ErrorCode::HostNotReady, "the store's signing keys are sealed with another secret")
        .hint("give this server the secret that the others of this store have")
}
