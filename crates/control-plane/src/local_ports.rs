//! Ports on the host's loopback that lead where subdomains do, for programs that cannot resolve `*.localhost`.
//!
//! The control plane persists which port a subdomain has, so that it stays the same; the server listens.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use async_trait::async_trait;
use heyvm_api::ApiError;

use crate::{ControlPlane, errors};

/// A subdomain that is to have a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WantedPort {
    /// First label of the host name.
    pub subdomain: String,
    /// Its URL.
    pub url: String,
    /// The port that it had the last time.
    pub port: Option<u16>,
}

/// Listens on loopback.
#[async_trait]
pub trait LocalPorts: Send + Sync {
    /// Listens for these subdomains and no others; gives the port of each that it could listen for.
    async fn listen_for(&self, wanted: Vec<WantedPort>) -> HashMap<String, u16>;
}

impl ControlPlane {
    /// Has `ports` listen for every bound port, now and whenever one is bound or unbound.
    pub async fn open_local_ports(&self, ports: Arc<dyn LocalPorts>) -> Result<(), ApiError> {
        // A second one has nothing to do.
        self.listeners.set(ports).ok();
        let _no_port_is_bound_meanwhile = self.binding.lock().await;
        self.listen_for_endpoints().await
    }

    /// Brings listeners and store in step with the endpoints. A port that cannot be listened on is no reason to refuse
    /// anything: the URL is there. The lock on binding is held.
    pub(crate) async fn update_local_ports(&self) {
        if let Err(error) = self.listen_for_endpoints().await {
            tracing::error!(%error, "the ports on loopback could not be kept");
        }
    }

    async fn listen_for_endpoints(&self) -> Result<(), ApiError> {
        let Some(listeners) = self.listeners.get() else { return Ok(()) };
        let known = self.store.local_ports().await.map_err(errors::store)?;
        let rows = self.all_rows();
        let wanted = rows.iter().map(|row| WantedPort {
            subdomain: row.subdomain.clone(),
            url: self.url(row).url,
            port: known.get(&row.subdomain).copied(),
        });
        let open = listeners.listen_for(wanted.collect()).await;
        // One that is taken by another program for now may be free the next time.
        let taken: HashSet<u16> = open.values().copied().collect();
        let mut kept = open.clone();
        for (subdomain, port) in &known {
            if rows.iter().any(|row| row.subdomain == *subdomain) && !taken.contains(port) {
                kept.entry(subdomain.clone()).or_insert(*port);
            }
        }
        *self.local_ports.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = open;
        if kept != known {
            self.store.set_local_ports(&kept).await.map_err(errors::store)?;
        }
        Ok(())
    }

    pub(crate) fn local_url(&self, subdomain: &str) -> Option<String> {
        let ports = self.local_ports.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        ports.get(subdomain).map(|port| format!("http://127.0.0.1:{port}"))
    }
}
