//! Failures as the outside is told of them.

use heyvm_api::{ApiError, ErrorCode};

/// A failure that is ours.
pub fn internal(error: &(dyn std::error::Error + 'static)) -> ApiError {
    tracing::error!(error = with_sources(error), "internal error");
    ApiError::new(ErrorCode::Internal, "the server failed").hint("the server's log has the details")
}

fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

/// No credentials, or none that count.
pub fn unauthorized(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::Unauthorized, message)
        .hint("log in again, or send an API key that is good: Authorization: Bearer heyo_api_…")
}

/// An argument that cannot be meant.
pub fn invalid(message: impl Into<String>, hint: &str) -> ApiError {
    ApiError::new(ErrorCode::InvalidArgument, message).hint(hint)
}

/// Nothing of this name or id is there.
pub fn not_found(message: impl Into<String>, hint: &str) -> ApiError {
    ApiError::new(ErrorCode::NotFound, message).hint(hint)
}
