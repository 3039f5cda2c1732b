//! What comes in with a request, and every way it can be wrong.

use std::{sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{FromRequest, FromRequestParts, Query, RawPathParams, Request},
};
use heyvm_api::{ApiError, ErrorCode, headers, limits};
use heyvm_control_plane::{Account, Asked, ControlPlane};
use http::{HeaderMap, StatusCode, header, request::Parts};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::{DeserializeOwned, IgnoredAny};

use crate::{problem::Problem, routes::Api};

/// How long a request waits for the daemon to have opened.
const OPENING: Duration = Duration::from_secs(300);
/// Largest JSON body; the one with a file in it may be larger.
const MAX_JSON: usize = 2 << 20;
const MAX_JSON_WITH_FILE: usize = 64 << 20;
/// Largest body of a few words.
const SMALL: usize = 64 << 10;

/// The control plane, once it is open.
pub struct Plane(pub Arc<ControlPlane>);

impl FromRequestParts<Api> for Plane {
    type Rejection = Problem;

    async fn from_request_parts(_: &mut Parts, api: &Api) -> Result<Self, Problem> {
        let opened = tokio::time::timeout(OPENING, api.plane()).await;
        let late = || ApiError::new(ErrorCode::DaemonUnavailable, "the daemon is still starting").hint("try again");
        Ok(Self(opened.map_err(|_| late())??))
    }
}

/// For whom it is asked: whoever comes this far is trusted to say so.
pub struct For(pub Account);

impl<S: Send + Sync> FromRequestParts<S> for For {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        match parts.headers.get(headers::ACCOUNT) {
            None => Ok(Self(Account::owner())),
            Some(id) => Ok(Self(Account::of_cloud(&String::from_utf8_lossy(id.as_bytes()))?)),
        }
    }
}

/// Whose are to be listed: an account's, or all.
pub struct Whose(pub Option<Account>);

impl<S: Send + Sync> FromRequestParts<S> for Whose {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        if parts.headers.get(headers::ACCOUNT).is_some_and(|id| id == headers::EVERY_ACCOUNT) {
            return Ok(Self(None));
        }
        For::from_request_parts(parts, state).await.map(|For(account)| Self(Some(account)))
    }
}

/// The id, name or slug in the path, and who asks.
pub struct Who(pub heyvm_control_plane::Who);

impl<S: Send + Sync> FromRequestParts<S> for Who {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        // Some paths name more than the sandbox; it comes first.
        let path = RawPathParams::from_request_parts(parts, state).await?;
        let sandbox = path.iter().next().map(|(_, value)| value.to_owned()).unwrap_or_default();
        let For(account) = For::from_request_parts(parts, state).await?;
        Ok(Self(heyvm_control_plane::Who { account, sandbox }))
    }
}

/// The query.
pub struct Params<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Params<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Query(params) = Query::<T>::from_request_parts(parts, state).await?;
        Ok(Self(params))
    }
}

/// A JSON body.
pub struct Content<T, const LIMIT: usize = MAX_JSON>(pub T);

/// A JSON body that may hold a file.
pub type ContentWithFile<T> = Content<T, MAX_JSON_WITH_FILE>;

impl<T: DeserializeOwned, S: Send + Sync, const LIMIT: usize> FromRequest<S> for Content<T, LIMIT> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let (parts, body) = request.into_parts();
        must_be_json(&parts.headers)?;
        parse(&collect(body, LIMIT).await?).map(Self)
    }
}

/// A JSON body of a few words, or none, which need not be declared.
pub struct OptionalContent<T>(pub Option<T>);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for OptionalContent<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let (parts, body) = request.into_parts();
        let bytes = collect(body, SMALL).await?;
        if bytes.trim_ascii().is_empty() {
            return Ok(Self(None));
        }
        must_be_json(&parts.headers)?;
        parse(&bytes).map(|content| Self(Some(content)))
    }
}

fn must_be_json(headers: &HeaderMap) -> Result<(), Problem> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json")) {
        return Ok(());
    }
    let hint = "send the header Content-Type: application/json";
    Err(Problem::invalid("the body is not declared as JSON", hint).with_status(StatusCode::UNSUPPORTED_MEDIA_TYPE))
}

async fn collect(body: Body, limit: usize) -> Result<bytes::Bytes, Problem> {
    match Limited::new(body, limit).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            let message = match limit {
                SMALL => format!("the body is larger than {} KiB", limit >> 10),
                _ => format!("the body is larger than {} MiB", limit >> 20),
            };
            let hint = match limit {
                MAX_JSON_WITH_FILE => "larger files go through PUT /sandboxes/{id}/files/tar",
                _ => "GET /openapi.json describes every body",
            };
            Err(ApiError::new(ErrorCode::TooLarge, message).hint(hint).into())
        }
        Err(error) => Err(Problem::broke_off(error)),
    }
}

/// JSON as `T`; an error names the field.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    let hint = "GET /openapi.json describes every body";
    // A structure may also be read from an array, field by field: nobody means that.
    if bytes.trim_ascii_start().first().is_some_and(|first| *first == b'[') {
        return Err(Problem::invalid("the body is an array, not an object", hint));
    }
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let (path, inner) = (error.path().to_string(), error.inner());
        // Where a word of an enumeration is to stand, other JSON counts as bad syntax, too.
        let is_json = || serde_json::from_slice::<IgnoredAny>(bytes).is_ok();
        if inner.is_eof() || (inner.is_syntax() && !is_json()) {
            return Problem::invalid(format!("the body is not JSON: {inner}"), hint);
        }
        let field = if path == "." { "the body".to_owned() } else { format!("field {path}") };
        Problem::invalid(format!("{field}: {inner}"), hint)
    })?;
    json.end().map_err(|error| Problem::invalid(format!("the body is not JSON: {error}"), hint))?;
    Ok(value)
}

/// Whether the caller asks for this media type by name.
pub fn accepts(headers: &HeaderMap, kind: &str) -> bool {
    let values = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    values
        .flat_map(|value| value.split(','))
        .any(|each| each.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case(kind))
}

/// For whom a sandbox is to be made, and what makes the same request give the same one again.
pub fn asked(account: Account, headers: &HeaderMap) -> Result<Asked, Problem> {
    let sandbox_id = headers.get(headers::SANDBOX_ID).map(|value| {
        let id = value.to_str().ok().and_then(|text| uuid::Uuid::parse_str(text).ok());
        id.ok_or_else(|| Problem::invalid("the header heyvm-sandbox-id is not a UUID", "make one up, or leave it out"))
    });
    Ok(Asked { account, idempotency_key: idempotency_key(headers)?, sandbox_id: sandbox_id.transpose()? })
}

/// The idempotency key, if there is one.
pub fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let Some(value) = headers.get("idempotency-key") else { return Ok(None) };
    let key = value.to_str().ok().map(str::trim).filter(|key| !key.is_empty()).ok_or_else(|| {
        Problem::invalid("the header Idempotency-Key is not a key", "use 1 to 255 visible ASCII characters")
    })?;
    limits::IDEMPOTENCY_KEY.check(key.len())?;
    Ok(Some(key.to_owned()))
}

#[cfg(test)]
mod tests {
    use heyvm_api::sandbox::CreateRequest;

    use super::*;

    fn message(json: &[u8]) -> String {
        parse::<CreateRequest>(json).err().unwrap().into_error().message
    }

    #[test]
    fn an_error_names_the_field() {
        assert!(message(br#"{"name": 7}"#).contains("field name"));
        assert!(message(br#"{"open_ports": [1, "x"]}"#).contains("field open_ports[1]"));
        assert!(message(br#"{"no_such_field": 1}"#).contains("no_such_field"));
        assert!(message(b"[1]").contains("the body"));
        assert!(message(b"{").contains("not JSON"));
        assert!(
            message(b"{\"name\": \"\xff\"}").contains("not JSON") || message(b"{\"name\": \"\xff\"}").contains("name")
        );
        assert!(message(b"{} {}").contains("not JSON"));
    }
}
