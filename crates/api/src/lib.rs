//! What both ends of heyvm's HTTP API share: the wire types, the errors with their codes, and the typed client.
//!
//! - [`sandbox`], [`start_command`], [`exec`], [`files`], [`images`], [`system`], [`accounts`], [`archives`], [`orphans`]:
//!   request and answer bodies, one module per noun.
//! - [`error`]: every error code there is, with its HTTP status and its default hint.
//! - [`names`]: what a name, a slug, a duration, a port and a size class may look like; used by both ends.
//! - [`limits`]: how large and how many.
//! - [`client`]: a typed client over a Unix socket, HTTP or HTTPS.  [`headers`]: what trusted callers send beside.
//!
//! The OpenAPI document is made from these types and the server's handlers.
#![forbid(unsafe_code)]

pub mod accounts;
pub mod archives;
pub mod client;
pub mod error;
pub mod exec;
pub mod files;
pub mod headers;
pub mod images;
pub mod limits;
pub mod names;
pub mod orphans;
pub mod sandbox;
pub mod start_command;
pub mod system;

pub use error::{ApiError, ErrorCode};
