//! Logging in and out, exchanging API keys, refreshing: all that begins and ends sessions.

use std::net::IpAddr;

use heyvm_api::{ApiError, accounts::Tokens};
use heyvm_store::accounts::{Refreshed, SessionRow};
use uuid::Uuid;

use crate::{
    API_KEY, Accounts, Identity, Metered,
    errors::{invalid, unauthorized},
    hash, millis, random, scope,
    token::Claims,
    users::normalized,
};

const REFRESH_TOKEN: &str = "heyo_refresh_";

impl Accounts {
    /// Tokens for a user's e-mail address and password; `from` is the client's address.
    ///
    /// # Errors
    /// `unauthorized` where the two do not belong together or the user is disabled; `rate_limited` after too many
    /// attempts.
    pub async fn log_in(&self, email: &str, password: &str, from: IpAddr) -> Result<Tokens, ApiError> {
        let wrong = || unauthorized("the e-mail address or the password is wrong");
        let email = normalized(email).map_err(|_| wrong())?;
        self.limits.admit(&email, from)?;
        let user = self.store.user_of_email(&email).await?;
        let good = self.passwords.verify(password, user.as_ref().map(|user| user.password_hash.as_str())).await?;
        let Some(user) = user else {
            tracing::info!(%from, "log-in with an unknown e-mail address");
            return Err(wrong());
        };
        let refused = match (good, user.disabled_at) {
            (false, _) => Some(wrong()),
            (true, Some(_)) => Some(unauthorized("the user is disabled")),
            (true, None) => None,
        };
        let status = if refused.is_some() { 401 } else { 200 };
        self.note(&user.account_id, &email, "session.login", &user.id, status, Some(from)).await;
        if let Some(refused) = refused {
            return Err(refused);
        }
        let identity = Identity {
            account_id: user.account_id,
            user_id: Some(user.id),
            email: Some(user.email),
            scope: scope(&user.scope),
            credential: String::new(),
            api_key_id: None,
        };
        self.begin(identity).await
    }

    /// Tokens for an API key, with its scope; they end with the key.
    ///
    /// # Errors
    /// `unauthorized` where it is none, or none any more.
    pub async fn exchange(&self, api_key: &str, from: IpAddr) -> Result<Tokens, ApiError> {
        if !api_key.starts_with(API_KEY) {
            return Err(unauthorized(format!("an API key begins with {API_KEY}")));
        }
        let identity = self.identify(api_key).await?;
        self.meter(Metered::Exchange, &identity.account_id)?;
        let actor = identity.actor();
        self.note(&identity.account_id, &actor, "session.exchange", &identity.credential, 200, Some(from)).await;
        self.begin(identity).await
    }

    /// The next tokens of a session. The refresh token is used up by that; one that was used already ends the session,
    /// since then two have it.
    ///
    /// # Errors
    /// `unauthorized` where it is none, was used, or its session has ended.
    pub async fn refresh(&self, refresh_token: &str) -> Result<Tokens, ApiError> {
        let (now, next) = (self.now(), random(REFRESH_TOKEN));
        let used = hash(refresh_token);
        let gone = || unauthorized("the session has ended");
        let id = self.store.session_of_token(&used).await?;
        let id = id.ok_or_else(|| unauthorized("the refresh token is not one of this server's"))?;
        // Before the token is used up: a session that has ended stays as it is.
        let owner = self.store.session(&id).await?.ok_or_else(gone)?;
        let identity = self.identity_of_session(owner)?;
        let expires = now + millis(self.settings.session_lifetime);
        match self.store.use_token(&used, &hash(&next), now, expires).await? {
            Refreshed::Session(id) => self.tokens(&identity, &id, next, expires).await,
            Refreshed::Reused(id) => {
                let actor = identity.actor();
                self.note(&identity.account_id, &actor, "session.reuse", &id, 401, None).await;
                Err(unauthorized("the refresh token was used before, and its session is ended for that"))
            }
            Refreshed::Unknown => Err(gone()),
        }
    }

    /// Ends the session of an access or refresh token, and with it all its tokens.
    ///
    /// # Errors
    /// `unauthorized` where it is none; `invalid_argument` for an API key, which has no session.
    pub async fn log_out(&self, credential: &str) -> Result<(), ApiError> {
        if credential.starts_with(API_KEY) {
            let hint = "DELETE /api/api-keys/{id} revokes it";
            return Err(invalid("an API key is not logged in, and cannot be logged out", hint));
        }
        let identity = match self.store.session_of_token(&hash(credential)).await? {
            Some(id) => {
                let owner = self.store.session(&id).await?;
                self.identity_of_session(owner.ok_or_else(|| unauthorized("the session has ended"))?)?
            }
            None => self.identify(credential).await?,
        };
        self.store.end_session(&identity.credential, self.now()).await?;
        let actor = identity.actor();
        self.note(&identity.account_id, &actor, "session.logout", &identity.credential, 200, None).await;
        Ok(())
    }

    async fn begin(&self, identity: Identity) -> Result<Tokens, ApiError> {
        let (now, id, token) = (self.now(), Uuid::new_v4().to_string(), random(REFRESH_TOKEN));
        let expires_at = now + millis(self.settings.session_lifetime);
        let row = SessionRow {
            id: id.clone(),
            account_id: identity.account_id.clone(),
            user_id: identity.user_id.clone(),
            api_key_id: identity.api_key_id.clone(),
            scope: identity.scope.as_str().into(),
            created_at: now,
            expires_at,
            ended_at: None,
        };
        self.store.begin_session(&row, &hash(&token)).await?;
        self.tokens(&identity, &id, token, expires_at).await
    }

    async fn tokens(
        &self,
        identity: &Identity,
        session: &str,
        refresh_token: String,
        session_expires: i64,
    ) -> Result<Tokens, ApiError> {
        let now = self.now();
        let lifetime = millis(self.settings.token_lifetime).min(session_expires - now) / 1000;
        let claims = |issuer: &str| Claims {
            iss: issuer.to_owned(),
            aud: Claims::audience(),
            sub: identity.user_id.clone().unwrap_or_else(|| identity.actor()),
            account_id: identity.account_id.clone(),
            scope: identity.scope,
            sid: session.to_owned(),
            iat: now / 1000,
            exp: now / 1000 + lifetime,
        };
        Ok(Tokens {
            access_token: self.signing.sign(claims, now).await?,
            token_type: "Bearer".into(),
            expires_in: lifetime.unsigned_abs(),
            refresh_token,
            account_id: identity.account_id.clone(),
            email: identity.email.clone(),
        })
    }
}
