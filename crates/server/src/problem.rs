//! Every error as an answer: an `ErrorBody` with its status.

use axum::{
    Json,
    extract::rejection::{PathRejection, QueryRejection, RawPathParamsRejection},
    response::{IntoResponse, Response},
};
use heyvm_api::{ApiError, ErrorCode, error::ErrorBody};
use http::{HeaderMap, HeaderValue, StatusCode, header};

/// An error on its way out. The status is the code's own, unless HTTP has a better one.
#[derive(Debug)]
pub struct Problem {
    error: ApiError,
    status: Option<StatusCode>,
}

impl Problem {
    /// A malformed request.
    pub fn invalid(message: impl Into<String>, hint: &str) -> Self {
        ApiError::new(ErrorCode::InvalidArgument, message).hint(hint).into()
    }

    /// A body that did not come to its end.
    pub fn broke_off(why: impl std::fmt::Display) -> Self {
        Self::invalid(format!("the body broke off: {why}"), "send it again")
    }

    /// With another status than the code's.
    pub fn with_status(self, status: StatusCode) -> Self {
        Self { status: Some(status), ..self }
    }

    /// The error itself.
    pub fn into_error(self) -> ApiError {
        with_hint(self.error)
    }
}

impl From<ApiError> for Problem {
    fn from(error: ApiError) -> Self {
        Self { error, status: None }
    }
}

impl From<tonic::Status> for Problem {
    fn from(status: tonic::Status) -> Self {
        heyvm_control_plane::agent_error(&status).into()
    }
}

impl From<heyvm_vm::Error> for Problem {
    fn from(error: heyvm_vm::Error) -> Self {
        ApiError::new(ErrorCode::SandboxUnreachable, error.to_string()).into()
    }
}

impl From<QueryRejection> for Problem {
    fn from(rejection: QueryRejection) -> Self {
        let text = rejection.body_text();
        let text = text.strip_prefix("Failed to deserialize query string: ").unwrap_or(&text);
        Self::invalid(format!("query: {text}"), "GET /openapi.json describes every parameter")
    }
}

impl From<PathRejection> for Problem {
    fn from(rejection: PathRejection) -> Self {
        Self::invalid(format!("path: {}", rejection.body_text()), "GET /openapi.json describes every parameter")
    }
}

impl From<RawPathParamsRejection> for Problem {
    fn from(rejection: RawPathParamsRejection) -> Self {
        Self::invalid(format!("path: {}", rejection.body_text()), "GET /openapi.json describes every parameter")
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = self
            .status
            .or_else(|| StatusCode::from_u16(self.error.code.status()).ok())
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        if status.is_server_error() {
            tracing::warn!(code = self.error.code.as_str(), message = self.error.message, "answered with an error");
        }
        let mut headers = HeaderMap::new();
        if let Some(seconds) = self.error.retry_after_seconds {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        (status, headers, Json(ErrorBody::from(with_hint(self.error)))).into_response()
    }
}

/// Every error says what to do next.
fn with_hint(mut error: ApiError) -> ApiError {
    error.hint.get_or_insert_with(|| error.code.hint().into());
    error
}
