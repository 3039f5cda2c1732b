//! A framework for tests that boot real VMs: a test reads as a few lines of what happens to one.
//!
//! ```no_run
//! # use heyvm_e2e::*;
//! let host = Host::new();
//! let vm = host.create(&[]);
//! assert_eq!(vm.sh("echo hello").out(), "hello");
//! ```
//!
//! - [`host`]: a heyvm home of the test's own, with the daemon in it; removes everything at its end and fails the test
//!   when anything was left behind ([`leaks`]).
//! - [`vm`]: one sandbox.
//! - [`run`]: one call of the command line and what came of it.
//! - [`http`]: requests to a sandbox's URL as a browser would send them.
//! - [`apps`]: directories to deploy.
//! - [`registry`]: a real OCI registry on loopback.
//! - [`cloud`]: a heyvm server, and machines that are logged in to it.
//! - [`network`]: networks of their own, and a link that can be cut.  [`regions`]: a cloud in two of them.
//!
//! Kernel, default image and templates come from the test home that `./test` prepares; all of a host's own state lies
//! in a directory of its own below /tmp, because a Unix socket's path is short.

pub mod apps;
pub mod cloud;
pub mod host;
pub mod http;
pub mod leaks;
pub mod network;
pub mod regions;
pub mod registry;
pub mod run;
pub mod vm;

pub use host::Host;
pub use run::{Ran, Refusal};
pub use vm::Vm;

use std::time::{Duration, Instant};

/// How long a test waits for what is to come. Machines are slow and do other things; what comes late is no failure.
const PATIENCE: Duration = Duration::from_secs(120);

/// Waits until `probe` gives something; panics with `what` when it never does.
pub fn eventually<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {} s: {what}", PATIENCE.as_secs());
        std::thread::sleep(Duration::from_millis(50));
    }
}
