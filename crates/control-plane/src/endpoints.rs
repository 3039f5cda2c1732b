//! Ports with URLs. A table in memory, in step with the store, answers the proxy without a query. Each change writes its
//! own rows, to the store first: what a change costs does not grow with the number of bound ports.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use heyvm_api::{
    ApiError, ErrorCode, limits, names,
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

/// Every bound port, by subdomain and by sandbox.
#[derive(Debug, Default)]
pub(crate) struct Endpoints {
    by_subdomain: HashMap<String, EndpointRow>,
    by_sandbox: HashMap<String, BTreeMap<u16, String>>,
}

impl Endpoints {
    fn of(rows: Vec<EndpointRow>) -> Self {
        let mut all = Self::default();
        rows.into_iter().for_each(|row| all.put(row));
        all
    }

    fn put(&mut self, row: EndpointRow) {
        self.remove(&row.sandbox_id, row.port);
        self.by_sandbox.entry(row.sandbox_id.clone()).or_default().insert(row.port, row.subdomain.clone());
        self.by_subdomain.insert(row.subdomain.clone(), row);
    }

    fn remove(&mut self, sandbox_id: &str, port: u16) {
        let Some(ports) = self.by_sandbox.get_mut(sandbox_id) else { return };
        if let Some(subdomain) = ports.remove(&port) {
            self.by_subdomain.remove(&subdomain);
        }
        if ports.is_empty() {
            self.by_sandbox.remove(sandbox_id);
        }
    }

    fn remove_all(&mut self, sandbox_id: &str) {
        for subdomain in self.by_sandbox.remove(sandbox_id).unwrap_or_default().into_values() {
            self.by_subdomain.remove(&subdomain);
        }
    }

    fn of_sandbox(&self, sandbox_id: &str) -> Vec<EndpointRow> {
        let subdomains = self.by_sandbox.get(sandbox_id).into_iter().flat_map(BTreeMap::values);
        subdomains.filter_map(|subdomain| self.by_subdomain.get(subdomain)).cloned().collect()
    }
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
        // Store and table change together: of a bind and an unbind at once, both have the same one last.
        let _one_at_a_time = self.binding.lock().await;
        let bound = self.rows_of(id);
        match bound.iter().find(|row| row.port == port) {
            Some(row) if is_public.is_none_or(|asked| asked == row.is_public) => return Ok(()),
            Some(row) => {
                let is_public = is_public.unwrap_or(row.is_public);
                self.store.set_endpoint_public(id, port, is_public).await.map_err(errors::store)?;
                self.endpoints_mut().put(EndpointRow { is_public, ..row.clone() });
            }
            None => {
                limits::PORTS.check(bound.len() + 1)?;
                let is_public = is_public.unwrap_or(true);
                let row = EndpointRow { subdomain: subdomain(), sandbox_id: id.to_owned(), port, is_public };
                self.store.add_endpoint(&row, chrono::Utc::now().timestamp_millis()).await.map_err(errors::store)?;
                self.endpoints_mut().put(row);
            }
        }
        self.update_local_ports().await;
        self.touch(id);
        Ok(())
    }

    /// Takes a port's URL away.
    pub async fn unbind(self: &Arc<Self>, who: &Who, port: i64) -> Result<(), ApiError> {
        let port = names::check_port(port)?;
        let (plane, record) = (Arc::clone(self), self.find(who)?.snapshot());
        spawn_detached(async move {
            let _one_at_a_time = plane.binding.lock().await;
            if !plane.store.remove_endpoint(&record.id, port).await.map_err(errors::store)? {
                let not_bound = format!("port {port} of {} is not bound", record.name);
                return Err(ApiError::new(ErrorCode::PortNotBound, not_bound)
                    .hint(format!("heyvm get {} shows the bound ports", record.name)));
            }
            plane.endpoints_mut().remove(&record.id, port);
            plane.update_local_ports().await;
            plane.touch(&record.id);
            Ok(())
        })
        .await
    }

    pub(crate) async fn unbind_all(&self, id: &str) {
        let _one_at_a_time = self.binding.lock().await;
        if let Err(error) = self.store.remove_endpoints(id).await.map_err(errors::store) {
            tracing::error!(%error, id, "URLs could not be removed");
        }
        // Even so they lead nowhere from here on.
        self.endpoints_mut().remove_all(id);
        self.update_local_ports().await;
    }

    /// Every bound port.
    pub(crate) fn all_rows(&self) -> Vec<EndpointRow> {
        let endpoints = self.endpoints.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        endpoints.by_subdomain.values().cloned().collect()
    }

    /// After a replacement in the store: `moved` lead to the new sandbox, and nothing to the old one.
    pub(crate) fn move_endpoints(&self, old: &str, new: &str, moved: Vec<EndpointRow>) {
        let mut endpoints = self.endpoints_mut();
        endpoints.remove_all(old);
        for row in moved {
            endpoints.put(EndpointRow { sandbox_id: new.to_owned(), ..row });
        }
    }

    fn endpoints_mut(&self) -> std::sync::RwLockWriteGuard<'_, Endpoints> {
        self.endpoints.write().unwrap_or_else(|poisoned| poisoned.into_inner())
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
        let mut rows = self.endpoints.read().unwrap_or_else(|poisoned| poisoned.into_inner()).of_sandbox(id);
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

    /// Reads the table as a daemon begins.
    pub(crate) async fn load_endpoints(&self) -> Result<(), ApiError> {
        let rows = self.store.endpoints().await.map_err(errors::store)?;
        *self.endpoints_mut() = Endpoints::of(rows);
        Ok(())
    }

    /// Where a subdomain leads, and whom.
    pub fn route(&self, subdomain: &str) -> Result<RouteInfo, ConnectError> {
        let endpoints = self.endpoints.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        let row = endpoints.by_subdomain.get(subdomain).cloned().ok_or(ConnectError::UnknownSubdomain)?;
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

    fn row(subdomain: &str, sandbox_id: &str, port: u16) -> EndpointRow {
        EndpointRow { subdomain: subdomain.into(), sandbox_id: sandbox_id.into(), port, is_public: true }
    }

    #[test]
    fn both_sides_of_the_table_change_together() {
        let mut all = Endpoints::of(vec![row("x", "a", 80), row("y", "a", 81), row("z", "b", 80)]);
        all.put(row("w", "a", 80));
        assert_eq!(all.of_sandbox("a"), [row("w", "a", 80), row("y", "a", 81)]);
        assert!(!all.by_subdomain.contains_key("x"));
        all.remove("a", 81);
        all.remove("a", 81);
        assert_eq!(all.of_sandbox("a"), [row("w", "a", 80)]);
        all.remove_all("a");
        assert!(all.of_sandbox("a").is_empty());
        assert_eq!((all.by_subdomain.len(), all.by_sandbox.len()), (1, 1));
    }

    #[test]
    fn subdomains_are_labels_and_differ() {
        let (one, other) = (subdomain(), subdomain());
        assert_ne!(one, other);
        names::check_slug(&one).unwrap();
    }
}
