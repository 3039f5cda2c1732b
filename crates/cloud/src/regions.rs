//! The regions: heyvm daemons that this server reaches over their API.

use std::{path::PathBuf, time::Duration};

use heyvm_api::{
    ApiError, ErrorCode,
    client::{Client, Page, Remote, Server},
    headers,
};
use serde::de::{DeserializeOwned, IgnoredAny};
use url::Url;

use crate::{Cloud, tls};

/// A daemon has nothing to wait for before it answers a question; one that stays silent for so long is cut off, even
/// where its machine still acknowledges what it is sent.
const ANSWER: Duration = Duration::from_secs(10);

/// One region, as it is configured.
#[derive(Debug, Clone)]
pub struct RegionConfig {
    /// `US`, `EU` or the operator's own word.
    pub name: String,
    /// Where its daemon is.
    pub way: Way,
}

/// The way to a region's daemon.
#[derive(Debug, Clone)]
pub enum Way {
    /// The daemon of this machine: its socket.
    Local(PathBuf),
    /// Over mutual TLS.
    Remote {
        /// `https://HOST:PORT` of its trusted listener.
        url: Url,
        /// PEM files: who may be that daemon, and who we are.
        ca: PathBuf,
        /// Our certificate chain.
        certificate: PathBuf,
        /// Its key.
        key: PathBuf,
    },
}

/// A region and the client that reaches it.
#[derive(Debug)]
pub struct Region {
    /// Its name.
    pub name: String,
    client: Client,
}

impl Region {
    /// Reads the certificates; nothing is sent yet.
    pub fn new(config: &RegionConfig) -> Result<Self, ApiError> {
        let server = match &config.way {
            Way::Local(socket) => Server::Socket(socket.clone()),
            Way::Remote { url, ca, certificate, key } => {
                let tls = tls::client_config(ca, certificate, key).map_err(|error| {
                    ApiError::new(ErrorCode::InvalidArgument, format!("region {}: {error}", config.name))
                        .hint("ca, certificate and key are PEM files that the server may read")
                })?;
                Server::Remote(Remote { url: url.clone(), tls: Some(tls) })
            }
        };
        Ok(Self { name: config.name.clone(), client: Client::new(server) })
    }

    /// A client that asks for `account`; `*` for all of them.
    pub fn client(&self, account: &str) -> Result<Client, ApiError> {
        self.client.clone().for_account(account)
    }

    /// Says whether it can be reached, before anything is promised that it would have to keep.
    pub(crate) async fn reach(&self) -> Result<(), ApiError> {
        self.ask::<IgnoredAny>(headers::EVERY_ACCOUNT, "/health").await.map(drop)
    }

    /// What it answers to a question about an account's sandboxes.
    pub(crate) async fn ask<T: DeserializeOwned>(&self, account: &str, path: &str) -> Result<T, ApiError> {
        let client = self.client(account)?;
        match tokio::time::timeout(ANSWER, client.get(path)).await {
            Ok(answer) => answer.map_err(|error| self.explain(error)),
            Err(_) => Err(self.unavailable(&format!("it has not answered for {} s", ANSWER.as_secs()))),
        }
    }

    /// One page of a list of an account's sandboxes.
    pub(crate) async fn page<T: DeserializeOwned>(&self, account: &str, path: &str) -> Result<Page<T>, ApiError> {
        let client = self.client(account)?;
        match tokio::time::timeout(ANSWER, client.page(path)).await {
            Ok(answer) => answer.map_err(|error| self.explain(error)),
            Err(_) => Err(self.unavailable(&format!("it has not answered for {} s", ANSWER.as_secs()))),
        }
    }

    /// What a call came to, with the region named where it could not be reached.
    pub fn explain(&self, error: ApiError) -> ApiError {
        match error.code {
            ErrorCode::DaemonUnavailable => self.unavailable(&error.message),
            _ => error,
        }
    }

    fn unavailable(&self, why: &str) -> ApiError {
        ApiError::new(ErrorCode::RegionUnavailable, format!("region {} cannot be reached: {why}", self.name))
            .hint("its sandboxes keep running; try again in a moment")
    }
}

impl Cloud {
    /// The regions' names, the default first.
    pub fn region_names(&self) -> Vec<&str> {
        self.regions.iter().map(|region| region.name.as_str()).collect()
    }

    /// The region that was asked for, or the default.
    pub(crate) fn choose_region(&self, asked: Option<&str>) -> Result<&Region, ApiError> {
        let Some(name) = asked else { return Ok(&self.regions[0]) };
        self.region(name).ok_or_else(|| {
            ApiError::new(ErrorCode::UnknownRegion, format!("there is no region {name:?} here"))
                .hint(format!("use one of {}", self.region_names().join(", ")))
        })
    }

    pub(crate) fn region(&self, name: &str) -> Option<&Region> {
        self.regions.iter().find(|region| region.name.eq_ignore_ascii_case(name)).map(AsRef::as_ref)
    }

    /// The region of something that is written down: it may have left the configuration.
    pub(crate) fn region_of(&self, name: &str) -> Result<&Region, ApiError> {
        self.region(name).ok_or_else(|| {
            ApiError::new(ErrorCode::RegionUnavailable, format!("region {name} is not part of this server any more"))
                .hint("ask the operator to bring it back")
        })
    }
}
