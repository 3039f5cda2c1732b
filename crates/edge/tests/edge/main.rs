//! The proxy between real clients and real servers on loopback.
#![allow(clippy::unwrap_used)]

mod acme;
mod bodies;
mod connections;
mod hostile;
mod private;
mod protocols;
mod refusals;
mod support;
mod tls;
