//! The guest kernel's command line.

use std::{
    sync::OnceLock,
    time::{Duration, Instant},
};

use super::accel::Acceleration;

/// Longer is more exact; this is good to some ten millionths.
const MEASURED_FOR: Duration = Duration::from_millis(20);

/// What the kernel is told at boot.
pub fn command_line(acceleration: Acceleration) -> String {
    let always = "console=ttyS0 quiet panic=-1 reboot=t random.trust_cpu=on";
    match acceleration {
        Acceleration::Kvm => format!("{always} mitigations=auto"),
        Acceleration::Tcg => format!("{always} {}", translated()),
    }
}

/// Under translation the guest's kernel guards against nothing that matters, and some guards cost the most:
/// QEMU keeps translated code by its virtual address, so with address space randomization every program that starts is
/// translated anew (a command then takes three times as long). And the kernel cannot always measure the clock rate
/// against a timer that another thread emulates: it then waits for ticks that never come. So it is told the rate.
/// A huge page that a short-lived program touches once is cleared whole.
fn translated() -> String {
    let clock = tsc_khz().map(|khz| format!(" tsc_early_khz={khz}")).unwrap_or_default();
    format!("mitigations=off norandmaps init_on_alloc=0 preempt=none transparent_hugepage=madvise{clock}")
}

/// Rate of the host's time stamp counter, which is the guest's, too, under translation.
#[cfg(target_arch = "x86_64")]
fn tsc_khz() -> Option<u64> {
    static RATE: OnceLock<u64> = OnceLock::new();
    let khz = *RATE.get_or_init(|| {
        let began = (Instant::now(), counter());
        std::thread::sleep(MEASURED_FOR);
        let (time, ticks) = (began.0.elapsed().as_nanos(), counter().wrapping_sub(began.1));
        u64::try_from(u128::from(ticks) * 1_000_000 / time.max(1)).unwrap_or(0)
    });
    (khz > 0).then_some(khz)
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
        assert!(command_line(Acceleration::Tcg).contains(&format!("tsc_early_khz={khz}")));
    }

    #[test]
    fn randomization_is_given_up_under_translation_alone() {
        assert!(command_line(Acceleration::Tcg).contains("norandmaps"));
        assert!(!command_line(Acceleration::Kvm).contains("norandmaps"));
    }
}
