//! How often one may try to log in: per e-mail address, and per network address. Each server counts for itself.

use std::{
    net::{IpAddr, Ipv6Addr},
    num::NonZeroU32,
};

use governor::{
    DefaultKeyedRateLimiter, Quota, RateLimiter,
    clock::{Clock, DefaultClock},
};
use heyvm_api::{ApiError, ErrorCode};

/// A network address stands for more people than an e-mail address: an office, a build farm.
const PER_ADDRESS: NonZeroU32 = NonZeroU32::MIN.saturating_add(4);

/// Attempts so far. Those that no longer count are forgotten by [`Limits::forget`].
pub struct Limits {
    emails: DefaultKeyedRateLimiter<String>,
    addresses: DefaultKeyedRateLimiter<IpAddr>,
    clock: DefaultClock,
}

impl Limits {
    /// So many attempts at once and per minute.
    pub fn new(per_minute: NonZeroU32) -> Self {
        Self {
            emails: RateLimiter::keyed(Quota::per_minute(per_minute)),
            addresses: RateLimiter::keyed(Quota::per_minute(per_minute.saturating_mul(PER_ADDRESS))),
            clock: DefaultClock::default(),
        }
    }

    /// Counts an attempt, or says how long to wait.
    pub fn admit(&self, email: &str, from: IpAddr) -> Result<(), ApiError> {
        let now = self.clock.now();
        let waits = self.addresses.check_key(&network(from)).map_err(|wait| wait.wait_time_from(now));
        waits.and_then(|()| self.emails.check_key(&email.to_owned()).map_err(|wait| wait.wait_time_from(now))).map_err(
            |wait| {
                let seconds = wait.as_secs() + 1;
                ApiError::new(ErrorCode::RateLimited, "too many attempts to log in")
                    .hint(format!("try again in {seconds} s"))
                    .retry_after(seconds)
            },
        )
    }

    /// Forgets what would be allowed by now.
    pub fn forget(&self) {
        self.emails.retain_recent();
        self.addresses.retain_recent();
    }
}

/// One subscriber has a whole /64 of IPv6.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits::new(NonZeroU32::new(3).unwrap())
    }

    #[test]
    fn an_email_address_has_its_attempts_wherever_they_come_from() {
        let limits = limits();
        for n in 0..3 {
            limits.admit("a@b.example", IpAddr::from([10, 0, 0, n])).unwrap();
        }
        let error = limits.admit("a@b.example", IpAddr::from([10, 0, 0, 9])).unwrap_err();
        assert_eq!(error.code, ErrorCode::RateLimited);
        let wait = error.retry_after_seconds.unwrap();
        assert!((15..=21).contains(&wait), "a third of a minute: {wait}");
        assert!(error.hint.unwrap().contains(&format!("{wait} s")));
        limits.admit("c@b.example", IpAddr::from([10, 0, 0, 9])).unwrap();
    }

    #[test]
    fn a_network_has_its_attempts_whoever_is_meant() {
        let limits = limits();
        let from = |host: u16| IpAddr::from([0x2001, 0xdb8, 0, 1, 0, 0, 0, host]);
        for n in 0..15 {
            limits.admit(&format!("{n}@b.example"), from(n)).unwrap();
        }
        assert!(limits.admit("x@b.example", from(99)).is_err());
        limits.admit("x@b.example", IpAddr::from([0x2001, 0xdb8, 0, 2, 0, 0, 0, 1])).unwrap();
    }

    #[test]
    fn an_ipv4_address_counts_the_same_in_either_form() {
        assert_eq!(network("::ffff:10.0.0.1".parse().unwrap()), IpAddr::from([10, 0, 0, 1]));
    }
}
