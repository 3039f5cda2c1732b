//! Files and directories that are open, by the numbers that were given out for them.

use std::{
    collections::HashMap,
    fs::File,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use nix::sys::resource::{Resource, getrlimit};
use rustix::io::Errno;

use crate::MAX_HANDLES;

/// Fewest open files that a sandbox with mounts can work with.
const MIN_HANDLES: usize = 64;
/// Share of this process's descriptors that one sandbox's mounts may hold: 1 in so many.
const SHARE: usize = 64;

/// Limits how many descriptors of this process all mounts of one sandbox hold together.
#[derive(Debug)]
pub struct HandleBudget {
    limit: usize,
    used: AtomicUsize,
}

impl HandleBudget {
    /// The budget of one sandbox in a process that may have `descriptors` open.
    pub fn new(descriptors: usize) -> Arc<Self> {
        Arc::new(Self { limit: Self::limit(descriptors), used: AtomicUsize::new(0) })
    }

    /// The budget of one sandbox in this process.
    pub fn of_this_process() -> Arc<Self> {
        Self::new(descriptors())
    }

    /// How many sandboxes with mounts this process has room for, so that half of its descriptors stays for other uses.
    pub fn sandboxes() -> usize {
        descriptors() / 2 / Self::limit(descriptors())
    }

    fn limit(descriptors: usize) -> usize {
        (descriptors / SHARE).clamp(MIN_HANDLES, MAX_HANDLES)
    }

    fn take(self: &Arc<Self>) -> Result<Permit, Errno> {
        let taken = self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| (used < self.limit).then_some(used + 1));
        taken.map(|_| Permit(Arc::clone(self))).map_err(|_| Errno::NFILE)
    }
}

/// How many descriptors this process may have open.
fn descriptors() -> usize {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
    usize::try_from(limit).unwrap_or(usize::MAX)
}

/// One descriptor of a budget; given back on drop.
#[derive(Debug)]
struct Permit(Arc<HandleBudget>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.used.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Something that is open.
#[derive(Debug)]
pub struct Handle {
    /// What.
    pub file: File,
    /// The node it was opened by.
    pub node: u64,
    /// Held while a directory is read: it has one position.
    pub reading: Mutex<()>,
    _permit: Permit,
}

/// All that is open.
#[derive(Debug)]
pub struct Handles {
    all: Mutex<(u64, HashMap<u64, Arc<Handle>>)>,
    budget: Arc<HandleBudget>,
}

impl Handles {
    /// None yet. Numbers begin anywhere, so that those of an earlier daemon mean nothing here.
    pub fn new(budget: Arc<HandleBudget>) -> Self {
        Self { all: Mutex::new((rand::random::<u64>() >> 1, HashMap::new())), budget }
    }

    /// Keeps it and gives it a number.
    pub fn keep(&self, file: File, node: u64) -> Result<u64, Errno> {
        let permit = self.budget.take()?;
        let mut all = self.lock();
        all.0 += 1;
        let number = all.0;
        all.1.insert(number, Arc::new(Handle { file, node, reading: Mutex::default(), _permit: permit }));
        Ok(number)
    }

    /// The one with this number.
    pub fn get(&self, number: u64) -> Option<Arc<Handle>> {
        self.lock().1.get(&number).cloned()
    }

    /// One that was opened by this node: it stands for a file whose name is gone.
    pub fn of(&self, node: u64) -> Option<Arc<Handle>> {
        self.lock().1.values().find(|handle| handle.node == node).cloned()
    }

    /// Closes it.
    pub fn close(&self, number: u64) {
        self.lock().1.remove(&number);
    }

    fn lock(&self) -> MutexGuard<'_, (u64, HashMap<u64, Arc<Handle>>)> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
