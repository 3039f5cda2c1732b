//! What of the host's processor goes into a template. Synchronous, and no longer than a moment: the kernel answers from
//! memory, once.
#![expect(clippy::disallowed_methods, reason = "files in /proc and /sys, read once")]

use std::{fs, path::Path, sync::OnceLock};

/// What the guest sees of the host's processor goes into a template that was made with it: the model with its flags and
/// microcode, and what the host's kernel and its KVM make of them.
pub fn processor_model() -> &'static str {
    static MODEL: OnceLock<String> = OnceLock::new();
    MODEL.get_or_init(|| {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let wanted = ["model name", "flags", "microcode"];
        // The first processor's; a host with several kinds of them is none that VMs could move within.
        let first = info.lines().take_while(|line| !line.is_empty());
        let mut model: Vec<String> =
            first.filter(|line| wanted.iter().any(|name| line.starts_with(name))).map(str::to_owned).collect();
        model.push(fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default());
        for dir in ["/sys/module/kvm", "/sys/module/kvm_intel", "/sys/module/kvm_amd"] {
            model.extend(values_in(&Path::new(dir).join("parameters")));
        }
        model.extend(values_in(Path::new("/sys/devices/system/cpu/vulnerabilities")));
        model.join("\n")
    })
}

/// Names and contents of a directory's files, in order; none where there is no such directory.
fn values_in(dir: &Path) -> Vec<String> {
    let mut values: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| format!("{}: {}", entry.path().display(), fs::read_to_string(entry.path()).unwrap_or_default()))
        .collect();
    values.sort();
    values
}
