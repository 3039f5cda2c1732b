//! The control plane of a cloud: which account's sandbox runs in which region, and whether it may. Knows no HTTP routes:
//! `heyvm-server` calls it, it calls the regions' daemons over their API.
//!
//! - [`regions`]: the daemons, and the way to them.  [`tls`]: who we are to them, and they to us; [`pem`]: its files.
//! - [`placements`]: whose sandbox is where.  [`create`]: a new one, from its place to its first answer.
//! - [`lifecycle`]: what may be done with one.  [`quotas`]: how much an account may have.
//! - [`routes`]: where a host name leads.  [`sync`]: what the regions run, written down for the time they are cut off.
//!
//! Any number of servers may share one store: none keeps state of its own.
#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test may block its own thread"))]
#![forbid(unsafe_code)]

mod archives;
mod create;
mod lifecycle;
pub mod pem;
mod placements;
mod quotas;
mod regions;
mod routes;
mod sync;
#[cfg(test)]
mod tests;
mod tls;

use std::sync::Arc;

use heyvm_api::{
    ApiError, ErrorCode,
    sandbox::{Endpoint, SandboxInfo},
};
use heyvm_store::{Store, placements::PlacementRow};

pub use placements::{ListQuery, Place};
pub use quotas::Quotas;
pub use regions::{Region, RegionConfig, Way};
pub use routes::Destination;
pub use tls::{Error as TlsError, client_config};

/// What the cloud is told at its start.
#[derive(Debug, Clone)]
pub struct Config {
    /// The regions; the first is the default.
    pub regions: Vec<RegionConfig>,
    /// What accounts may have that have no limits of their own.
    pub quotas: Quotas,
    /// Host names of sandboxes end with a dot and this.
    pub base_domain: String,
    /// `http` or `https`.
    pub url_scheme: String,
    /// Port in URLs; left out where it is the scheme's own.
    pub url_port: u16,
}

/// The cloud. One per server; the state is in the store and in the regions.
pub struct Cloud {
    store: Store,
    storage: heyvm_archives::Storage,
    regions: Vec<Arc<Region>>,
    quotas: Quotas,
    urls: Urls,
    recent: routes::Recent,
}

/// How a subdomain becomes a URL.
struct Urls {
    base_domain: String,
    scheme: String,
    port: String,
}

impl Cloud {
    /// A cloud over `store`, whose tables are up to date. Nothing is sent to a region yet.
    pub fn open(config: Config, store: Store, storage: heyvm_archives::Storage) -> Result<Arc<Self>, ApiError> {
        let regions =
            config.regions.iter().map(|each| Region::new(each).map(Arc::new)).collect::<Result<Vec<_>, _>>()?;
        if regions.is_empty() {
            return Err(ApiError::new(ErrorCode::InvalidArgument, "there is no region").hint("name one in [[region]]"));
        }
        let port = match (config.url_scheme.as_str(), config.url_port) {
            ("http", 80) | ("https", 443) => String::new(),
            (_, port) => format!(":{port}"),
        };
        let urls = Urls { base_domain: config.base_domain, scheme: config.url_scheme, port };
        Ok(Arc::new(Self { store, storage, regions, quotas: config.quotas, urls, recent: routes::Recent::default() }))
    }

    /// What a region tells of a sandbox, as this cloud tells of it: with the names that region and archive have here, and
    /// our URLs.
    fn told(&self, row: &PlacementRow, info: SandboxInfo) -> SandboxInfo {
        let urls = info.urls.into_iter().map(|endpoint| self.url(endpoint)).collect();
        SandboxInfo { region: row.region.clone(), archive_id: row.archive_id.clone(), urls, account_id: None, ..info }
    }

    /// A region's endpoint with the URL it has here.
    fn url(&self, endpoint: Endpoint) -> Endpoint {
        let hostname = format!("{}.{}", endpoint.subdomain, self.urls.base_domain);
        let url = format!("{}://{hostname}{}", self.urls.scheme, self.urls.port);
        // The region's loopback is not the client's.
        Endpoint { hostname, url, local_url: None, ..endpoint }
    }
}
