//! The guest kernel's command line.

use std::{
    sync::OnceLock,
    time::{Duration, Instant},
};

use super::accel::Acceleration;

/// Between the two readings that give the rate. They are exact to [`EXACT`], so that this is good to some millionths.
const MEASURED_FOR: Duration = Duration::from_millis(100);
/// A reading of clock and counter that took no longer: nothing else ran in between.
const EXACT: Duration = Duration::from_nanos(500);
/// Readings that are tried for one that is exact. Then the best one is taken.
const TRIES: u32 = 10_000;

/// What the kernel is told at boot.
pub fn command_line(acceleration: Acceleration) -> String {
    let always = "console=ttyS0 quiet panic=-1 reboot=t random.trust_cpu=on";
    match acceleration {
        Acceleration::Kvm => format!("{always} mitigations=auto"),
        Acceleration::Tcg => format!("{always} {}", translated()),
    }
}

/// Under TCG the guest's kernel guards against nothing that matters, and some guards cost the most:
/// QEMU keeps translated code by its virtual address, so with address space randomization every program that starts is
/// translated again (a command then takes three times as long). And the kernel cannot always measure the clock rate
/// against a timer that another thread emulates: it then waits for ticks that never come. So it is given the rate.
/// On a busy host it also distrusts the counter, because the timer that it is compared with comes late, and counts its own
/// ticks instead, of which it misses most: so it is told that the counter is reliable, which here it is.
/// A huge page that a short-lived program touches once is cleared whole.
fn translated() -> String {
    let clock = tsc_khz().map(|khz| format!(" tsc_early_khz={khz}")).unwrap_or_default();
    format!("mitigations=off norandmaps init_on_alloc=0 preempt=none transparent_hugepage=madvise tsc=reliable{clock}")
}

/// Rate of the host's time stamp counter, which is the guest's, too, under translation.
#[cfg(target_arch = "x86_64")]
#[expect(clippy::disallowed_methods, reason = "what starts a QEMU runs on threads that may wait")]
fn tsc_khz() -> Option<u64> {
    static RATE: OnceLock<u64> = OnceLock::new();
    let khz = *RATE.get_or_init(|| {
        let began = reading();
        std::thread::sleep(MEASURED_FOR);
        let ended = reading();
        let (time, ticks) = (ended.0.duration_since(began.0).as_nanos(), ended.1.wrapping_sub(began.1));
        u64::try_from(u128::from(ticks) * 1_000_000 / time.max(1)).unwrap_or(0)
    });
    (khz > 0).then_some(khz)
}

/// The time, and what the counter showed then: the best of several, for a busy host lets others run between the two.
#[cfg(target_arch = "x86_64")]
fn reading() -> (Instant, u64) {
    let mut best = (Duration::MAX, (Instant::now(), 0));
    for _ in 0..TRIES {
        let (before, ticks, after) = (Instant::now(), counter(), Instant::now());
        let took = after.duration_since(before);
        if took < best.0 {
            best = (took, (before + took / 2, ticks));
        }
        if took <= EXACT {
            break;
        }
    }
    best.1
}

#[cfg(target_arch = "x86_64")]
fn counter() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and Linux lets programs use it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

#[cfg(not(target_arch = "x86_64"))]
fn tsc_khz() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_rate_is_plausible() {
        let khz = tsc_khz().unwrap();
        assert!((500_000..10_000_000).contains(&khz), "{khz} kHz");
        assert!(command_line(Acceleration::Tcg).contains(&format!("tsc=reliable tsc_early_khz={khz}")));
    }

    #[test]
    fn randomization_is_given_up_under_translation_alone() {
        assert!(command_line(Acceleration::Tcg).contains("norandmaps"));
        assert!(!command_line(Acceleration::Kvm).contains("norandmaps"));
    }
}
