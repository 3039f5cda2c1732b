//! What every API of this crate must stand, whichever document and routes it has.
//!
//! - [`bodies`]: JSON that means nothing.  [`hostile`]: bytes that are made to harm.
//! - [`Daemon`] (`daemon`): a daemon without VMs to try it on.

pub mod bodies;
mod daemon;
pub mod hostile;

pub use daemon::Daemon;
