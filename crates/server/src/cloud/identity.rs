//! Who asks, and from where: what the cloud's handlers take from a request's head.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use axum::extract::{FromRef, FromRequestParts, RawPathParams};
use heyvm_accounts::{Accounts, Identity};
use heyvm_api::{ApiError, ErrorCode, accounts::Scope};
use heyvm_edge::Visitor;
use http::{HeaderMap, header, request::Parts};

use crate::problem::Problem;

/// Who asks: the credentials in `Authorization: Bearer`, an access token or an API key, were good a moment ago.
#[derive(Debug, Clone)]
pub struct Caller(pub Identity);

impl Caller {
    /// The caller, if the credentials allow this.
    ///
    /// # Errors
    /// `forbidden` where they allow less.
    pub fn require(self, scope: Scope) -> Result<Identity, Problem> {
        if self.0.scope >= scope {
            return Ok(self.0);
        }
        let message = format!("this needs credentials of scope {scope}; these are of scope {}", self.0.scope);
        Err(ApiError::new(ErrorCode::Forbidden, message).hint("use a login, or an API key of that scope").into())
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller
where
    Arc<Accounts>: FromRef<S>,
{
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        // Who was asked for by the guard is not asked for again.
        if let Some(known) = parts.extensions.get::<Self>() {
            return Ok(known.clone());
        }
        let credential = bearer(&parts.headers)?;
        Ok(Self(Arc::<Accounts>::from_ref(state).identify(credential).await?))
    }
}

/// The sandbox in the path: id, name or slug.
pub struct Named(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        // Some paths name more than the sandbox; it comes first.
        let path = RawPathParams::from_request_parts(parts, state).await;
        let path =
            path.map_err(|error| Problem::invalid(error.body_text(), "GET /openapi.json describes every field"))?;
        Ok(Self(path.iter().next().map(|(_, value)| value.to_owned()).unwrap_or_default()))
    }
}

/// The credentials of `Authorization: Bearer`.
///
/// # Errors
/// `unauthorized` where there are none.
pub fn bearer(headers: &HeaderMap) -> Result<&str, Problem> {
    let value = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
    match value.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => Ok(token.trim()),
        _ => Err(ApiError::new(ErrorCode::Unauthorized, "credentials are missing")
            .hint("send Authorization: Bearer, with an API key or the access token of POST /api/auth/login")
            .into()),
    }
}

/// Where the client is: the [`Visitor`] that the edge knows.
pub struct ClientAddress(pub IpAddr);

impl<S: Send + Sync> FromRequestParts<S> for ClientAddress {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        let visitor = parts.extensions.get::<Visitor>().map(|visitor| visitor.address);
        // Clients that nobody can tell apart share their attempts.
        Ok(Self(visitor.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED))))
    }
}
