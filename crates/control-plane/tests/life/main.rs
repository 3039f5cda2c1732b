//! The control plane's own logic, with a driver that has processes for machines: states, names, time, crashes.
#![allow(clippy::disallowed_methods, reason = "a test may block its own thread")]
#![allow(clippy::unwrap_used)] // Clippy sees the tests in these modules, but not what they share.

mod daemon;
mod machines;

mod adoption;
mod creating;
mod cutting;
mod dropping;
mod ending;
mod hooks;
mod hostile;
mod images;
mod lists;
mod names;
mod orphans;
mod ports;
mod replacing;
mod restarting;
mod sizes;
mod tenants;
mod waiting;
