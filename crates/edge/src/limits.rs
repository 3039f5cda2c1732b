//! What one sandbox may take of the host: requests and tunnels at a time.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Counts requests per sandbox.
pub struct Limits {
    each: usize,
    sandboxes: Mutex<HashMap<String, Weak<Semaphore>>>,
}

impl Limits {
    /// At most `each` requests at a time for one sandbox.
    pub fn new(each: usize) -> Self {
        Self { each, sandboxes: Mutex::default() }
    }

    /// Room for one request; `None` when the sandbox has as many as it may.
    pub fn enter(&self, sandbox: &str) -> Option<OwnedSemaphorePermit> {
        let mut sandboxes = self.sandboxes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(semaphore) = sandboxes.get(sandbox).and_then(Weak::upgrade) {
            return semaphore.try_acquire_owned().ok();
        }
        // A semaphore lives as long as a permit of it; the entries of idle sandboxes go here.
        sandboxes.retain(|_, semaphore| semaphore.strong_count() > 0);
        let semaphore = Arc::new(Semaphore::new(self.each));
        sandboxes.insert(sandbox.to_owned(), Arc::downgrade(&semaphore));
        semaphore.try_acquire_owned().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_sandbox_does_not_take_anothers_room() {
        let limits = Limits::new(2);
        let first = limits.enter("a");
        let second = limits.enter("a");
        assert!(first.is_some() && second.is_some() && limits.enter("a").is_none());
        assert!(limits.enter("b").is_some());
        drop(first);
        assert!(limits.enter("a").is_some());
        drop(second);
        let _c = limits.enter("c");
        assert_eq!(limits.sandboxes.lock().unwrap().len(), 1, "idle sandboxes are forgotten");
    }
}
