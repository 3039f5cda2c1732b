//! Failures as the outside is told of them.

use heyvm_api::{ApiError, ErrorCode, error::with_causes};

/// A failure that is ours.
pub fn internal(error: &(dyn std::error::Error + 'static)) -> ApiError {
    tracing::error!(error = with_causes(error), "internal error");
    ApiError::new(ErrorCode::Internal, "the server failed").hint("the server's log has the details")
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
