//! Work on a sandbox that may panic: a dependency's fault, brought about by what a guest sends. The panic becomes a value,
//! so that the sandbox it happened to ends as failed, and no other one notices.

use std::{any::Any, panic::AssertUnwindSafe};

use futures::FutureExt;

/// A panic's message, and what was being done.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the daemon failed while {doing}: {message}")]
pub(crate) struct Panicked {
    doing: &'static str,
    message: String,
}

/// Runs `work`, catching its panic. What `work` shares with others must hold at each of its awaits: the locks here do
/// not stay poisoned.
pub(crate) async fn run<T>(doing: &'static str, work: impl Future<Output = T>) -> Result<T, Panicked> {
    AssertUnwindSafe(work).catch_unwind().await.map_err(|panic| {
        let panicked = Panicked { doing, message: message_of(&*panic) };
        tracing::error!(error = %panicked, "caught a panic");
        panicked
    })
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("no message").chars().filter(|c| !c.is_control()).take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn panic_becomes_an_error() {
        assert_eq!(run("counting", async { 7 }).await.unwrap(), 7);
        let panicked: Result<(), Panicked> = run("counting", async { panic!("no {}", "base64") }).await;
        assert_eq!(panicked.unwrap_err().to_string(), "the daemon failed while counting: no base64");
    }
}
