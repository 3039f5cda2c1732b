//! Ends the largest program when the memory that is in use leaves no room for the programs themselves.
//!
//! Without swap, a kernel that is short of memory gives up pages of programs and reads them again, over and over: on a slow
//! processor nothing else happens for minutes before it calls its out-of-memory killer. The kernel's own remedy
//! (`lru_gen/min_ttl_ms`) looks at the age of pages alone: one program that writes or reads a large file fast makes all of
//! them young, so that it kills everything that runs, and then panics because there is nothing left to kill. This guard
//! looks at what is wrong in truth: programs wait for memory (pressure stall information), and what could be given up
//! (`MemAvailable`, to which written and read files belong) is nearly nothing.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    time::Duration,
};

use nix::libc::O_NONBLOCK;
use tokio::io::Interest;

use crate::{console, descriptor};

const PRESSURE: &str = "/proc/pressure/memory";
/// Microseconds within a second in which no program could go on; the kernel cuts the last byte off.
const TRIGGER: &[u8] = b"full 500000 1000000\0";
/// Less than one in so many parts of the memory is "nearly nothing".
const AVAILABLE_PART: u64 = 20;
/// A killed program has given its memory back after this.
const RECOVERY: Duration = Duration::from_secs(1);

/// Watches for as long as the guest lives. A kernel without pressure stall information kills late.
pub async fn watch() {
    if let Err(error) = watch_pressure().await {
        console::say(format_args!("no guard against thrashing: {error}"));
    }
}

async fn watch_pressure() -> io::Result<()> {
    let mut pressure = File::options().read(true).write(true).custom_flags(O_NONBLOCK).open(PRESSURE)?;
    pressure.write_all(TRIGGER)?;
    let events = descriptor::watch(pressure.into(), Interest::PRIORITY)?;
    loop {
        events.ready(Interest::PRIORITY).await?.clear_ready();
        if is_exhausted(&fs::read_to_string("/proc/meminfo")?) {
            // The kernel's own choice of a victim, counted and logged as any other; it never panics on this way.
            fs::write("/proc/sysrq-trigger", "f")?;
            tokio::time::sleep(RECOVERY).await;
        }
    }
}

fn is_exhausted(meminfo: &str) -> bool {
    let kib = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.split_ascii_whitespace().next()?.parse::<u64>().ok())
    };
    match (kib("MemTotal:"), kib("MemAvailable:")) {
        (Some(total), Some(available)) => available < total / AVAILABLE_PART,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_files_take_can_be_given_up() {
        let meminfo = |available: u64| {
            format!("MemTotal: 500000 kB\nMemFree: 4000 kB\nMemAvailable: {available} kB\nDirty: 90000 kB\n")
        };
        assert!(!is_exhausted(&meminfo(400_000)));
        assert!(is_exhausted(&meminfo(20_000)));
        assert!(!is_exhausted("MemTotal: 500000 kB\n"));
    }
}
