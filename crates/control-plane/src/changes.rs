//! Which sandboxes have changed since when: lists of changes alone are made from it.

use std::{
    fmt,
    str::FromStr,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

/// A place in the order of changes of one run of the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Revision {
    /// Which run of the daemon.
    run: u32,
    /// How many changes it had seen.
    number: u64,
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}-{}", self.run, self.number)
    }
}

impl FromStr for Revision {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (run, number) = text.split_once('-').ok_or(())?;
        Ok(Self { run: u32::from_str_radix(run, 16).map_err(drop)?, number: number.parse().map_err(drop)? })
    }
}

/// Counts the changes of one run of the daemon.
pub(crate) struct Changes {
    run: u32,
    last: Mutex<u64>,
}

impl Default for Changes {
    fn default() -> Self {
        Self { run: rand::random(), last: Mutex::default() }
    }
}

impl Changes {
    /// Gives a sandbox that has just changed the next number.
    pub fn stamp(&self, sandbox: &AtomicU64) {
        let mut last = self.last.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *last += 1;
        // Under the lock: whoever sees this number as the last one finds it in the sandbox, too.
        sandbox.store(*last, Ordering::Relaxed);
    }

    /// Where the order has come to. What changes later has a larger number.
    pub fn now(&self) -> Revision {
        self.at(*self.last.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }

    /// A place in this run's order.
    pub fn at(&self, number: u64) -> Revision {
        Revision { run: self.run, number }
    }

    /// The number after which changes are asked for; none where everything counts as changed.
    pub fn number(&self, since: Option<Revision>) -> Option<u64> {
        since.filter(|since| since.run == self.run).map(|since| since.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revision_of_another_run_means_everything() {
        let (changes, sandbox) = (Changes::default(), AtomicU64::default());
        changes.stamp(&sandbox);
        let now: Revision = changes.now().to_string().parse().unwrap();
        assert_eq!((changes.number(Some(now)), sandbox.load(Ordering::Relaxed)), (Some(1), 1));
        let other = Revision { run: changes.run ^ 1, number: 1 };
        assert_eq!(changes.number(Some(other)), None);
        assert!("x".parse::<Revision>().is_err() && "1-".parse::<Revision>().is_err());
    }
}
