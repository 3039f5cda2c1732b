//! What comes in with a request, and every way it can be wrong.

use std::{sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{FromRequest, FromRequestParts, Path, Query, Request},
};
use heyvm_api::{ApiError, ErrorCode};
use heyvm_control_plane::ControlPlane;
use http::{HeaderMap, StatusCode, header, request::Parts};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;

use crate::{problem::Problem, routes::Api};

/// How long a request waits for the daemon to have opened.
const OPENING: Duration = Duration::from_secs(300);
/// Largest JSON body; the one with a file in it may be larger.
const MAX_JSON: usize = 2 << 20;
const MAX_JSON_WITH_FILE: usize = 64 << 20;
const MAX_KEY: usize = 255;

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

/// The id, name or slug in the path.
pub struct Who(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Who {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Path(who) = Path::<String>::from_request_parts(parts, state).await?;
        Ok(Self(who))
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
        if !is_json(&parts.headers) {
            return Err(Problem::invalid(
                "the body is not declared as JSON",
                "send the header Content-Type: application/json",
            )
            .with_status(StatusCode::UNSUPPORTED_MEDIA_TYPE));
        }
        parse(&collect(body, LIMIT).await?).map(Self)
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json"))
}

async fn collect(body: Body, limit: usize) -> Result<bytes::Bytes, Problem> {
    match Limited::new(body, limit).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            let message = format!("the body is larger than {} MiB", limit >> 20);
            let hint = "larger files go through PUT /sandboxes/{id}/files/tar";
            Err(ApiError::new(ErrorCode::TooLarge, message).hint(hint).into())
        }
        Err(error) => Err(Problem::invalid(format!("the body broke off: {error}"), "send it again")),
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
        if inner.is_syntax() || inner.is_eof() {
            return Problem::invalid(format!("the body is not JSON: {inner}"), hint);
        }
        let field = if path == "." { "the body".to_owned() } else { format!("field {path}") };
        Problem::invalid(format!("{field} is not as it should be: {inner}"), hint)
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

/// The idempotency key, if there is one.
pub fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let Some(value) = headers.get("idempotency-key") else { return Ok(None) };
    let key = value.to_str().ok().map(str::trim).filter(|key| !key.is_empty() && key.len() <= MAX_KEY);
    key.map(|key| Some(key.to_owned())).ok_or_else(|| {
        Problem::invalid("the header Idempotency-Key is not a key", "use 1 to 255 visible ASCII characters")
    })
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
