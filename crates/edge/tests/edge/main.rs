//! The proxy between real clients and real servers on loopback.
#![allow(clippy::disallowed_methods, reason = "a test may block its own thread")]
#![allow(clippy::unwrap_used)]

mod acme;
mod bodies;
mod clients;
mod connections;
mod hostile;
mod interim;
mod local;
mod private;
mod protocols;
mod refusals;
mod support;
mod tls;
