//! Images from a real registry (Debian's docker-registry on loopback, filled by skopeo) and from files, down to what is
//! in their EROFS.
//!
//! - [`server`]: a registry's process.  [`liar`]: answers that no registry gives.
//!   [`layout`]: images as the tests write them.  [`place`]: a store and its EROFS files.
#![allow(clippy::disallowed_methods, reason = "a test may block its own thread")]
// Not the whole crate is test code to clippy: what the tests share is outside of any `#[test]`.
#![allow(clippy::unwrap_used)]

mod layout;
mod liar;
mod place;
mod server;

mod guarded;
mod hostile;
mod import;
mod pull;
mod refusal;
mod together;
mod unprivileged;
