//! The interval timer of the first PCs (Intel 8254), stopped: left as the machine starts it, it makes the host's emulation of
//! it wake some thirty times a second for interrupts that no kernel here waits for.

use std::{fs, io};

use nix::{errno::Errno, libc};

/// Its ports: three counters and a command register.
const FIRST_PORT: u16 = 0x40;
const PORTS: u64 = 4;
const COMMAND: u16 = 0x43;
/// Counter 0, both bytes, mode 0: it counts down once and rests.
const ONE_SHOT: u8 = 0x30;
/// The kernel's timer, of which the name begins with "lapic" when it is the processor's own.
const TIMER: &str = "/sys/devices/system/clockevents/clockevent0/current_device";

/// Stops it, unless the kernel counts on it.
pub fn stop() -> io::Result<()> {
    if !fs::read_to_string(TIMER)?.starts_with("lapic") {
        return Ok(());
    }
    // SAFETY: lets this thread use these four ports; no memory is touched.
    Errno::result(unsafe { libc::ioperm(u64::from(FIRST_PORT), PORTS, 1) })?;
    for (port, value) in [(COMMAND, ONE_SHOT), (FIRST_PORT, 0), (FIRST_PORT, 0)] {
        write(port, value);
    }
    // SAFETY: as above.
    Errno::result(unsafe { libc::ioperm(u64::from(FIRST_PORT), PORTS, 0) })?;
    Ok(())
}

#[cfg(target_arch = "x86_64")]
fn write(port: u16, value: u8) {
    // SAFETY: the thread may use the port; the instruction touches no memory.
    unsafe { std::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}
