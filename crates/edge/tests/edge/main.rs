//! The proxy between real clients and real servers on loopback.
#![allow(clippy::unwrap_used)]

mod bodies;
mod connections;
mod protocols;
mod refusals;
mod support;
