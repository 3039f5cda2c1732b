//! Guests' wall clocks, kept by the host's.
//!
//! A guest counts time by itself: off by a few millionths where all goes well, and by seconds after the host slept or its
//! clock was set. So the host asks every guest for its time now and then, and at once when its own clock jumps:
//!
//! ```text
//! wait (or the host's clock jumps) ──▶ measure ──▶ off by more than the measurement's error? ──▶ correct ──┐
//!   ▲                                                                                                      │
//!   └──────────────────────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//! Only differences travel: how late a message arrives does not matter.

use std::{
    io,
    os::fd::OwnedFd,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use heyvm_agent_protocol::v1::ClockRequest;
use nix::sys::{
    time::TimeSpec,
    timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
};
use tokio::io::unix::AsyncFd;

use crate::{AgentConnection, Error, agent::unreachable_agent};

/// A new sandbox is left alone for so long: its first command comes now.
const FIRST: Duration = Duration::from_secs(3);
/// Between two looks at a clock that is right; at first more often.
const STEADY: Duration = Duration::from_secs(60);
/// A call that takes longer says nothing about the time.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);
/// Less is not worth a correction, in nanoseconds.
const TOLERANCE_NS: i64 = 2_000_000;
/// A measurement as exact as this is not repeated, in nanoseconds.
const EXACT_NS: i64 = 10_000_000;
/// Measurements at most; a busy guest answers late, and the quickest answer tells most.
const SAMPLES: u32 = 5;

/// How far a guest's clock is from the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offset {
    /// Nanoseconds that the guest is behind; negative when it is ahead.
    pub behind_ns: i64,
    /// Half of the time that the answer took: the true value is no further away.
    pub error_ns: i64,
}

impl Offset {
    /// From the guest's time and the host's before and after it was asked for.
    fn new(guest_ns: i64, before_ns: i64, took: Duration) -> Self {
        let error_ns = i64::try_from(took.as_nanos() / 2).unwrap_or(i64::MAX);
        Self { behind_ns: before_ns.saturating_add(error_ns).saturating_sub(guest_ns), error_ns }
    }

    /// Nanoseconds to add to the guest's clock; 0 when it is right as far as can be told.
    fn correction(self) -> i64 {
        if self.behind_ns.saturating_abs() > TOLERANCE_NS.max(self.error_ns) { self.behind_ns } else { 0 }
    }
}

/// Keeps a guest's clock until this is dropped.
pub async fn keep(agent: AgentConnection) {
    let mut pause = FIRST;
    loop {
        wait(pause).await;
        pause = match correct(&agent, SAMPLES).await {
            Ok(0) => (pause * 4).min(STEADY),
            Ok(_) => FIRST,
            // A guest that is on its way out, or one that is too busy: there is a next time.
            Err(error) => {
                tracing::debug!(%error, "a guest's clock could not be read");
                STEADY
            }
        };
    }
}

/// Brings a guest's clock to the host's, measured up to so many times; by how many nanoseconds it was changed.
pub async fn correct(agent: &AgentConnection, samples: u32) -> Result<i64, Error> {
    let correction = measure(agent, samples).await?.correction();
    if correction != 0 {
        ask(agent, correction).await?;
    }
    Ok(correction)
}

async fn measure(agent: &AgentConnection, samples: u32) -> Result<Offset, Error> {
    let mut best = ask(agent, 0).await?;
    for _ in 1..samples {
        if best.error_ns <= EXACT_NS {
            break;
        }
        best = std::cmp::min_by_key(best, ask(agent, 0).await?, |offset| offset.error_ns);
    }
    Ok(best)
}

async fn ask(agent: &AgentConnection, adjust_ns: i64) -> Result<Offset, Error> {
    let mut client = agent.client().await?;
    let (before_ns, began) = (now_ns(), Instant::now());
    let answer = tokio::time::timeout(ANSWER_DEADLINE, client.clock(ClockRequest { adjust_ns })).await;
    let took = began.elapsed();
    let reply = answer.map_err(|_| Error::Unreachable("it did not tell its time".into()))?;
    let guest_ns = reply.map_err(|status| unreachable_agent(&status))?.into_inner().unix_time_ns;
    Ok(Offset::new(guest_ns, before_ns, took))
}

/// The host's time, as guests are given it.
pub fn now_ns() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_nanos()).unwrap_or_default()
}

/// Waits for so long, or until the host's clock jumps: it was set, or the host woke up.
async fn wait(pause: Duration) {
    let jumped = async {
        match watch_clock(pause) {
            Ok(timer) => drop(timer.readable().await),
            // Then a jump is noticed at the next look.
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = jumped => {}
        () = tokio::time::sleep(pause) => {}
    }
}

/// A timer that can be read when the clock reaches that time, or jumps.
fn watch_clock(pause: Duration) -> io::Result<AsyncFd<OwnedFd>> {
    let timer = TimerFd::new(ClockId::CLOCK_REALTIME, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)?;
    let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default() + pause;
    let flags = TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET;
    timer.set(Expiration::OneShot(TimeSpec::from_duration(at)), flags)?;
    // SAFETY: the AsyncFd owns the descriptor, which is open until both are dropped together.
    unsafe { AsyncFd::register(OwnedFd::from(timer)) }.map_err(|error| error.into_parts().1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLIS: i64 = 1_000_000;

    #[test]
    fn guest_behind_is_corrected_by_the_difference() {
        // Asked at 1000 ms, answered within 20 ms: the guest's 500 ms were read at 1010 ms.
        let offset = Offset::new(500 * MILLIS, 1000 * MILLIS, Duration::from_millis(20));
        assert_eq!(offset, Offset { behind_ns: 510 * MILLIS, error_ns: 10 * MILLIS });
        assert_eq!(offset.correction(), 510 * MILLIS);
    }

    #[test]
    fn guest_ahead_is_corrected_backwards() {
        let offset = Offset::new(3000 * MILLIS, 1000 * MILLIS, Duration::from_millis(2));
        assert_eq!(offset.correction(), -1999 * MILLIS);
    }

    #[test]
    fn differences_within_the_measurements_error_change_nothing() {
        let late = Offset::new(1000 * MILLIS, 1000 * MILLIS, Duration::from_millis(600));
        assert_eq!((late.behind_ns, late.correction()), (300 * MILLIS, 0));
        let small = Offset::new(1000 * MILLIS, 1001 * MILLIS, Duration::from_millis(0));
        assert_eq!(small.correction(), 0);
    }

    #[tokio::test]
    async fn wait_ends_when_its_time_has_come() {
        tokio::time::timeout(Duration::from_secs(120), wait(Duration::from_millis(20))).await.unwrap();
    }
}
