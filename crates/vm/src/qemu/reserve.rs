//! Clones kept in reserve: resumed, connected, their disk mounted, rehearsed, so that a create has little left to do.
//! Under translation most of a clone's first moments go into translating; a clone from the reserve has that behind.
//!
//! A VM in reserve lives in `sandboxes/reserve-…`, an id no sandbox has; a daemon that starts removes what an earlier
//! one left. Nothing of a sandbox is in it: entropy, clock, names and address come when it is taken.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use super::running::Watched;
use crate::{Rehearsal, VmId};

/// How the ids of VMs in reserve begin.
const PREFIX: &str = "reserve-";
/// Digits behind it.
const DIGITS: usize = 16;

/// A new id of the pool's.
pub fn new_id() -> VmId {
    format!("{PREFIX}{:0DIGITS$x}", rand::random::<u64>())
}

/// Whether an id is of the pool's own making.
pub fn is_of_the_pool(id: &str) -> bool {
    let digits = id.strip_prefix(PREFIX).unwrap_or_default();
    digits.len() == DIGITS && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// VMs in reserve, of whatever kind.
const MAX_RESERVE: usize = 6;
/// A VM that nobody took for this long is let go.
pub const SHELF_LIFE: Duration = Duration::from_secs(600);

/// What a VM in reserve is fit for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Kind {
    /// Template, disk size and processor share.
    pub machine: String,
    /// What it has rehearsed.
    pub rehearsal: Option<Rehearsal>,
}

type Shelves = HashMap<Kind, Vec<(Arc<Watched>, Instant)>>;

/// The VMs in reserve.
#[derive(Default)]
pub struct Reserve {
    shelves: Mutex<Shelves>,
    closed: AtomicBool,
    /// Held while one is being made: one at a time, so that creates are not slowed down.
    pub making: tokio::sync::Mutex<()>,
}

impl Reserve {
    /// From now on there is room for none: the daemon ends.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    /// Whether there is room for one more of a kind.
    pub fn has_room(&self, kind: &Kind, wanted: usize) -> bool {
        !self.closed.load(Ordering::Relaxed) && self.count(kind) < wanted && self.total() < MAX_RESERVE
    }

    /// A VM of this kind that still runs.
    pub fn take(&self, kind: &Kind) -> Option<Arc<Watched>> {
        let mut ready = self.lock();
        let shelf = ready.get_mut(kind)?;
        while let Some((vm, _)) = shelf.pop() {
            if vm.is_alive() {
                return Some(vm);
            }
        }
        None
    }

    /// Adds one.
    pub fn add(&self, kind: Kind, vm: Arc<Watched>) {
        self.lock().entry(kind).or_default().push((vm, Instant::now()));
    }

    fn count(&self, kind: &Kind) -> usize {
        self.lock().get(kind).map_or(0, Vec::len)
    }

    fn total(&self) -> usize {
        self.lock().values().map(Vec::len).sum()
    }

    /// Takes out those that are older than `age`.
    pub fn older_than(&self, age: Duration) -> Vec<Arc<Watched>> {
        let mut old = Vec::new();
        for shelf in self.lock().values_mut() {
            let (gone, kept) = std::mem::take(shelf).into_iter().partition(|(_, since)| since.elapsed() >= age);
            *shelf = kept;
            old.extend(gone.into_iter().map(|(vm, _): (Arc<Watched>, Instant)| vm));
        }
        old
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Shelves> {
        self.shelves.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pools_ids_are_known_from_all_others() {
        assert!(is_of_the_pool(&new_id()));
        for other in
            ["", "reserve-", "reserve-mine", "reserve-00000000000000000", "cbbe1029-0000-4000-8000-000000000000"]
        {
            assert!(!is_of_the_pool(other), "{other}");
        }
    }
}
