//! Where a host name leads: the store tells the region, the region tells the rest.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use heyvm_api::{ApiError, ErrorCode, client::Connection, headers, sandbox::RouteInfo};

use crate::{Cloud, Region};

/// What a region has told of a subdomain counts this long: a port that is unbound or made private is so by then.
const FRESH: Duration = Duration::from_secs(1);
/// Subdomains that are remembered at a time.
const REMEMBERED: usize = 10_000;

/// Where a subdomain leads.
#[derive(Debug, Clone)]
pub struct Destination {
    /// The region.
    pub region: String,
    /// What it says.
    pub route: RouteInfo,
}

/// What has just been asked.
#[derive(Default)]
pub(crate) struct Recent(Mutex<HashMap<String, (Instant, Option<Destination>)>>);

impl Recent {
    fn get(&self, subdomain: &str) -> Option<Option<Destination>> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(subdomain).filter(|(at, _)| at.elapsed() < FRESH).map(|(_, found)| found.clone())
    }

    fn put(&self, subdomain: &str, found: Option<Destination>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= REMEMBERED {
            known.retain(|_, (at, _)| at.elapsed() < FRESH);
        }
        if known.len() < REMEMBERED {
            known.insert(subdomain.to_owned(), (Instant::now(), found));
        }
    }
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
            // Bound while no server looked: whoever knows it, says so.
            None => {
                let all = self.regions.iter().map(|region| ask(region, subdomain));
                futures::future::join_all(all).await.into_iter().flatten().flatten().next()
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
