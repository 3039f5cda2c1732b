//! How often one may try to log in, per e-mail address and per network address, and how often an account may call what
//! leaves a row behind each time. Each server counts for itself.

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

/// A call that leaves a row behind each time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Metered {
    /// Tokens for an API key: a session.
    Exchange,
    /// The upload of an archive begins.
    Presign,
}

impl Metered {
    /// So many at once and per minute for an account.
    fn per_minute(self) -> NonZeroU32 {
        match self {
            Self::Exchange => NonZeroU32::MIN.saturating_add(119),
            Self::Presign => NonZeroU32::MIN.saturating_add(239),
        }
    }

    fn shown(self) -> &'static str {
        match self {
            Self::Exchange => "exchanges of API keys",
            Self::Presign => "uploads begun",
        }
    }
}

/// Attempts so far. Those that no longer count are forgotten by [`Limits::forget`].
pub struct Limits {
    emails: DefaultKeyedRateLimiter<String>,
    addresses: DefaultKeyedRateLimiter<IpAddr>,
    exchanges: DefaultKeyedRateLimiter<String>,
    presigns: DefaultKeyedRateLimiter<String>,
    clock: DefaultClock,
}

impl Limits {
    /// So many attempts at once and per minute.
    pub fn new(per_minute: NonZeroU32) -> Self {
        Self {
            emails: RateLimiter::keyed(Quota::per_minute(per_minute)),
            addresses: RateLimiter::keyed(Quota::per_minute(per_minute.saturating_mul(PER_ADDRESS))),
            exchanges: RateLimiter::keyed(Quota::per_minute(Metered::Exchange.per_minute())),
            presigns: RateLimiter::keyed(Quota::per_minute(Metered::Presign.per_minute())),
            clock: DefaultClock::default(),
        }
    }

    /// Counts a call of an account, or says how long to wait.
    pub fn meter(&self, call: Metered, account: &str) -> Result<(), ApiError> {
        let limiter = match call {
            Metered::Exchange => &self.exchanges,
            Metered::Presign => &self.presigns,
        };
        limiter.check_key(&account.to_owned()).map_err(|wait| {
            let seconds = wait.wait_time_from(self.clock.now()).as_secs() + 1;
            let message = format!("more than {} {} a minute for this account", call.per_minute(), call.shown());
            ApiError::new(ErrorCode::RateLimited, message)
                .hint(format!("try again in {seconds} s"))
                .retry_after(seconds)
        })
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
        self.exchanges.retain_recent();
        self.presigns.retain_recent();
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
    fn what_leaves_rows_behind_is_metered_for_each_account() {
        let limits = limits();
        for call in [Metered::Exchange, Metered::Presign] {
            for _ in 0..call.per_minute().get() {
                limits.meter(call, "one").unwrap();
            }
            let error = limits.meter(call, "one").unwrap_err();
            assert_eq!(error.code, ErrorCode::RateLimited);
            assert!(error.retry_after_seconds.is_some() && error.hint.is_some());
            limits.meter(call, "other").unwrap();
        }
    }

    #[test]
    fn an_ipv4_address_counts_the_same_in_either_form() {
        assert_eq!(network("::ffff:10.0.0.1".parse().unwrap()), IpAddr::from([10, 0, 0, 1]));
    }
}
