//! The host's end of the agent connection: one HTTP/2 connection per VM, made anew after a break.

use heyvm_agent_protocol::v1::agent_client::AgentClient;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::transport::Channel;

use crate::Error;

/// A byte stream to a port in the guest.
pub trait PortStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> PortStream for T {}

/// Why a port of a guest could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Nothing listens on the port.
    #[error("nothing listens on port {0}")]
    NothingListens(u16),
    /// The agent does not answer.
    #[error(transparent)]
    Agent(#[from] Error),
}

/// A handle on the VM's agent. Cheap to clone.
#[derive(Clone)]
pub struct AgentConnection {}

impl AgentConnection {
    /// A client for the generated calls; reconnects when the connection has broken.
    pub async fn client(&self) -> Result<AgentClient<Channel>, Error> {
        todo!()
    }

    /// A byte stream to `port` on the guest's loopback.
    pub async fn dial(&self, _port: u16) -> Result<Box<dyn PortStream>, DialError> {
        todo!()
    }
}
