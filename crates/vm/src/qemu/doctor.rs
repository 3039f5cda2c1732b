//! Whether this host can run VMs, how well, and what to do about it.

use super::{QemuDriver, accel::Verdict, blocking, disk};
use crate::{CheckStatus, Error, HostCheck};

/// Runs every check; none depends on another's outcome.
pub async fn examine(driver: &QemuDriver, kernel: Option<&heyvm_images::Kernel>) -> Vec<HostCheck> {
    let mut checks = Vec::new();
    match driver.host().await {
        Ok(host) => {
            checks.push(ok("qemu", format!("QEMU {}", host.root.version)));
            checks.push(cgroups(&host.cgroups.controllers()));
        }
        Err(error) => checks.push(fail("qemu", &error, qemu_hint(&error))),
    }
    checks.push(match kernel {
        None => warn("kvm", "cannot be tried without a guest kernel".into(), "run ./quickstart, which fetches one"),
        Some(kernel) => match driver.acceleration_now(kernel).await {
            Ok(verdict) => acceleration(&verdict),
            Err(error) => fail("kvm", &error, qemu_hint(&error)),
        },
    });
    checks.push(match driver.egress().await {
        Ok(Some(_)) => ok("network", "sandboxes have a network, and reach neither this host nor each other".into()),
        Ok(None) => warn("network", "switched off in config.toml".into(), "set network.enabled = true to change that"),
        Err(error) => fail("network", &error, network_hint(&error)),
    });
    checks.push(match blocking(disk::can_be_made).await {
        Ok(()) => ok("e2fsprogs", "mkfs.ext4 is there".into()),
        Err(error) => fail("e2fsprogs", &error, "install the package e2fsprogs"),
    });
    checks
}

fn qemu_hint(error: &Error) -> &str {
    match error {
        Error::HostNotReady { .. } => "install QEMU for x86 (Debian, Ubuntu: qemu-system-x86)",
        Error::OutOfResources { .. } => "make room for HEYO_HOME, or have it name a larger disk",
        _ => {
            "HEYO_HOME must be a directory that this user may write to, on a file system that allows programs (not noexec)"
        }
    }
}

fn network_hint(error: &Error) -> &str {
    match error {
        Error::HostNotReady { hint, .. } => hint,
        _ => "look into run/egress.log; network.enabled = false does without a network",
    }
}

fn acceleration(verdict: &Verdict) -> HostCheck {
    let message = format!("{}: {}", verdict.acceleration.as_str(), verdict.why);
    match verdict.hint() {
        None => ok("kvm", message),
        Some(hint) => warn("kvm", message, &hint),
    }
}

fn cgroups(controllers: &[&str]) -> HostCheck {
    let missing: Vec<&str> = ["cpu", "memory", "pids"].into_iter().filter(|c| !controllers.contains(c)).collect();
    if missing.is_empty() {
        return ok("cgroups", "processor, memory and process limits hold".into());
    }
    warn(
        "cgroups",
        format!(
            "no limits for {}: size classes hold for guest memory and virtual processors alone",
            missing.join(", ")
        ),
        "run the daemon as root, or in a systemd user session with delegated controllers (systemd-run --user --scope -p Delegate=yes)",
    )
}

fn ok(name: &'static str, message: String) -> HostCheck {
    HostCheck { name, status: CheckStatus::Ok, message, hint: None }
}

fn warn(name: &'static str, message: String, hint: &str) -> HostCheck {
    HostCheck { name, status: CheckStatus::Warn, message, hint: Some(hint.into()) }
}

fn fail(name: &'static str, error: &dyn std::error::Error, hint: &str) -> HostCheck {
    let source = error.source().map(|source| format!(": {source}")).unwrap_or_default();
    HostCheck { name, status: CheckStatus::Fail, message: format!("{error}{source}"), hint: Some(hint.into()) }
}

impl Error {
    pub(super) fn task(error: tokio::task::JoinError) -> Self {
        Self::Io { doing: "running a task", path: "".into(), source: std::io::Error::other(error) }
    }
}
