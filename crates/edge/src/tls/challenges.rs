//! Proofs by HTTP (RFC 8555, section 8.3): what the authority wants to read on port 80.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

const PREFIX: &str = "/.well-known/acme-challenge/";

/// Tokens and what is to be answered.
#[derive(Default)]
pub struct Challenges(Mutex<HashMap<String, String>>);

impl Challenges {
    /// Answers a token from now on.
    pub fn add(&self, token: &str, answer: &str) {
        self.lock().insert(token.to_owned(), answer.to_owned());
    }

    /// No longer.
    pub fn remove(&self, token: &str) {
        self.lock().remove(token);
    }

    /// The answer to a request for this path, if it is one of the authority's.
    pub fn answer(&self, path: &str) -> Option<String> {
        self.lock().get(path.strip_prefix(PREFIX)?).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
