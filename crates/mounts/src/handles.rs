//! Files and directories that are open, by the numbers that were given out for them.

use std::{
    collections::HashMap,
    fs::File,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::io::Errno;

use crate::MAX_HANDLES;

/// Something that is open.
#[derive(Debug)]
pub struct Handle {
    /// What.
    pub file: File,
    /// The node it was opened by.
    pub node: u64,
    /// Held while a directory is read: it has one position.
    pub reading: Mutex<()>,
}

/// All that is open.
#[derive(Debug)]
pub struct Handles {
    all: Mutex<(u64, HashMap<u64, Arc<Handle>>)>,
}

impl Handles {
    /// None yet. Numbers begin anywhere, so that those of an earlier daemon mean nothing here.
    pub fn new() -> Self {
        Self { all: Mutex::new((rand::random::<u64>() >> 1, HashMap::new())) }
    }

    /// Keeps it and gives it a number.
    pub fn keep(&self, file: File, node: u64) -> Result<u64, Errno> {
        let mut all = self.lock();
        if all.1.len() >= MAX_HANDLES {
            return Err(Errno::NFILE);
        }
        all.0 += 1;
        let number = all.0;
        all.1.insert(number, Arc::new(Handle { file, node, reading: Mutex::default() }));
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
