//! Where a host name leads: the store tells the region, the region tells the rest.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use heyvm_api::{ApiError, ErrorCode, client::Connection, headers, sandbox::RouteInfo};

use tokio::sync::Semaphore;

use crate::{Cloud, Region};

/// What a region has told of a subdomain counts this long: a port that is unbound or made private is so by then.
const FRESH: Duration = Duration::from_secs(1);
/// Nobody guesses a subdomain before it is bound, so one that no region knows stays unknown.
const FRESH_UNKNOWN: Duration = Duration::from_secs(120);
/// Subdomains that are remembered at a time, of those that lead somewhere and of the others.
const REMEMBERED: usize = 10_000;
/// Subdomains unknown to the store that regions are asked for at a time: clients can make up any number of them.
const UNKNOWN_AT_A_TIME: usize = 16;
/// How long one more waits for its turn.
const TURN: Duration = Duration::from_secs(5);

/// Where a subdomain leads.
#[derive(Debug, Clone)]
pub struct Destination {
    /// The region.
    pub region: String,
    /// What it says.
    pub route: RouteInfo,
}

/// What has just been asked.
pub(crate) struct Recent {
    known: Mutex<HashMap<String, (Instant, Option<Destination>)>>,
    /// Apart, so that made-up subdomains never crowd out those that lead somewhere.
    unknown: Mutex<HashMap<String, Instant>>,
    turns: Semaphore,
}

impl Default for Recent {
    fn default() -> Self {
        Self { known: Mutex::default(), unknown: Mutex::default(), turns: Semaphore::new(UNKNOWN_AT_A_TIME) }
    }
}

impl Recent {
    fn get(&self, subdomain: &str) -> Option<Option<Destination>> {
        let unknown = lock(&self.unknown).get(subdomain).is_some_and(|at| at.elapsed() < FRESH_UNKNOWN);
        if unknown {
            return Some(None);
        }
        let known = lock(&self.known);
        known.get(subdomain).filter(|(at, _)| at.elapsed() < FRESH).map(|(_, found)| found.clone())
    }

    fn put(&self, subdomain: &str, found: Option<Destination>) {
        let mut known = lock(&self.known);
        if known.len() >= REMEMBERED {
            known.retain(|_, (at, _)| at.elapsed() < FRESH);
        }
        if known.len() < REMEMBERED {
            known.insert(subdomain.to_owned(), (Instant::now(), found));
        }
    }

    /// No region knows it.
    fn put_unknown(&self, subdomain: &str) {
        let mut unknown = lock(&self.unknown);
        if unknown.len() >= REMEMBERED {
            unknown.retain(|_, at| at.elapsed() < FRESH_UNKNOWN);
        }
        if unknown.len() >= REMEMBERED {
            unknown.clear();
        }
        unknown.insert(subdomain.to_owned(), Instant::now());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cloud {
    /// Where a subdomain leads; `None` where it leads nowhere. An error where its region is cut off.
    pub async fn destination(&self, subdomain: &str) -> Result<Option<Destination>, ApiError> {
        if let Some(found) = self.recent.get(subdomain) {
            return Ok(found);
        }
        let known = self.store.region_behind(subdomain).await?;
        let found = match known.as_deref().map(|name| self.region_of(name)) {
            Some(region) => ask(region?, subdomain).await?,
            // Bound while no server looked: a region that knows it says so.
            None => {
                let Ok(Ok(_turn)) = tokio::time::timeout(TURN, self.recent.turns.acquire()).await else {
                    return Err(ApiError::new(
                        ErrorCode::RegionUnavailable,
                        "too many unknown addresses are asked for",
                    )
                    .hint("Try again in a moment."));
                };
                let all = self.regions.iter().map(|region| ask(region, subdomain));
                let answers = futures::future::join_all(all).await;
                if answers.iter().all(|answer| matches!(answer, Ok(None))) {
                    self.recent.put_unknown(subdomain);
                    return Ok(None);
                }
                answers.into_iter().flatten().flatten().next()
            }
        };
        self.recent.put(subdomain, found.clone());
        Ok(found)
    }

    /// A byte stream to a port of a sandbox, wherever it is.
    pub async fn connect(&self, sandbox: &str, port: u16) -> Result<Box<dyn Connection>, ApiError> {
        let row = self.store.placement(sandbox).await?.ok_or_else(|| {
            ApiError::new(ErrorCode::SandboxNotFound, "there is no such sandbox").hint("heyvm list shows them")
        })?;
        let place = self.place(row)?;
        let opened = place.client()?.upgrade(&place.path(&format!("/ports/{port}")), headers::PORT_STREAM).await;
        opened.map_err(|error| place.region.explain(error))
    }
}

async fn ask(region: &Region, subdomain: &str) -> Result<Option<Destination>, ApiError> {
    match region.ask::<RouteInfo>(headers::EVERY_ACCOUNT, &format!("/routes/{subdomain}")).await {
        Ok(route) => Ok(Some(Destination { region: region.name.clone(), route })),
        Err(error)
            if matches!(error.code, ErrorCode::NotFound | ErrorCode::SandboxNotFound | ErrorCode::PortNotBound) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_up_subdomains_crowd_no_one_out() {
        let recent = Recent::default();
        for number in 0..3 * REMEMBERED {
            recent.put_unknown(&format!("made-up-{number}"));
        }
        assert!(lock(&recent.unknown).len() <= REMEMBERED);
        let last = format!("made-up-{}", 3 * REMEMBERED - 1);
        assert!(matches!(recent.get(&last), Some(None)));
        let route = RouteInfo {
            sandbox_id: "a".into(),
            port: 80,
            is_public: true,
            account_id: String::new(),
            response_timeout_seconds: None,
        };
        recent.put("real", Some(Destination { region: "US".into(), route }));
        assert!(matches!(recent.get("real"), Some(Some(_))));
    }
}
