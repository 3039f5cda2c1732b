//! Passwords: argon2id with the parameters that OWASP's password storage cheat sheet names first for it (19 MiB, two
//! passes, one lane), so many at once as there are processors.

use argon2::{
    Argon2, PasswordHasher, PasswordVerifier,
    password_hash::{self, phc::PasswordHash},
};
use heyvm_api::ApiError;
use tokio::sync::Semaphore;

use crate::errors::{internal, invalid};

const LENGTH: std::ops::RangeInclusive<usize> = 8..=1024;

/// A hash that no password has: who asks with an unknown e-mail address waits as long as with a wrong password.
const NOBODYS: &str = "$argon2id$v=19$m=19456,t=2,p=1$aGV5dm0tbm9ib2R5cw$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// Hashes and checks passwords.
pub struct Passwords {
    at_once: Semaphore,
}

impl Default for Passwords {
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self { at_once: Semaphore::new(processors) }
    }
}

impl Passwords {
    /// A hash to keep, as a PHC string.
    pub async fn hash(&self, password: &str) -> Result<String, ApiError> {
        if !LENGTH.contains(&password.len()) {
            let message = format!("a password has from {} to {} bytes", LENGTH.start(), LENGTH.end());
            return Err(invalid(message, "choose a longer one; a few words will do"));
        }
        let password = password.to_owned();
        let hashed = self.alone(move || Argon2::default().hash_password(password.as_bytes())).await?;
        hashed.map(|hash| hash.to_string()).map_err(|error| internal(&error))
    }

    /// Whether the password has this hash. Without a hash it takes as long.
    pub async fn verify(&self, password: &str, hash: Option<&str>) -> Result<bool, ApiError> {
        // What is longer than any password need not be hashed, and is not.
        let password = if password.len() > *LENGTH.end() { String::new() } else { password.to_owned() };
        let (hash, known) = (hash.unwrap_or(NOBODYS).to_owned(), hash.is_some());
        let verified = self
            .alone(move || {
                let hash = PasswordHash::new(&hash)?;
                Argon2::default().verify_password(password.as_bytes(), &hash)
            })
            .await?;
        match verified {
            Ok(()) => Ok(known),
            Err(password_hash::Error::PasswordInvalid) => Ok(false),
            Err(error) => Err(internal(&error)),
        }
    }

    async fn alone<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
        let _permit = self.at_once.acquire().await.map_err(|error| internal(&error))?;
        tokio::task::spawn_blocking(work).await.map_err(|error| internal(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_password_is_good_for_its_own_hash() {
        let passwords = Passwords::default();
        let hash = passwords.hash("correct horse").await.unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
        assert_ne!(hash, passwords.hash("correct horse").await.unwrap());
        assert!(passwords.verify("correct horse", Some(&hash)).await.unwrap());
        for wrong in ["correct horsf", "", "correct horse "] {
            assert!(!passwords.verify(wrong, Some(&hash)).await.unwrap());
        }
        assert!(!passwords.verify("correct horse", None).await.unwrap());
    }

    #[tokio::test]
    async fn its_length_has_bounds() {
        let passwords = Passwords::default();
        for (length, fits) in [(7, false), (8, true), (1024, true), (1025, false)] {
            assert_eq!(passwords.hash(&"x".repeat(length)).await.is_ok(), fits, "{length}");
        }
    }

    /// A time cannot be asserted on a busy machine; the work can: the same function with the same parameters.
    #[tokio::test]
    async fn nobody_is_as_much_work_as_somebody() {
        let hash = Passwords::default().hash("correct horse").await.unwrap();
        let parameters =
            |hash: &str| hash.rsplit_once('$').and_then(|(rest, _)| rest.rsplit_once('$')).unwrap().0.to_owned();
        assert_eq!(parameters(NOBODYS), parameters(&hash));
    }
}
