//! Who asks, and for which sandbox. Whether they are who they say has been found out before.

use std::fmt;

use heyvm_api::{ApiError, ErrorCode};
use serde::{Deserialize, Serialize};

const MAX_ACCOUNT: usize = 64;

/// An account of a cloud, or this machine's owner, who has none.
#[derive(Debug, Clone, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Account(String);

impl Account {
    /// This machine's owner.
    pub fn owner() -> Self {
        Self::default()
    }

    /// An account by its id: 1 to 64 letters, digits, `-` and `_`.
    pub fn of_cloud(id: &str) -> Result<Self, ApiError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        if !id.is_empty() && id.len() <= MAX_ACCOUNT && id.bytes().all(allowed) {
            return Ok(Self(id.to_owned()));
        }
        Err(ApiError::new(ErrorCode::InvalidArgument, format!("{id:?} is no account's id"))
            .hint("use 1 to 64 letters, digits, '-' and '_'"))
    }

    /// Whether it is this machine's owner.
    pub fn is_owner(&self) -> bool {
        self.0.is_empty()
    }

    /// The id; empty for this machine's owner.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Refuses what concerns the whole machine.
    pub fn must_be_owner(&self, what: &str) -> Result<(), ApiError> {
        if self.is_owner() {
            return Ok(());
        }
        Err(ApiError::new(ErrorCode::Forbidden, format!("{what} is for the owner of the sandboxes' machine alone"))
            .hint("ask whoever runs the region"))
    }
}

/// A sandbox, as the one who asks calls it.
#[derive(Debug, Clone)]
pub struct Who {
    /// Who asks.
    pub account: Account,
    /// Id, name or slug: the living one, else the newest.
    pub sandbox: String,
}

impl Who {
    /// Asked by this machine's owner.
    pub fn owners(sandbox: impl Into<String>) -> Self {
        Self { account: Account::owner(), sandbox: sandbox.into() }
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sandbox)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_a_word_and_nobody_else_is_the_owner() {
        assert_eq!(Account::of_cloud("acc_1-B").unwrap().as_str(), "acc_1-B");
        for bad in ["", "*", "a b", "a\nb", "ü", &"a".repeat(65)] {
            assert_eq!(Account::of_cloud(bad).unwrap_err().code, ErrorCode::InvalidArgument, "{bad:?}");
        }
        assert!(Account::owner().must_be_owner("doctor").is_ok());
        let error = Account::of_cloud("acme").unwrap().must_be_owner("doctor").unwrap_err();
        assert_eq!(error.code, ErrorCode::Forbidden);
    }
}
