//! Access tokens: JWT (RFC 7519), signed with Ed25519 (`EdDSA`, RFC 8037).

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use heyvm_api::{ApiError, accounts::Scope};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, decode_header, encode};
use serde::{Deserialize, Serialize};

use crate::errors::{internal, unauthorized};

const AUDIENCE: &str = "heyvm";

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// The server's URL.
    pub iss: String,
    /// `heyvm`.
    pub aud: String,
    /// The user, or `key:` and the id of the API key.
    pub sub: String,
    /// The account.
    pub account_id: String,
    /// What it allows.
    pub scope: Scope,
    /// The session.
    pub sid: String,
    /// When it was made, in seconds since 1970.
    pub iat: i64,
    /// When it expires, in seconds since 1970.
    pub exp: i64,
}

impl Claims {
    /// With the audience that [`verify`] wants.
    pub fn audience() -> String {
        AUDIENCE.into()
    }
}

/// The name of the key that a token says it is signed with.
pub fn key_of(token: &str) -> Result<String, ApiError> {
    let header =
        decode_header(token).map_err(|_| unauthorized("the credentials are neither a token nor an API key"))?;
    header.kid.ok_or_else(|| unauthorized("the token names no key"))
}

/// What a token says of where it comes from; nothing of it is verified.
pub fn issuer_of(token: &str) -> Option<String> {
    let claims = token.split('.').nth(1).filter(|_| token.len() <= crate::MAX_CREDENTIAL)?;
    let claims: serde_json::Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).ok()?).ok()?;
    claims["iss"].as_str().map(str::to_owned)
}

/// Signs a token with the key of this name.
pub fn sign(claims: &Claims, kid: &str, key: &EncodingKey) -> Result<String, ApiError> {
    let header = Header { kid: Some(kid.to_owned()), ..Header::new(Algorithm::EdDSA) };
    encode(&header, claims, key).map_err(|error| internal(&error))
}

/// What a token says, if the key signed it, the issuer is this and it has not expired; `now` in milliseconds.
pub fn verify(token: &str, key: &DecodingKey, issuer: &str, now: i64) -> Result<Claims, ApiError> {
    // The one algorithm there is: what the token says of it does not count.
    let mut validation = Validation::new(Algorithm::EdDSA);
    validation.set_audience(&[AUDIENCE]);
    validation.set_issuer(&[issuer]);
    validation.set_required_spec_claims(&["iss", "aud", "sub", "exp"]);
    // Below, by the clock of the settings and without leeway.
    validation.validate_exp = false;
    let claims = decode::<Claims>(token, key, &validation).map_err(|_| unauthorized("the token is not valid"))?.claims;
    if claims.exp.saturating_mul(1000) <= now {
        return Err(unauthorized("the token has expired"));
    }
    Ok(claims)
}
