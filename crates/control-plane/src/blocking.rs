//! Work that waits for a disk, on a thread that may wait: a worker of the runtime serves everybody.

use heyvm_api::ApiError;

use crate::errors;

/// Goes on to its end although its caller may leave.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| errors::internal(&error))
}
