//! Kernel settings of every guest: limits as on a developer's desktop, and a kernel that rests while nothing runs.

use std::{fs, io, os::unix::fs::PermissionsExt};

use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

use crate::console;

/// Files below /proc/sys and their values. A kernel without one of them keeps what it has.
const SYSCTLS: [(&str, &str); 12] = [
    // Watchers of large trees (bundlers, editors, language servers): the kernel counts by memory, desktops do not.
    ("fs/inotify/max_user_watches", "524288"),
    ("fs/inotify/max_user_instances", "8192"),
    ("fs/aio-max-nr", "1048576"),
    ("fs/file-max", "9223372036854775807"),
    ("kernel/pid_max", "4194304"),
    // Databases and search engines refuse to start with the kernel's 65530.
    ("vm/max_map_count", "1048576"),
    // Every user may ping and listen on port 80: the sandbox is the boundary, not its users.
    ("net/ipv4/ping_group_range", "0 2147483647"),
    ("net/ipv4/ip_unprivileged_port_start", "0"),
    // Process sandboxes of programs (browsers, bwrap, nix) need user namespaces.
    ("kernel/unprivileged_userns_clone", "1"),
    // Each session gets its share of the processor, however many processes it has: a fork bomb does not starve the agent.
    ("kernel/sched_autogroup_enabled", "1"),
    // kcompactd would wake twice a second to see whether there is anything to compact.
    ("vm/compaction_proactiveness", "0"),
    // The kernel would wake every second to gather its counters of memory; a processor that goes idle gathers its own.
    ("vm/stat_interval", "120"),
];

/// Descriptors that a program starts with the right to, and that it may ask for.
const OPEN_FILES: (u64, u64) = (65_536, 1_048_576);

/// Devices that programs of every user open, where the guest's kernel has them.
const DEVICES_FOR_USERS: [&str; 2] = ["/dev/net/tun", "/dev/fuse"];

/// Applies all of them. Modules must be loaded: some settings are theirs.
pub fn apply() -> io::Result<()> {
    for (name, value) in SYSCTLS {
        match fs::write(format!("/proc/sys/{name}"), value) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                console::say(format_args!("could not set {name}: {error}"));
            }
            _ => {}
        }
    }
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES.0, OPEN_FILES.1)?;
    // The cgroup bounds processes; the kernel's own limit for users follows from the memory, and is small in a small guest.
    setrlimit(Resource::RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY)?;
    for device in DEVICES_FOR_USERS {
        fs::set_permissions(device, fs::Permissions::from_mode(0o666)).ok();
    }
    Ok(())
}
