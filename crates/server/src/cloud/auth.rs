//! Logging in and out, API keys, the audit log, and the keys that tokens can be verified with.

use std::sync::Arc;

use axum::{
    Json,
    extract::{FromRef, State},
    response::{IntoResponse, Response},
};
use heyvm_accounts::{Accounts, DEFAULT_PAGE};
use heyvm_api::accounts::{
    ApiKeyInfo, AuditPage, CreateKeyRequest, CreatedKey, ExchangeRequest, LoginRequest, RefreshRequest, Scope, Tokens,
    WhoAmI,
};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::identity::{Caller, ClientAddress, Named, bearer};
use crate::{
    extract::{Content, OptionalContent, Params},
    problem::Problem,
};

/// How long others may keep the public keys: a new one is published an hour before it signs.
const JWKS_AGE: HeaderValue = HeaderValue::from_static("public, max-age=300");

/// The routes of this module, over any state that has the accounts.
pub fn routes<S>() -> OpenApiRouter<S>
where
    S: Clone + Send + Sync + 'static,
    Arc<Accounts>: FromRef<S>,
{
    OpenApiRouter::new()
        .routes(routes!(log_in))
        .routes(routes!(refresh))
        .routes(routes!(log_out))
        .routes(routes!(who_am_i))
        .routes(routes!(exchange))
        .routes(routes!(list_keys, create_key))
        .routes(routes!(revoke_key))
        .routes(routes!(audit_log))
        .routes(routes!(public_keys))
}

/// An answer that holds secrets, which no cache may keep.
fn secret(status: StatusCode, body: impl serde::Serialize) -> Response {
    (status, [(header::CACHE_CONTROL, "no-store")], Json(body)).into_response()
}

/// Tokens for an e-mail address and a password.
///
/// Attempts are limited per e-mail address and per network address: 429 with `Retry-After`.
#[utoipa::path(post, path = "/api/auth/login", operation_id = "log_in", tag = "accounts", request_body = LoginRequest,
    responses((status = 200, description = "A session's first tokens", body = Tokens)))]
async fn log_in(
    State(accounts): State<Arc<Accounts>>,
    ClientAddress(from): ClientAddress,
    Content(request): Content<LoginRequest>,
) -> Result<Response, Problem> {
    let tokens = accounts.log_in(&request.email, &request.password, from).await?;
    Ok(secret(StatusCode::OK, tokens))
}

/// The next tokens of a session.
///
/// A refresh token is good for one use: one that comes again ends its session.
#[utoipa::path(post, path = "/api/auth/refresh", operation_id = "refresh_tokens", tag = "accounts",
    request_body = RefreshRequest, responses((status = 200, description = "The next tokens", body = Tokens)))]
async fn refresh(
    State(accounts): State<Arc<Accounts>>,
    Content(request): Content<RefreshRequest>,
) -> Result<Response, Problem> {
    Ok(secret(StatusCode::OK, accounts.refresh(&request.refresh_token).await?))
}

/// Ends the session of the access token, or of the refresh token in the body: none of its tokens is good any more.
#[utoipa::path(post, path = "/api/auth/logout", operation_id = "log_out", tag = "accounts",
    request_body = Option<RefreshRequest>, responses((status = 204, description = "The session has ended")))]
async fn log_out(
    State(accounts): State<Arc<Accounts>>,
    headers: HeaderMap,
    OptionalContent(request): OptionalContent<RefreshRequest>,
) -> Result<StatusCode, Problem> {
    match request {
        None => accounts.log_out(bearer(&headers)?).await?,
        Some(request) => accounts.log_out(&request.refresh_token).await?,
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Who the credentials are of, and what they allow.
#[utoipa::path(get, path = "/api/auth/whoami", operation_id = "who_am_i", tag = "accounts",
    responses((status = 200, description = "Account, user and scope", body = WhoAmI)))]
async fn who_am_i(Caller(who): Caller) -> Json<WhoAmI> {
    Json(WhoAmI { account_id: who.account_id, user_id: who.user_id, email: who.email, scope: who.scope })
}

/// Tokens for an API key, with its scope. They end with the key.
#[utoipa::path(post, path = "/api/api-keys/exchange", operation_id = "exchange_api_key", tag = "accounts",
    request_body = ExchangeRequest, responses((status = 200, description = "A session's first tokens", body = Tokens)))]
async fn exchange(
    State(accounts): State<Arc<Accounts>>,
    ClientAddress(from): ClientAddress,
    Content(request): Content<ExchangeRequest>,
) -> Result<Response, Problem> {
    Ok(secret(StatusCode::OK, accounts.exchange(&request.api_key, from).await?))
}

/// The account's API keys, newest first. Needs scope `admin`.
#[utoipa::path(get, path = "/api/api-keys", operation_id = "list_api_keys", tag = "accounts",
    responses((status = 200, description = "All of them, without the keys themselves", body = Vec<ApiKeyInfo>)))]
async fn list_keys(State(accounts): State<Arc<Accounts>>, caller: Caller) -> Result<Json<Vec<ApiKeyInfo>>, Problem> {
    let caller = caller.require(Scope::Admin)?;
    Ok(Json(accounts.keys(Some(&caller.account_id)).await?))
}

/// Makes an API key for the account. Needs scope `admin`.
#[utoipa::path(post, path = "/api/api-keys", operation_id = "create_api_key", tag = "accounts",
    request_body = CreateKeyRequest,
    responses((status = 201, description = "The key itself is told this once", body = CreatedKey)))]
async fn create_key(
    State(accounts): State<Arc<Accounts>>,
    caller: Caller,
    Content(request): Content<CreateKeyRequest>,
) -> Result<Response, Problem> {
    let caller = caller.require(Scope::Admin)?;
    Ok(secret(StatusCode::CREATED, accounts.create_key(&caller, &request).await?))
}

/// Revokes an API key, and ends what was begun with it, at once. Needs scope `admin`.
#[utoipa::path(delete, path = "/api/api-keys/{id}", operation_id = "revoke_api_key", tag = "accounts",
    params(("id" = String, Path, description = "The key's id")),
    responses((status = 204, description = "It is no key any more")))]
async fn revoke_key(
    State(accounts): State<Arc<Accounts>>,
    caller: Caller,
    Named(id): Named,
) -> Result<StatusCode, Problem> {
    let caller = caller.require(Scope::Admin)?;
    accounts.revoke_key(Some(&caller), &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Query of the audit log.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct AuditQuery {
    /// How many entries, at most 1000; 100 when absent.
    limit: Option<u32>,
    /// Entries older than those of the last page: its `next`.
    before: Option<i64>,
}

/// What was done to the account, newest first. Needs scope `admin`.
#[utoipa::path(get, path = "/api/audit", operation_id = "audit_log", tag = "accounts", params(AuditQuery),
    responses((status = 200, description = "A page of entries", body = AuditPage)))]
async fn audit_log(
    State(accounts): State<Arc<Accounts>>,
    caller: Caller,
    Params(query): Params<AuditQuery>,
) -> Result<Json<AuditPage>, Problem> {
    let caller = caller.require(Scope::Admin)?;
    let limit = query.limit.unwrap_or(DEFAULT_PAGE);
    Ok(Json(accounts.audit_log(&caller.account_id, query.before, limit).await?))
}

/// The public keys that access tokens can be verified with (RFC 7517). Needs no credentials.
#[utoipa::path(get, path = "/.well-known/jwks.json", operation_id = "public_keys", tag = "accounts",
    responses((status = 200, description = "Those that sign, will sign, or have signed what is still good",
        body = serde_json::Value)))]
async fn public_keys(State(accounts): State<Arc<Accounts>>) -> Result<Response, Problem> {
    Ok(([(header::CACHE_CONTROL, JWKS_AGE)], Json(accounts.jwks().await?)).into_response())
}

#[cfg(test)]
mod tests;
