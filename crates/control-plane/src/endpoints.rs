//! Ports with URLs. A map in memory, in step with the store, answers the proxy without a query.

use std::{collections::HashMap, sync::Arc};

use heyvm_api::{
    ApiError, ErrorCode, names,
    sandbox::{BindRequest, BoundPort, Endpoint, RouteInfo, Status},
};
use heyvm_store::EndpointRow;
use heyvm_vm::agent::{DialError, PortStream};
use rand::Rng;

use crate::{ControlPlane, Who, errors, not_running, spawn_detached, validate};

/// Letters and digits that nobody confuses; ten of them are 50 bits that nobody guesses.
const LETTERS: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
const SUBDOMAIN_LENGTH: usize = 10;

/// Why a port could not be reached through its URL.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No endpoint has this subdomain.
    #[error("no sandbox has this address")]
    UnknownSubdomain,
    /// The sandbox is there, but its VM is not running.
    #[error("the sandbox is {0}")]
    NotRunning(String),
    /// Nothing listens on the port.
    #[error("nothing listens on port {0} in the sandbox")]
    NothingListens(u16),
    /// The agent does not answer.
    #[error("the sandbox does not answer: {0}")]
    Unreachable(String),
}

impl ControlPlane {
    /// Gives a port a URL. Binding a bound port gives the same URL, and makes it public or private where that is said.
    pub async fn bind(self: &Arc<Self>, who: &Who, request: BindRequest) -> Result<BoundPort, ApiError> {
        let port = names::check_port(request.port)?;
        validate::check_privacy(request.is_public, &who.account)?;
        let record = self.find(who)?.snapshot();
        if record.status == Status::Removed || record.removing {
            return Err(not_running(&record));
        }
        self.bind_port(record.id.clone(), port, request.is_public).await?;
        let bound = self.bound(&record.id).into_iter().find(|bound| bound.endpoint.port == port);
        bound.ok_or_else(|| ApiError::new(ErrorCode::PortNotBound, format!("port {port} was unbound at the same time")))
    }

    /// A new one is public unless it is said that it is not. Detached: store and memory change together or not at all.
    pub(crate) async fn bind_port(
        self: &Arc<Self>,
        id: String,
        port: u16,
        is_public: Option<bool>,
    ) -> Result<(), ApiError> {
        let plane = Arc::clone(self);
        spawn_detached(async move { plane.bind_port_now(&id, port, is_public).await }).await
    }

    async fn bind_port_now(&self, id: &str, port: u16, is_public: Option<bool>) -> Result<(), ApiError> {
        let bound = self.rows_of(id).into_iter().find(|row| row.port == port);
        if bound.as_ref().is_some_and(|row| is_public.is_none_or(|asked| asked == row.is_public)) {
            return Ok(());
        }
        if bound.is_none() {
            let is_public = is_public.unwrap_or(true);
            let row = EndpointRow { subdomain: subdomain(), sandbox_id: id.to_owned(), port, is_public };
            match self.store.add_endpoint(&row, chrono::Utc::now().timestamp_millis()).await {
                Ok(()) => return self.reload_endpoints().await,
                // Bound by another request at the same time.
                Err(heyvm_store::Error::Exists) => {}
                Err(error) => return Err(errors::store(error)),
            }
        }
        if let Some(is_public) = is_public {
            self.store.set_endpoint_public(id, port, is_public).await.map_err(errors::store)?;
        }
        self.reload_endpoints().await
    }

    /// Takes a port's URL away.
    pub async fn unbind(self: &Arc<Self>, who: &Who, port: i64) -> Result<(), ApiError> {
        let port = names::check_port(port)?;
        let (plane, record) = (Arc::clone(self), self.find(who)?.snapshot());
        spawn_detached(async move {
            if plane.store.remove_endpoint(&record.id, port).await.map_err(errors::store)? {
                return plane.reload_endpoints().await;
            }
            Err(ApiError::new(ErrorCode::PortNotBound, format!("port {port} of {} is not bound", record.name))
                .hint(format!("heyvm get {} shows the bound ports", record.name)))
        })
        .await
    }

    pub(crate) async fn unbind_all(&self, id: &str) {
        let removed = self.store.remove_endpoints(id).await.map_err(errors::store);
        if let (Err(error), _) | (_, Err(error)) = (removed, self.reload_endpoints().await) {
            tracing::error!(%error, id, "URLs could not be removed");
        }
    }

    /// The bound ports.
    pub async fn endpoints(&self, who: &Who) -> Result<Vec<BoundPort>, ApiError> {
        // The lock on the record must be free again before the rows are put in its order.
        let id = self.find(who)?.record().id.clone();
        Ok(self.bound(&id))
    }

    fn bound(&self, id: &str) -> Vec<BoundPort> {
        let sandbox_id = id.to_owned();
        self.urls_of(id).into_iter().map(|endpoint| BoundPort { endpoint, sandbox_id: sandbox_id.clone() }).collect()
    }

    pub(crate) fn urls_of(&self, id: &str) -> Vec<Endpoint> {
        self.rows_of(id).into_iter().map(|row| self.url(&row)).collect()
    }

    pub(crate) fn rows_of(&self, id: &str) -> Vec<EndpointRow> {
        let endpoints = self.endpoints.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut rows: Vec<_> = endpoints.values().filter(|row| row.sandbox_id == id).cloned().collect();
        let order = self.with_id(id).map(|sandbox| sandbox.record().open_ports.clone()).unwrap_or_default();
        rows.sort_by_key(|row| (order.iter().position(|port| *port == row.port).unwrap_or(usize::MAX), row.port));
        rows
    }

    pub(crate) fn url(&self, row: &EndpointRow) -> Endpoint {
        let hostname = format!("{}.{}", row.subdomain, self.config.base_domain);
        let port = match (self.config.url_scheme.as_str(), self.config.url_port) {
            ("http", 80) | ("https", 443) => String::new(),
            (_, port) => format!(":{port}"),
        };
        let url = format!("{}://{hostname}{port}", self.config.url_scheme);
        let local_url = self.local_url(&row.subdomain);
        Endpoint {
            subdomain: row.subdomain.clone(),
            hostname,
            url,
            local_url,
            port: row.port,
            is_public: row.is_public,
        }
    }

    pub(crate) async fn reload_endpoints(&self) -> Result<(), ApiError> {
        // What is read later must not be overwritten by what was read before.
        let _one_at_a_time = self.reloading.lock().await;
        let rows = self.store.endpoints().await.map_err(errors::store)?;
        let map: HashMap<_, _> = rows.into_iter().map(|row| (row.subdomain.clone(), row)).collect();
        *self.endpoints.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = map;
        self.update_local_ports().await;
        Ok(())
    }

    /// Where a subdomain leads, and whom.
    pub fn route(&self, subdomain: &str) -> Result<RouteInfo, ConnectError> {
        let endpoints = self.endpoints.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        let row = endpoints.get(subdomain).cloned().ok_or(ConnectError::UnknownSubdomain)?;
        drop(endpoints);
        let sandbox = self.with_id(&row.sandbox_id).ok_or(ConnectError::UnknownSubdomain)?;
        let record = sandbox.record();
        Ok(RouteInfo {
            sandbox_id: row.sandbox_id,
            port: row.port,
            is_public: row.is_public,
            account_id: record.account.as_str().to_owned(),
            response_timeout_seconds: record.response_timeout_seconds,
        })
    }

    /// A byte stream to the port behind a subdomain.
    pub async fn connect(&self, subdomain: &str) -> Result<Box<dyn PortStream>, ConnectError> {
        let route = self.route(subdomain)?;
        self.connect_to(&route.sandbox_id, route.port).await
    }

    /// A byte stream to a port of a sandbox: the edge proxy's way in, which keeps connections by sandbox and port.
    pub async fn connect_to(&self, sandbox_id: &str, port: u16) -> Result<Box<dyn PortStream>, ConnectError> {
        let sandbox = self.with_id(sandbox_id).ok_or(ConnectError::UnknownSubdomain)?;
        let Some(vm) = sandbox.vm() else {
            let status = serde_json::to_value(sandbox.record().status).unwrap_or_default();
            return Err(ConnectError::NotRunning(status.as_str().unwrap_or("not running").to_owned()));
        };
        vm.agent().dial(port).await.map_err(|error| match error {
            DialError::NothingListens(port) => ConnectError::NothingListens(port),
            DialError::Agent(error) => ConnectError::Unreachable(error.to_string()),
        })
    }
}

fn subdomain() -> String {
    let mut random = rand::rng();
    (0..SUBDOMAIN_LENGTH).map(|_| char::from(LETTERS[random.random_range(0..LETTERS.len())])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subdomains_are_labels_and_differ() {
        let (one, other) = (subdomain(), subdomain());
        assert_ne!(one, other);
        names::check_slug(&one).unwrap();
    }
}
