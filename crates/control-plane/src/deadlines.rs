//! When something is to be done about a sandbox by itself. The next deadline is known without a look at every sandbox.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use chrono::{DateTime, Utc};
use tokio::sync::Notify;

/// The longest sleep: the host's clock may be set, or the host may have slept.
const LOOK: Duration = Duration::from_secs(1);

/// One deadline for each sandbox that has one.
#[derive(Default)]
pub(crate) struct Deadlines {
    inner: Mutex<Inner>,
    /// Rings when a deadline has become the next one.
    sooner: Notify,
}

#[derive(Default)]
struct Inner {
    in_order: BTreeSet<(DateTime<Utc>, String)>,
    of_sandbox: HashMap<String, DateTime<Utc>>,
}

impl Inner {
    fn remove(&mut self, id: &str) {
        if let Some((id, at)) = self.of_sandbox.remove_entry(id) {
            self.in_order.remove(&(at, id));
        }
    }
}

impl Deadlines {
    /// Sets a sandbox's deadline in place of the one before.
    pub fn set(&self, id: &str, at: Option<DateTime<Utc>>) {
        let mut inner = self.inner();
        if inner.of_sandbox.get(id) == at.as_ref() {
            return;
        }
        inner.remove(id);
        let Some(at) = at else { return };
        let is_next = inner.in_order.first().is_none_or(|(first, _)| at < *first);
        inner.of_sandbox.insert(id.to_owned(), at);
        inner.in_order.insert((at, id.to_owned()));
        if is_next {
            self.sooner.notify_one();
        }
    }

    /// Takes out the sandboxes whose deadline has come.
    pub fn take_due(&self, now: DateTime<Utc>) -> Vec<String> {
        let mut inner = self.inner();
        let mut due = Vec::new();
        while let Some((_, id)) = inner.in_order.first().filter(|(at, _)| *at <= now).cloned() {
            inner.remove(&id);
            due.push(id);
        }
        due
    }

    /// Returns when the next deadline may have come.
    pub async fn wait(&self) {
        let next = self.inner().in_order.first().map(|(at, _)| *at);
        let left = next.map_or(LOOK, |at| (at - Utc::now()).to_std().unwrap_or_default().min(LOOK));
        tokio::select! {
            () = tokio::time::sleep(left) => {}
            () = self.sooner.notified() => {}
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(seconds, 0).unwrap()
    }

    #[test]
    fn each_sandbox_is_due_once_at_its_last_deadline() {
        let deadlines = Deadlines::default();
        deadlines.set("a", Some(at(10)));
        deadlines.set("b", Some(at(5)));
        deadlines.set("c", Some(at(5)));
        deadlines.set("a", Some(at(20)));
        deadlines.set("c", None);
        assert!(deadlines.take_due(at(4)).is_empty());
        assert_eq!(deadlines.take_due(at(15)), ["b"]);
        assert_eq!(deadlines.take_due(at(20)), ["a"]);
        assert!(deadlines.take_due(at(100)).is_empty());
    }

    #[tokio::test]
    async fn a_sooner_deadline_wakes_who_waits() {
        let deadlines = Deadlines::default();
        deadlines.set("a", Some(Utc::now() + chrono::Duration::hours(1)));
        deadlines.wait().await;
        deadlines.set("b", Some(Utc::now()));
        deadlines.wait().await;
        assert_eq!(deadlines.take_due(Utc::now()), ["b"]);
    }
}
