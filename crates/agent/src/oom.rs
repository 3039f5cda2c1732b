//! Whether the kernel has run out of memory and killed somebody.

use std::sync::atomic::{AtomicU64, Ordering};

/// Remembers how many kills have been accounted for.
#[derive(Default)]
pub struct OomKills {
    seen: AtomicU64,
}

impl OomKills {
    /// Whether there were more since the last time this was asked.
    pub fn grew(&self) -> bool {
        let now = count();
        self.seen.swap(now, Ordering::Relaxed) < now
    }
}

/// Kills since boot.
pub fn count() -> u64 {
    parse(&std::fs::read_to_string("/proc/vmstat").unwrap_or_default())
}

fn parse(vmstat: &str) -> u64 {
    let line = vmstat.lines().find_map(|line| line.strip_prefix("oom_kill "));
    line.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_is_found() {
        assert_eq!(parse("nr_free_pages 7\noom_kill 3\ndrop_pagecache 0\n"), 3);
        assert_eq!(parse("nr_free_pages 7\n"), 0);
    }
}
