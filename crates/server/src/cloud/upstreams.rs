//! The edge's way into a cloud: where host names lead, who may come in, and our own hosts.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use heyvm_accounts::Accounts;
use heyvm_api::{ApiError, ErrorCode};
use heyvm_cloud::Cloud;
use heyvm_edge::{Access, ByteStream, ConnectError, Doorkeeper, Route, Upstreams, Verdict};

use super::login::LoginPage;

/// The cloud as the proxy sees it.
pub struct Sandboxes(pub Arc<Cloud>);

#[async_trait]
impl Upstreams for Sandboxes {
    async fn route(&self, subdomain: &str) -> Result<Route, ConnectError> {
        let found = self.0.destination(subdomain).await.map_err(|error| told(&error, 0))?;
        let route = found.ok_or(ConnectError::UnknownSubdomain)?.route;
        let access = match route.is_public {
            true => Access::Public,
            false => Access::Members { account: route.account_id },
        };
        let response_timeout = route.response_timeout_seconds.map(|seconds| Duration::from_secs(seconds.into()));
        Ok(Route { sandbox: route.sandbox_id, port: route.port, access, response_timeout })
    }

    async fn connect(&self, route: &Route) -> Result<Box<dyn ByteStream>, ConnectError> {
        let opened = self.0.connect(&route.sandbox, route.port).await;
        Ok(Box::new(opened.map_err(|error| told(&error, route.port))?))
    }
}

fn told(error: &ApiError, port: u16) -> ConnectError {
    match error.code {
        ErrorCode::SandboxNotFound => ConnectError::UnknownSubdomain,
        ErrorCode::InvalidState => ConnectError::NotRunning(error.message.clone()),
        ErrorCode::PortNotListening => ConnectError::NothingListens(port),
        _ => ConnectError::Unreachable(error.message.clone()),
    }
}

/// Accounts as the proxy sees them.
pub struct Members {
    /// Whom credentials belong to.
    pub accounts: Arc<Accounts>,
    /// The login page.
    pub login: Arc<LoginPage>,
}

#[async_trait]
impl Doorkeeper for Members {
    async fn admit(&self, credential: &str, account: &str) -> Verdict {
        match self.accounts.identify(credential).await {
            Ok(identity) if identity.account_id == account => Verdict::Welcome,
            Ok(_) => Verdict::Stranger,
            Err(_) => Verdict::Unknown,
        }
    }

    fn is_ours(&self, credential: &str) -> bool {
        self.accounts.is_ours(credential)
    }

    fn login_url(&self, return_to: &str) -> Option<String> {
        Some(self.login.login_url(return_to))
    }
}
