//! API keys: `heyo_api_` and letters, of which the store has the hash alone.

use heyvm_api::{
    ApiError, ErrorCode,
    accounts::{ApiKeyInfo, CreateKeyRequest, CreatedKey, Scope},
};
use heyvm_store::accounts::ApiKeyRow;
use uuid::Uuid;

use crate::{
    Accounts, Identity,
    errors::{invalid, not_found, unauthorized},
    hash, random, scope, time,
    users::{OPERATOR, check_name},
};

/// What every API key begins with.
pub const API_KEY: &str = "heyo_api_";
/// Letters of a key that are shown, to tell keys apart.
const SHOWN: usize = API_KEY.len() + 6;
/// How exactly a key's last use is noted.
const MINUTE: i64 = 60_000;
const LONGEST: u64 = 10 * 365 * 24 * 3600;

impl Accounts {
    /// Makes an API key for the caller's own account.
    ///
    /// # Errors
    /// `forbidden` for a scope wider than the caller's; `invalid_argument` for a name or an end that cannot be meant.
    pub async fn create_key(&self, caller: &Identity, request: &CreateKeyRequest) -> Result<CreatedKey, ApiError> {
        let scope = request.scope.unwrap_or(Scope::Deploy.min(caller.scope));
        if scope > caller.scope {
            let message = format!("a key of scope {scope} is wider than the caller's own scope, {}", caller.scope);
            return Err(ApiError::new(ErrorCode::Forbidden, message).hint("ask for a scope that you have yourself"));
        }
        self.add_key(&caller.account_id, caller.user_id.clone(), &caller.actor(), scope, request).await
    }

    /// Makes an API key for an account, by id or name, on behalf of the server's operator.
    ///
    /// # Errors
    /// `not_found` where there is no such account; `invalid_argument` as with [`Accounts::create_key`].
    pub async fn issue_key(&self, account: &str, request: &CreateKeyRequest) -> Result<CreatedKey, ApiError> {
        let account = self.account(account).await?;
        self.add_key(&account.id, None, OPERATOR, request.scope.unwrap_or(Scope::Deploy), request).await
    }

    /// The API keys of one account, or of all, newest first.
    ///
    /// # Errors
    /// Where the store does not answer.
    pub async fn keys(&self, account_id: Option<&str>) -> Result<Vec<ApiKeyInfo>, ApiError> {
        Ok(self.store.api_keys(account_id).await?.iter().map(info).collect())
    }

    /// Revokes an API key, and with it its sessions, at once. Without a caller it is the operator who does.
    ///
    /// # Errors
    /// `not_found` where there is no such key; `forbidden` where it is another account's.
    pub async fn revoke_key(&self, caller: Option<&Identity>, id: &str) -> Result<ApiKeyInfo, ApiError> {
        let none =
            || not_found(format!("there is no API key of id {id}"), "GET /api/api-keys lists them with their ids");
        let key = self.store.api_key(id).await?.ok_or_else(none)?;
        if caller.is_some_and(|caller| caller.account_id != key.account_id) {
            let message = format!("the API key {id} is another account's");
            return Err(ApiError::new(ErrorCode::Forbidden, message).hint("GET /api/api-keys lists those of yours"));
        }
        let revoked = self.store.revoke_api_key(id, self.now()).await?.ok_or_else(none)?;
        let actor = caller.map_or_else(|| OPERATOR.to_owned(), Identity::actor);
        self.note(&revoked.account_id, &actor, "key.revoke", id, 200, None).await;
        Ok(info(&revoked))
    }

    pub(crate) async fn identity_of_key(&self, api_key: &str) -> Result<Identity, ApiError> {
        let found = self.store.api_key_of_hash(&hash(api_key)).await?;
        let owner = found.ok_or_else(|| unauthorized("the API key is not one of this server's"))?;
        let (key, now) = (owner.key, self.now());
        self.still_good(owner.disabled_at, key.revoked_at, key.expires_at)?;
        if key.last_used_at.is_none_or(|used| used + MINUTE <= now) {
            self.store.touch_api_key(&key.id, now).await?;
        }
        Ok(Identity {
            account_id: key.account_id,
            user_id: key.user_id,
            email: owner.email,
            scope: scope(&key.scope),
            credential: key.id.clone(),
            api_key_id: Some(key.id),
        })
    }

    async fn add_key(
        &self,
        account_id: &str,
        user_id: Option<String>,
        actor: &str,
        scope: Scope,
        request: &CreateKeyRequest,
    ) -> Result<CreatedKey, ApiError> {
        let name = request.name.as_deref().unwrap_or("API key");
        check_name("name: an API key's name", name)?;
        if request.expires_in_seconds.is_some_and(|seconds| !(1..=LONGEST).contains(&seconds)) {
            let message = format!("expires_in_seconds: a key lasts from 1 s to {LONGEST} s, or for good");
            return Err(invalid(message, "leave it out for a key that does not end"));
        }
        let (now, api_key) = (self.now(), random(API_KEY));
        let lifetime = request.expires_in_seconds.and_then(|seconds| i64::try_from(seconds * 1000).ok());
        let row = ApiKeyRow {
            id: Uuid::new_v4().to_string(),
            account_id: account_id.to_owned(),
            user_id,
            name: name.to_owned(),
            prefix: api_key[..SHOWN].to_owned(),
            hash: hash(&api_key),
            scope: scope.as_str().into(),
            created_at: now,
            expires_at: lifetime.map(|lifetime| now + lifetime),
            last_used_at: None,
            revoked_at: None,
        };
        self.store.add_api_key(&row).await?;
        self.note(account_id, actor, "key.create", &row.id, 201, None).await;
        Ok(CreatedKey { info: info(&row), api_key })
    }
}

fn info(row: &ApiKeyRow) -> ApiKeyInfo {
    ApiKeyInfo {
        id: row.id.clone(),
        account_id: row.account_id.clone(),
        name: row.name.clone(),
        prefix: row.prefix.clone(),
        scope: scope(&row.scope),
        created_at: time(row.created_at),
        expires_at: row.expires_at.map(time),
        last_used_at: row.last_used_at.map(time),
        revoked: row.revoked_at.is_some(),
    }
}
