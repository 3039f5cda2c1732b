//! Limits on pulls from registries: accounts share the host's disk, network, and its standing with registries.

use std::num::NonZeroU32;

use governor::{
    DefaultKeyedRateLimiter, Quota, RateLimiter,
    clock::{Clock, DefaultClock},
};
use heyvm_api::{ApiError, ErrorCode};

use crate::Account;

/// Images on the host's disk, and pulls by accounts.
#[derive(Debug, Clone, Copy)]
pub struct ImageLimits {
    /// Images from registries that no sandbox uses are evicted, least recently used first, while all images together have
    /// more bytes.
    pub budget_bytes: u64,
    /// Pulls of one account in an hour.
    pub pulls_per_hour: NonZeroU32,
}

impl Default for ImageLimits {
    fn default() -> Self {
        Self { budget_bytes: 40 << 30, pulls_per_hour: NonZeroU32::MIN.saturating_add(59) }
    }
}

/// Pulls by account. The operator's are not counted.
pub(crate) struct Pulls {
    limiter: DefaultKeyedRateLimiter<String>,
    clock: DefaultClock,
}

impl Pulls {
    pub fn new(limits: &ImageLimits) -> Self {
        let limiter = RateLimiter::keyed(Quota::per_hour(limits.pulls_per_hour));
        Self { limiter, clock: DefaultClock::default() }
    }

    /// Counts a pull, or says how long to wait.
    pub fn admit(&self, account: &Account) -> Result<(), ApiError> {
        if account.is_owner() {
            return Ok(());
        }
        self.limiter.retain_recent();
        self.limiter.check_key(&account.as_str().to_owned()).map_err(|wait| {
            let seconds = wait.wait_time_from(self.clock.now()).as_secs() + 1;
            ApiError::new(ErrorCode::RateLimited, "this account has pulled too many images within the hour")
                .hint(format!("try again in {seconds} s, or use an image that is here (heyvm images)"))
                .retry_after(seconds)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_pulls_so_many_images_in_an_hour() {
        let few = ImageLimits { pulls_per_hour: NonZeroU32::MIN, ..ImageLimits::default() };
        let pulls = Pulls::new(&few);
        let [ada, bob] = ["ada", "bob"].map(|id| Account::of_cloud(id).unwrap());
        pulls.admit(&ada).unwrap();
        let refused = pulls.admit(&ada).unwrap_err();
        assert_eq!(refused.code, ErrorCode::RateLimited);
        assert!(refused.hint.unwrap().contains("try again in"));
        pulls.admit(&bob).unwrap();
        for _ in 0..10 {
            pulls.admit(&Account::owner()).unwrap();
        }
    }
}
