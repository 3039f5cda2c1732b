//! Two networks of their own with one link between them, which can be cut: machines that are apart, on one machine.

use std::{
    fs::File,
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use nix::sched::{CloneFlags, setns};

use crate::Ran;

/// The name that the link has at either end.
const LINK: &str = "far0";

/// A network namespace.
#[derive(Debug, Clone)]
pub struct Namespace {
    name: String,
    /// Its address on the link.
    pub address: String,
}

impl Namespace {
    fn new(name: String, address: &str) -> Self {
        ip(&["netns", "add", &name]);
        ip(&["-n", &name, "link", "set", "lo", "up"]);
        Self { name, address: address.into() }
    }

    fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// `program` in it. `ip netns exec` would hide the control groups.
    pub fn command(&self, program: PathBuf) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg(program);
        command
    }

    /// Runs some of the test's own code in it.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let entered = || {
            setns(File::open(self.path()).expect("namespace"), CloneFlags::CLONE_NEWNET).expect("setns");
            work()
        };
        let done = std::thread::scope(|scope| scope.spawn(entered).join());
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    fn link(&self, state: &str) {
        ip(&["-n", &self.name, "link", "set", LINK, state]);
    }
}

/// Two namespaces and the link between them.
#[derive(Debug)]
pub struct Network {
    /// One end.
    pub us: Namespace,
    /// The other.
    pub eu: Namespace,
}

impl Default for Network {
    fn default() -> Self {
        Self::new()
    }
}

impl Network {
    /// Two that reach each other.
    pub fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = format!("{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let us = Namespace::new(format!("hv-{number}-us"), "10.77.0.1");
        let eu = Namespace::new(format!("hv-{number}-eu"), "10.77.0.2");
        ip(&["-n", &us.name, "link", "add", LINK, "type", "veth", "peer", "name", LINK, "netns", &eu.name]);
        for end in [&us, &eu] {
            ip(&["-n", &end.name, "address", "add", &format!("{}/30", end.address), "dev", LINK]);
            end.link("up");
        }
        Self { us, eu }
    }

    /// Cuts the link at the far end: here nothing tells that nobody hears.
    pub fn cut(&self) {
        self.eu.link("down");
    }

    /// Joins what was cut.
    pub fn mend(&self) {
        self.eu.link("up");
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for end in [&self.us, &self.eu] {
            Command::new("ip").args(["netns", "delete", &end.name]).status().ok();
        }
    }
}

#[track_caller]
fn ip(arguments: &[&str]) {
    Ran::of(Command::new("ip").args(arguments), b"").succeeded();
}
