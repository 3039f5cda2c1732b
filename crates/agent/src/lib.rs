//! heyvm-agent: process 1 of every guest. Brings the guest up, then does what the host asks over two byte streams:
//! calls on one, connections to programs on the other.
//!
//! ```text
//! boot ─┬▶ port (waits for the host) ──▶ net::streams (HTTP/2): connections to programs
//!       └▶ port (waits for the host) ──▶ connection (HTTP/2) ──▶ service (one method per call)
//!                                                                  ├─ personalize   this clone becomes a sandbox
//!                                                                  ├─ exec, main_command ──▶ process
//!                                                                  ├─ files
//!                                                                  ├─ mounts        directories of the host
//!                                                                  ├─ disk
//!                                                                  ├─ clock         kept by the host's
//!                                                                  └─ shutdown
//! ```
//! Process 1 must not end: the kernel panics when it does. So a panic ends one task alone, memory and queues are
//! bounded, and what may block runs on other threads.

pub mod boot;
mod clock;
pub mod connection;
pub mod console;
mod descriptor;
mod disk;
mod exec;
pub mod files;
mod main_command;
pub mod memory_guard;
mod metrics;
mod mounts;
pub mod net;
mod oom;
mod personalize;
mod pit;
pub mod port;
mod process;
mod sandbox;
pub mod service;
mod settings;
mod shutdown;
mod warm_up;

pub use process::Reaper;
pub use sandbox::Sandbox;
