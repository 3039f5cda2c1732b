//! The guest's wall clock: read, set, and brought back to the host's.

use std::{fs, io, time::Duration};

use heyvm_agent_protocol::v1::{ClockReply, ClockRequest};
use nix::{
    libc,
    sys::time::TimeSpec,
    time::{ClockId, clock_gettime, clock_settime},
};

/// A smaller correction is slewed: at 500 millionths, the kernel's rate, it is done within a minute, and no program sees
/// time go backwards. A larger one would leave the clock wrong for minutes, so it is a step.
const SLEW_AT_MOST: Duration = Duration::from_millis(30);
const NANOS: i64 = 1_000_000_000;

/// Corrects the clock where it is asked for, and reads it.
pub fn answer(request: ClockRequest) -> io::Result<ClockReply> {
    if request.adjust_ns != 0 {
        adjust(request.adjust_ns)?;
    }
    let now = clock_gettime(ClockId::CLOCK_REALTIME)?;
    Ok(ClockReply { unix_time_ns: now.tv_sec() * NANOS + now.tv_nsec() })
}

/// Sets the clock, whatever it showed before.
pub fn set(unix_time_ns: i64) -> nix::Result<()> {
    let now = Duration::from_nanos(u64::try_from(unix_time_ns).unwrap_or(0));
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(now))
}

/// What the kernel counts time with.
pub fn source() -> String {
    let name = fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    name.unwrap_or_default().trim().to_owned()
}

fn adjust(by_ns: i64) -> nix::Result<()> {
    let mut change = correction(by_ns);
    // SAFETY: the kernel reads and writes this structure alone.
    nix::errno::Errno::result(unsafe { libc::adjtimex(&raw mut change) }).map(drop)
}

fn correction(by_ns: i64) -> libc::timex {
    // SAFETY: all-zero is a valid timex, one that changes nothing.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    if by_ns.unsigned_abs() <= SLEW_AT_MOST.as_nanos() as u64 {
        change.modes = libc::ADJ_OFFSET_SINGLESHOT;
        change.offset = by_ns / 1000;
    } else {
        // What a slew before this one has left undone is part of the new correction.
        change.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
        change.time.tv_sec = by_ns.div_euclid(NANOS);
        change.time.tv_usec = by_ns.rem_euclid(NANOS);
    }
    change
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_corrections_are_slewed_and_large_ones_are_steps() {
        let small = correction(-20_000_000);
        assert_eq!((small.modes, small.offset), (libc::ADJ_OFFSET_SINGLESHOT, -20_000));
        let back = correction(-1_250_000_000);
        assert_eq!(back.modes, libc::ADJ_SETOFFSET | libc::ADJ_NANO);
        // The kernel wants nanoseconds that are not negative.
        assert_eq!((back.time.tv_sec, back.time.tv_usec), (-2, 750_000_000));
        let ahead = correction(423 * NANOS);
        assert_eq!((ahead.time.tv_sec, ahead.time.tv_usec), (423, 0));
    }

    #[test]
    fn the_clock_is_read() {
        let before = std::time::SystemTime::now();
        let read = answer(ClockRequest::default()).unwrap().unix_time_ns;
        let since = before.duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as i64;
        assert!(read >= since, "{read} is before {since}");
    }
}
