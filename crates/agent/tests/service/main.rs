//! The agent's calls over a real HTTP/2 connection, on the machine the tests run on.
#![allow(missing_docs, clippy::unwrap_used)]

mod dial;
mod exec;
mod files;
mod harness;
mod main_command;
