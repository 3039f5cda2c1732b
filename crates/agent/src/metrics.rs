//! The guest's own view of its load.

use std::fs;

use heyvm_agent_protocol::v1::MetricsReply;
use nix::sys::statvfs::{Statvfs, statvfs};

use crate::{boot::SANDBOX_CGROUP, oom};

/// Reads it all.
pub fn read() -> MetricsReply {
    let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let meminfo = text("/proc/meminfo");
    // The overlay tells of the disk that it writes to.
    let disk = statvfs("/").map(Disk::of).unwrap_or_default();
    let loadavg = text("/proc/loadavg");
    let uptime = text("/proc/uptime");
    let processes = text(&format!("{SANDBOX_CGROUP}/pids.current")).trim().parse();
    MetricsReply {
        memory_total: kib(&meminfo, "MemTotal:") * 1024,
        memory_available: kib(&meminfo, "MemAvailable:") * 1024,
        disk_total: disk.total,
        disk_used: disk.used,
        load1: first(&loadavg),
        processes: processes.unwrap_or(0),
        uptime_ms: (first(&uptime) * 1000.0) as u64,
        oom_kills: oom::count(),
        inodes_total: disk.inodes_total,
        inodes_free: disk.inodes_free,
    }
}

/// Bytes and inodes; all 0 where it cannot be looked at.
#[derive(Default)]
struct Disk {
    total: u64,
    used: u64,
    inodes_total: u64,
    inodes_free: u64,
}

impl Disk {
    fn of(stat: Statvfs) -> Self {
        let bytes = |blocks: u64| blocks * stat.fragment_size();
        Self {
            total: bytes(stat.blocks()),
            // What the file system keeps back for itself is as good as used.
            used: bytes(stat.blocks() - stat.blocks_available().min(stat.blocks())),
            inodes_total: stat.files(),
            inodes_free: stat.files_free(),
        }
    }
}

fn kib(meminfo: &str, name: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.split_ascii_whitespace().next()?.parse().ok()).unwrap_or(0)
}

fn first(line: &str) -> f64 {
    line.split_ascii_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_is_told_with_its_inodes() {
        let disk = Disk::of(statvfs("/proc/self").unwrap());
        assert_eq!((disk.total, disk.used), (0, 0), "/proc has none");
        let disk = Disk::of(statvfs("/").unwrap());
        assert!(disk.used <= disk.total && disk.inodes_free <= disk.inodes_total && disk.total > 0);
    }

    #[test]
    fn figures_are_found() {
        let meminfo = "MemTotal:        1011064 kB\nMemFree: 1 kB\nMemAvailable:     906164 kB\n";
        assert_eq!(kib(meminfo, "MemAvailable:"), 906_164);
        assert_eq!(kib(meminfo, "Swap:"), 0);
        assert!((first("0.25 0.10 0.05 1/80 99\n") - 0.25).abs() < 1e-9);
    }
}
