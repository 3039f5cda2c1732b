//! The storage against a directory and against a real S3-compatible server on loopback.
#![allow(clippy::disallowed_methods, reason = "a test may block its own thread")]
#![allow(clippy::unwrap_used)] // Clippy sees the tests, but not what they share.

mod behaviour;
mod catalog;
mod outage;
mod place;
