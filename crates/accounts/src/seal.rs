//! Signing keys at rest: sealed with ChaCha20-Poly1305 under a key that is derived (HKDF-SHA256) from the servers'
//! shared secret, and bound to the signing key's name.

use std::fmt;

use base64::{Engine, engine::general_purpose::STANDARD};
use heyvm_api::{ApiError, ErrorCode};
use rand::Rng;
use ring::{
    aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    hkdf::{HKDF_SHA256, Salt},
};

use crate::errors::invalid;

const SEALED: &str = "sealed:";
const PLAIN: &str = "plain:";
const SHORTEST: usize = 32;

/// What all servers of one store share, and the store does not hold. Its debug form does not tell it.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// A secret, from the environment or a file.
    ///
    /// # Errors
    /// `invalid_argument` for one of fewer than 32 bytes.
    pub fn new(text: impl Into<String>) -> Result<Self, ApiError> {
        let text = text.into();
        if text.len() < SHORTEST {
            let hint = "openssl rand -base64 32 makes one; give it to every server of this store";
            return Err(invalid(format!("the secret for signing keys has fewer than {SHORTEST} bytes"), hint));
        }
        Ok(Self(text))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Secret")
    }
}

/// Seals and opens. Without a secret it does neither, but for keys that were never sealed.
pub struct Sealer {
    key: Option<LessSafeKey>,
}

impl Sealer {
    /// With this secret, or none.
    pub fn new(secret: Option<&Secret>) -> Self {
        let key = secret.and_then(|secret| {
            let derived = Salt::new(HKDF_SHA256, b"heyvm").extract(secret.0.as_bytes());
            let okm = derived.expand(&[b"signing keys"], &CHACHA20_POLY1305).ok()?;
            Some(LessSafeKey::new(UnboundKey::from(okm)))
        });
        Self { key }
    }

    /// The bytes as the store may have them.
    pub fn seal(&self, name: &str, bytes: &[u8]) -> Result<String, ApiError> {
        let Some(key) = &self.key else { return Ok(format!("{PLAIN}{}", STANDARD.encode(bytes))) };
        let nonce: [u8; NONCE_LEN] = rand::rng().random();
        let mut sealed = bytes.to_vec();
        key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(name.as_bytes()), &mut sealed)
            .map_err(|_| ApiError::new(ErrorCode::Internal, "a signing key could not be sealed"))?;
        Ok(format!("{SEALED}{}", STANDARD.encode([&nonce[..], &sealed].concat())))
    }

    /// The bytes themselves; none where they are sealed with another secret, or by none that is known here.
    pub fn open(&self, name: &str, text: &str) -> Option<Vec<u8>> {
        if let Some(plain) = text.strip_prefix(PLAIN) {
            return STANDARD.decode(plain).ok();
        }
        let mut bytes = STANDARD.decode(text.strip_prefix(SEALED)?).ok()?;
        let (nonce, sealed) = bytes.split_at_mut_checked(NONCE_LEN)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let opened = self.key.as_ref()?.open_in_place(nonce, Aad::from(name.as_bytes()), sealed).ok()?;
        Some(opened.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealer(secret: &str) -> Sealer {
        Sealer::new(Some(&Secret::new(secret.repeat(32)).unwrap()))
    }

    #[test]
    fn only_the_same_secret_and_name_open_it() {
        let sealed = sealer("a").seal("k1", b"private").unwrap();
        assert_eq!(sealer("a").open("k1", &sealed).unwrap(), b"private");
        assert!(sealer("a").open("k2", &sealed).is_none());
        assert!(sealer("b").open("k1", &sealed).is_none());
        assert!(Sealer::new(None).open("k1", &sealed).is_none());
        assert!(!sealed.contains(&STANDARD.encode("private")));
        assert_ne!(sealed, sealer("a").seal("k1", b"private").unwrap());
        for broken in ["sealed:", "sealed:AAAA", "", "plain", "sealed:?"] {
            assert!(sealer("a").open("k1", broken).is_none(), "{broken}");
        }
    }

    #[test]
    fn without_a_secret_it_is_plain_and_stays_readable() {
        let plain = Sealer::new(None).seal("k1", b"private").unwrap();
        assert_eq!(Sealer::new(None).open("k1", &plain).unwrap(), b"private");
        assert_eq!(sealer("a").open("k1", &plain).unwrap(), b"private");
    }

    #[test]
    fn a_secret_is_long_and_not_told() {
        assert!(Secret::new("short").unwrap_err().hint.is_some());
        assert!(!format!("{:?}", Secret::new("x".repeat(32)).unwrap()).contains("xx"));
    }
}
