//! The default image, built from the host's own distribution where no registry answers.
#![expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]

use std::{
    fs,
    io::{self, BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use sha2::{Digest, Sha256};

use crate::{Error, Progress};

/// What the image can do: shell, Python and Node.js with their package managers, fetch over HTTPS, look at itself, and what
/// set-up hooks commonly call.
const PACKAGES: [&str; 18] = [
    "python3",
    "python3-pip",
    "python3-venv",
    "python-is-python3",
    "nodejs",
    "npm",
    "git",
    "curl",
    "wget",
    "ca-certificates",
    "procps",
    "iproute2",
    "sudo",
    "less",
    "jq",
    "unzip",
    "nano",
    "openssh-client",
];
/// Files that nobody needs at run time, and Debian's mark that keeps pip from installing: the whole system is the app's.
const PRUNED: [&str; 7] = [
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/usr/share/info/*",
    "/var/cache/apt/*.bin",
    "/var/lib/apt/lists/*_*",
    "/usr/lib/python3*/EXTERNALLY-MANAGED",
];

/// What [`Variant::Full`] has beside that: whatever pip and npm compile.
const COMPILERS: [&str; 6] = ["build-essential", "python3-dev", "pkg-config", "libffi-dev", "libssl-dev", "cmake"];

/// Which of the images that are built here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// Python and Node.js with their package managers.
    Base,
    /// Compilers and headers, too.
    Full,
}

impl Variant {
    fn packages(self) -> Vec<&'static str> {
        let more: &[&str] = if self == Self::Full { &COMPILERS } else { &[] };
        PACKAGES.iter().chain(more).copied().collect()
    }
}

/// Changes when the built image does: an image built from another recipe is built again by `heyvm images prepare`.
pub fn recipe(variant: Variant) -> String {
    let mut hash = Sha256::new();
    for part in variant.packages().iter().chain(&PRUNED) {
        hash.update(part);
        hash.update("\n");
    }
    hex::encode(&hash.finalize()[..8])
}

/// The distribution the image is built from.
pub struct Distribution {
    /// For example `debian`.
    pub id: String,
    /// For example `12`.
    pub version: String,
    codename: String,
}

impl Distribution {
    /// The host's own. Format: os-release(5).
    pub fn of_host() -> Result<Self, Error> {
        let text = fs::read_to_string("/etc/os-release").map_err(Error::io("reading", "/etc/os-release"))?;
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            line.map(|value| value.trim_matches('"').to_owned()).unwrap_or_default()
        };
        Ok(Self { id: field("ID"), version: field("VERSION_ID"), codename: field("VERSION_CODENAME") })
    }

    /// Name of the image built from it.
    pub fn image_name(&self, variant: Variant) -> String {
        let suffix = if variant == Variant::Full { "-full" } else { "" };
        format!("heyvm/{}:{}{suffix}", self.id, self.version)
    }
}

/// Builds the root of the default image as a tar. A tar, because who is not root has no other way to keep what belongs to
/// other users; mmdebstrap works below TMPDIR, in a user namespace where it must.
pub fn build(distribution: &Distribution, variant: Variant, tar: &Path, progress: &Progress) -> Result<(), Error> {
    let mut command = Command::new("mmdebstrap");
    command.args(["--variant=minbase", "--format=tar", &format!("--include={}", variant.packages().join(","))]);
    if distribution.id == "ubuntu" {
        command.arg("--components=main,universe");
    }
    let excludes = PRUNED.map(|pattern| format!("--dpkgopt=path-exclude={pattern}"));
    command.args(excludes).arg(&distribution.codename).arg(tar);
    command.args(mirror());
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().map_err(|error| {
        match error.kind() {
            io::ErrorKind::NotFound => Error::HostNotReady {
                what: "mmdebstrap is not installed, and no registry has the default image".into(),
                hint: "install the package mmdebstrap, or: heyvm images import FILE, or name a registry mirror in config.toml"
                    .into(),
            },
            _ => Error::io("starting mmdebstrap for", tar)(error),
        }
    })?;
    let mut last = Vec::new();
    for line in BufReader::new(child.stderr.take().ok_or_else(|| Error::invalid("mmdebstrap has no output"))?).lines() {
        let Ok(line) = line else { break };
        if let Some(step) = line.strip_prefix("I: ") {
            progress(step, None, None);
        }
        last.push(line);
        if last.len() > 20 {
            last.remove(0);
        }
    }
    let status = child.wait().map_err(Error::io("waiting for mmdebstrap for", tar))?;
    if status.success() {
        return Ok(());
    }
    if !nix::unistd::getuid().is_root() && last.iter().any(|line| line.contains("pick chroot mode")) {
        return Err(Error::HostNotReady {
            what: "mmdebstrap needs a user namespace to build the default image, and there is none for this user"
                .into(),
            hint: "install the package uidmap and give this user subordinate ids (usermod --add-subuids 100000-165535 \
                   --add-subgids 100000-165535 USER), or: heyvm images import FILE"
                .into(),
        });
    }
    Err(Error::HostNotReady {
        what: format!("mmdebstrap could not build the default image: {}", last.join(" | ")),
        hint: "is the distribution's package mirror reachable? heyvm images import FILE takes an image from elsewhere"
            .into(),
    })
}

/// The mirror of the distribution's main archive in the host's own sources; mmdebstrap's default where none is found.
fn mirror() -> Option<String> {
    let deb822 = fs::read_to_string("/etc/apt/sources.list.d/debian.sources")
        .or_else(|_| fs::read_to_string("/etc/apt/sources.list.d/ubuntu.sources"))
        .unwrap_or_default();
    let uri = deb822.lines().find_map(|line| line.strip_prefix("URIs:")).map(|uri| uri.trim().to_owned());
    uri.or_else(|| {
        let list = fs::read_to_string("/etc/apt/sources.list").ok()?;
        let line = list.lines().find(|line| line.starts_with("deb ") && line.contains(" main"))?;
        line.split_whitespace().find(|word| word.contains("://")).map(str::to_owned)
    })
}
