//! Accounts of a heyvm server: logging in, API keys, the audit log.
//!
//! What holds a password or a token has no debug form, or one without it.

use std::fmt;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What credentials allow; each allows what those before it allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// See what is there.
    Read,
    /// Run commands and change files in sandboxes.
    Exec,
    /// Make, change and remove sandboxes, archives and URLs.
    Deploy,
    /// Manage API keys, read the audit log.
    Admin,
}

impl Scope {
    /// As it stands in JSON and on command lines.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Exec => "exec",
            Self::Deploy => "deploy",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.as_str())
    }
}

impl std::str::FromStr for Scope {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::Read, Self::Exec, Self::Deploy, Self::Admin];
        let found = all.into_iter().find(|scope| scope.as_str() == text);
        found.ok_or_else(|| format!("{text:?} is none of read, exec, deploy, admin"))
    }
}

/// Body of `POST /api/auth/login`.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LoginRequest {
    /// E-mail address, in letters of any case.
    pub email: String,
    /// Password.
    pub password: String,
}

/// Body of `POST /api/api-keys/exchange`.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExchangeRequest {
    /// `heyo_api_…`
    pub api_key: String,
}

/// Body of `POST /api/auth/refresh`, and of `POST /api/auth/logout` where the access token has expired.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RefreshRequest {
    /// The latest refresh token of the session: one that was used already ends it.
    pub refresh_token: String,
}

/// Answer of every call that gives tokens.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct Tokens {
    /// JWT for `Authorization: Bearer`.
    pub access_token: String,
    /// `Bearer`.
    pub token_type: String,
    /// Seconds until the access token expires.
    pub expires_in: u64,
    /// Gives the next tokens, once.
    pub refresh_token: String,
    /// The account.
    pub account_id: String,
    /// The user's e-mail address; none for an API key that the server's operator made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub email: Option<String>,
}

impl fmt::Debug for Tokens {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Tokens").field("account_id", &self.account_id).finish_non_exhaustive()
    }
}

/// One API key, without the key itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ApiKeyInfo {
    /// Its id.
    pub id: String,
    /// The account it is of.
    pub account_id: String,
    /// What it is called.
    pub name: String,
    /// Its first letters, to tell keys apart.
    pub prefix: String,
    /// What it may do.
    pub scope: Scope,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it ends; never, if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<DateTime<Utc>>,
    /// When it was last used, to the minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used_at: Option<DateTime<Utc>>,
    /// Whether it was revoked.
    pub revoked: bool,
}

/// Body of `POST /api/api-keys`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateKeyRequest {
    /// What to call it; up to 100 letters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What it may do; `deploy` when absent, or as much as the caller may where that is less.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<Scope>,
    /// Seconds until it ends; never, if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_in_seconds: Option<u64>,
}

/// Answer of `POST /api/api-keys`.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct CreatedKey {
    /// The key's description.
    #[serde(flatten)]
    pub info: ApiKeyInfo,
    /// The key itself, told this once.
    pub api_key: String,
}

impl fmt::Debug for CreatedKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("CreatedKey").field("info", &self.info).finish_non_exhaustive()
    }
}

/// Answer of `GET /api/auth/whoami`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WhoAmI {
    /// The account.
    pub account_id: String,
    /// The user; none for an API key that the server's operator made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_id: Option<String>,
    /// Their e-mail address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub email: Option<String>,
    /// What the credentials allow.
    pub scope: Scope,
}

/// One user of a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UserInfo {
    /// Their id.
    pub id: String,
    /// Their e-mail address.
    pub email: String,
    /// Their account.
    pub account_id: String,
    /// What they may do.
    pub scope: Scope,
    /// When they were added.
    pub created_at: DateTime<Utc>,
    /// Whether they are shut out.
    pub disabled: bool,
}

/// One thing that was done, or refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditEntry {
    /// When.
    pub at: DateTime<Utc>,
    /// In which account.
    pub account_id: String,
    /// By whom: an e-mail address, `key:` and an API key's id, or `operator`.
    pub actor: String,
    /// What, for example `key.create`.
    pub action: String,
    /// To what.
    pub target: String,
    /// How it ended, as an HTTP status.
    pub status: u16,
    /// The request's id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// From which address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<String>,
}

/// Answer of `GET /api/audit`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct AuditPage {
    /// Newest first.
    pub entries: Vec<AuditEntry>,
    /// Ask with `?before=` this for older ones; absent where there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<i64>,
}
