//! The guest's own view of its load.

use std::fs;

use heyvm_agent_protocol::v1::MetricsReply;
use nix::sys::statvfs::statvfs;

use crate::{boot::SANDBOX_CGROUP, oom};

/// Reads it all.
pub fn read() -> MetricsReply {
    let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let meminfo = text("/proc/meminfo");
    let (disk_total, disk_used) = disk();
    let loadavg = text("/proc/loadavg");
    let uptime = text("/proc/uptime");
    let processes = text(&format!("{SANDBOX_CGROUP}/pids.current")).trim().parse();
    MetricsReply {
        memory_total: kib(&meminfo, "MemTotal:") * 1024,
        memory_available: kib(&meminfo, "MemAvailable:") * 1024,
        disk_total,
        disk_used,
        load1: first(&loadavg),
        processes: processes.unwrap_or(0),
        uptime_ms: (first(&uptime) * 1000.0) as u64,
        oom_kills: oom::count(),
    }
}

fn disk() -> (u64, u64) {
    // The overlay tells of the disk that it writes to.
    let Ok(stat) = statvfs("/") else { return (0, 0) };
    let bytes = |blocks: u64| blocks * stat.fragment_size();
    (bytes(stat.blocks()), bytes(stat.blocks() - stat.blocks_free().min(stat.blocks())))
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
    fn figures_are_found() {
        let meminfo = "MemTotal:        1011064 kB\nMemFree: 1 kB\nMemAvailable:     906164 kB\n";
        assert_eq!(kib(meminfo, "MemAvailable:"), 906_164);
        assert_eq!(kib(meminfo, "Swap:"), 0);
        assert!((first("0.25 0.10 0.05 1/80 99\n") - 0.25).abs() < 1e-9);
    }
}
