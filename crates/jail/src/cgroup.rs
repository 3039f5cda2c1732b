//! Limits of one VM where the host grants them: cgroup v2, v1, the hybrid of both, or none.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use crate::Error;

/// What a VM may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes, guest memory and QEMU's own together.
    pub memory_bytes: u64,
    /// Thousandths of a processor: its share of a busy host from the first moment on, and its most once
    /// [`limit_processor`] was called.
    pub cpu_millis: u32,
    /// Processes and threads.
    pub tasks: u32,
}

/// Period of the processor quota in microseconds.
const PERIOD_US: u64 = 100_000;
/// What there is to limit.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// Directory below the daemon's own place in the hierarchy; each user's own.
fn ours() -> String {
    format!("heyvm-{}", nix::unistd::getuid())
}

/// One hierarchy in which we may make cgroups.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Hierarchy {
    /// The controllers that are granted, in one tree.
    Unified(Vec<&'static str>, PathBuf),
    /// One controller of version 1.
    Legacy(&'static str, PathBuf),
}

/// The hierarchies in which the daemon may make cgroups; empty where the host grants none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cgroups {
    hierarchies: Vec<Hierarchy>,
}

impl Cgroups {
    /// Tries what this process may do; makes nothing that stays but one directory of ours in each hierarchy.
    pub fn detect() -> Self {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let mut hierarchies = Vec::new();
        for controller in CONTROLLERS {
            if let Some(dir) = legacy_dir(controller, &own, &mounts)
                && can_fill(&dir)
            {
                hierarchies.push(Hierarchy::Legacy(controller, dir));
            }
        }
        if hierarchies.is_empty() {
            hierarchies.extend(best(unified_candidates(&own, &mounts), delegated));
        }
        Self { hierarchies }
    }

    /// Which of `cpu`, `memory` and `pids` can be limited.
    pub fn controllers(&self) -> Vec<&str> {
        let of = |hierarchy: &Hierarchy| match hierarchy {
            Hierarchy::Unified(granted, _) => granted.clone(),
            Hierarchy::Legacy(controller, _) => vec![*controller],
        };
        self.hierarchies.iter().flat_map(of).collect()
    }

    /// Makes the cgroups of one VM, which are its [`Self::dirs`]; the launcher puts it there. It may use every processor for
    /// now: a quota would throttle its start, which is the host's work rather than the guest's.
    pub fn create(&self, dirs: &[PathBuf], limits: Limits) -> Result<(), Error> {
        for (hierarchy, dir) in self.hierarchies.iter().zip(dirs) {
            make_dir(dir).map_err(Error::io("making the cgroup", dir))?;
            for (file, value) in settings(hierarchy, limits) {
                let path = dir.join(file);
                let written = fs::write(&path, value);
                // Older kernels lack the swap settings; the limits themselves must hold.
                if !(file.contains("swap") || file.contains("memsw")) {
                    written.map_err(Error::io("setting the cgroup's limit", path))?;
                }
            }
        }
        Ok(())
    }

    /// Where the cgroups of a VM of this name belong. A daemon that was started elsewhere would have another answer: who
    /// outlives this one remembers it.
    pub fn dirs(&self, name: &str) -> Vec<PathBuf> {
        self.hierarchies
            .iter()
            .map(|hierarchy| match hierarchy {
                Hierarchy::Unified(_, dir) | Hierarchy::Legacy(_, dir) => dir.join(name),
            })
            .collect()
    }
}

/// From now on the VM in these cgroups may use so many thousandths of a processor, and no more; after a quiet while, twice
/// that for a moment. Where the host limits no processors, or the VM has ended, nothing happens.
pub fn limit_processor(dirs: &[PathBuf], cpu_millis: u32) -> Result<(), Error> {
    let quota = u64::from(cpu_millis) * PERIOD_US / 1000;
    // Version 2, then version 1. Older kernels know no burst.
    let versions = [
        ("cpu.max", format!("{quota} {PERIOD_US}"), "cpu.max.burst"),
        ("cpu.cfs_quota_us", quota.to_string(), "cpu.cfs_burst_us"),
    ];
    for dir in dirs {
        for (limit, value, burst) in &versions {
            // Never made: the file is there where the limit is.
            match File::options()
                .write(true)
                .open(dir.join(limit))
                .and_then(|mut file| file.write_all(value.as_bytes()))
            {
                Ok(()) => {
                    let burst = File::options().write(true).open(dir.join(burst));
                    // Older kernels have no such file.
                    burst.and_then(|mut file| file.write_all(quota.to_string().as_bytes())).ok();
                }
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(Error::io("setting the cgroup's limit", dir.join(limit))(error)),
            }
        }
    }
    Ok(())
}

/// There is no such file, or it went away between being opened and being written.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(nix::libc::ENODEV)
}

/// Whether the kernel has ended a VM because it reached its memory limit; known until its cgroups are removed.
pub fn ran_out_of_memory(dirs: &[PathBuf]) -> bool {
    dirs.iter().any(|dir| {
        // Version 2, then version 1.
        let counts = ["memory.events", "memory.oom_control"].map(|file| fs::read_to_string(dir.join(file)));
        counts.iter().flatten().any(|text| oom_kills(text) > 0)
    })
}

/// Removes the cgroups of a VM that has ended. Succeeds when there are none.
pub fn remove(dirs: &[PathBuf]) -> Result<(), Error> {
    for dir in dirs {
        // The kernel takes a moment to notice the end of the last process.
        let mut tries = 50;
        loop {
            match fs::remove_dir(dir) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && tries > 0 => tries -= 1,
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io("removing the cgroup", dir)(error));
                }
                _ => break,
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    Ok(())
}

fn oom_kills(counts: &str) -> u64 {
    let line = counts.lines().find_map(|line| line.strip_prefix("oom_kill "));
    line.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

fn settings(hierarchy: &Hierarchy, limits: Limits) -> Vec<(&'static str, String)> {
    // Weight 100 is the default for one processor.
    let weight = (u64::from(limits.cpu_millis) / 10).clamp(1, 10_000);
    match hierarchy {
        Hierarchy::Unified(granted, _) => [
            ("cpu.max", format!("max {PERIOD_US}")),
            ("cpu.weight", weight.to_string()),
            ("memory.max", limits.memory_bytes.to_string()),
            ("memory.swap.max", "0".into()),
            ("pids.max", limits.tasks.to_string()),
        ]
        .into_iter()
        .filter(|(file, _)| granted.iter().any(|controller| file.split('.').next() == Some(controller)))
        .collect(),
        Hierarchy::Legacy("cpu", _) => vec![
            ("cpu.cfs_period_us", PERIOD_US.to_string()),
            ("cpu.cfs_quota_us", "-1".into()),
            ("cpu.shares", (u64::from(limits.cpu_millis) * 1024 / 1000).max(2).to_string()),
        ],
        Hierarchy::Legacy("memory", _) => vec![
            ("memory.limit_in_bytes", limits.memory_bytes.to_string()),
            ("memory.memsw.limit_in_bytes", limits.memory_bytes.to_string()),
        ],
        Hierarchy::Legacy(_, _) => vec![("pids.max", limits.tasks.to_string())],
    }
}

fn make_dir(dir: &Path) -> io::Result<()> {
    match fs::create_dir_all(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Our directory below the daemon's own cgroup in a version 1 hierarchy.
fn legacy_dir(controller: &str, own: &str, mounts: &str) -> Option<PathBuf> {
    let path = own.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        fields.next()?.split(',').any(|c| c == controller).then(|| fields.next())?
    })?;
    let mount = mounts.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        (fields.get(2) == Some(&"cgroup") && fields.get(3)?.split(',').any(|o| o == controller)).then(|| fields[1])
    })?;
    // In a container the path may be the host's while the mount shows only our own part of the tree.
    let below = Path::new(mount).join(path.trim_start_matches('/'));
    Some(if below.is_dir() { below } else { PathBuf::from(mount) }.join(ours()))
}

/// Directories in the unified tree that may be ours to fill, best first.
fn unified_candidates(own: &str, mounts: &str) -> Vec<PathBuf> {
    let Some(mount) = mounts.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        (fields.get(2) == Some(&"cgroup2")).then(|| PathBuf::from(fields[1]))
    }) else {
        return Vec::new();
    };
    let path = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or("");
    // Processes may sit in leaves alone, so ours stands beside the daemon's cgroup, at whichever height we may write.
    Path::new(path).ancestors().skip(usize::from(!path.is_empty())).map(|dir| mount.join(dir).join(ours())).collect()
}

/// The first candidate that grants the most, where any grants something.
fn best(candidates: Vec<PathBuf>, grants: impl Fn(&Path) -> Vec<&'static str>) -> Option<Hierarchy> {
    let mut best = (Vec::new(), PathBuf::new());
    for dir in candidates {
        let granted = grants(&dir);
        if granted.len() > best.0.len() {
            best = (granted, dir);
        }
        // Nothing is tried further up than need be.
        if best.0.len() == CONTROLLERS.len() {
            break;
        }
    }
    let (granted, dir) = best;
    if granted.is_empty() { None } else { Some(Hierarchy::Unified(granted, dir)) }
}

/// Which controllers can be had below `dir`; makes it. One that is not granted keeps no other from being.
fn delegated(dir: &Path) -> Vec<&'static str> {
    let Some(parent) = dir.parent() else { return Vec::new() };
    let enable = |at: &Path, controller| fs::write(at.join("cgroup.subtree_control"), format!("+{controller}")).is_ok();
    // Usually on already; where it is not, it is worth a try.
    for controller in CONTROLLERS {
        enable(parent, controller);
    }
    if !can_fill(dir) {
        return Vec::new();
    }
    CONTROLLERS.into_iter().filter(|controller| enable(dir, controller)).collect()
}

/// Whether we may make cgroups in `dir`; makes `dir` itself.
fn can_fill(dir: &Path) -> bool {
    let trial = dir.join(format!("trial-{}", std::process::id()));
    make_dir(dir).is_ok() && fs::create_dir(&trial).is_ok() && fs::remove_dir(&trial).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "9:name=systemd:/\n4:memory:/box/7\n2:cpu,cpuacct:/\n0::/\n";

    #[test]
    fn limits_become_settings() {
        let limits = Limits { memory_bytes: 1 << 30, cpu_millis: 250, tasks: 64 };
        let unified = settings(&Hierarchy::Unified(CONTROLLERS.into(), "/x".into()), limits);
        assert!(unified.contains(&("cpu.max", "max 100000".into())), "its start is not throttled");
        assert!(unified.contains(&("memory.max", (1u64 << 30).to_string())));
        let partial = settings(&Hierarchy::Unified(vec!["pids"], "/x".into()), limits);
        assert_eq!(partial, [("pids.max", "64".into())], "what is not granted is not set");
        let legacy = settings(&Hierarchy::Legacy("cpu", "/x".into()), limits);
        assert!(legacy.contains(&("cpu.cfs_quota_us", "-1".into())));
        assert!(legacy.contains(&("cpu.shares", "256".into())));
    }

    #[test]
    fn processor_is_limited_on_either_version_and_where_there_is_none() {
        let host = tempfile::tempdir().unwrap();
        let dirs = ["v2", "v1", "memory-alone"].map(|name| host.path().join(name));
        for dir in &dirs {
            fs::create_dir(dir).unwrap();
        }
        let files = ["v2/cpu.max", "v2/cpu.max.burst", "v1/cpu.cfs_quota_us", "v1/cpu.cfs_burst_us"];
        for file in files {
            fs::write(host.path().join(file), "").unwrap();
        }
        limit_processor(&dirs, 250).unwrap();
        let written = files.map(|file| fs::read_to_string(host.path().join(file)).unwrap());
        assert_eq!(written, ["25000 100000", "25000", "25000", "25000"]);
        assert_eq!(fs::read_dir(&dirs[2]).unwrap().count(), 0, "no file is made");
        // A kernel without bursts, and a VM that has ended.
        fs::remove_file(host.path().join("v2/cpu.max.burst")).unwrap();
        limit_processor(&dirs, 500).unwrap();
        assert_eq!(fs::read_to_string(host.path().join("v2/cpu.max")).unwrap(), "50000 100000");
        limit_processor(&[host.path().join("gone")], 250).unwrap();
        limit_processor(&[], 250).unwrap();
    }

    #[test]
    fn kills_are_counted() {
        assert_eq!(oom_kills("low 0\nhigh 0\nmax 9\noom 1\noom_kill 1\noom_group_kill 0\n"), 1);
        assert_eq!(oom_kills("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"), 2);
        assert_eq!(oom_kills("oom_kill_disable 1\nunder_oom 1\n"), 0);
    }

    #[test]
    fn a_controller_is_found_by_its_mount_options() {
        let mounts = "cgroup /cg/cpu cgroup rw,relatime,cpu,cpuacct 0 0\ncgroup2 /cg/unified cgroup2 rw 0 0\n";
        assert_eq!(legacy_dir("cpu", HYBRID, mounts), Some(Path::new("/cg/cpu").join(ours())));
        assert_eq!(legacy_dir("memory", HYBRID, mounts), None);
    }

    #[test]
    fn the_unified_tree_is_tried_from_our_sibling_upwards() {
        let mounts = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
        let found = unified_candidates("0::/user.slice/user-7.slice/app.scope\n", mounts);
        let root = Path::new("/sys/fs/cgroup");
        assert_eq!(found, ["user.slice/user-7.slice", "user.slice", ""].map(|dir| root.join(dir).join(ours())));
    }

    #[test]
    fn the_place_that_grants_the_most_is_used() {
        let candidates = || ["a", "b", "c"].map(PathBuf::from).to_vec();
        let found = best(candidates(), |dir| if dir == Path::new("a") { vec!["pids"] } else { vec!["memory", "pids"] });
        assert_eq!(found, Some(Hierarchy::Unified(vec!["memory", "pids"], "b".into())));
        assert_eq!(best(candidates(), |_| Vec::new()), None);
    }

    #[test]
    fn kills_are_found_where_the_vm_was() {
        let elsewhere = tempfile::tempdir().unwrap();
        let dirs = [elsewhere.path().join("vm")];
        assert!(!ran_out_of_memory(&dirs));
        fs::create_dir(&dirs[0]).unwrap();
        fs::write(dirs[0].join("memory.events"), "oom 1\noom_kill 1\n").unwrap();
        assert!(ran_out_of_memory(&dirs));
    }

    #[test]
    fn a_group_comes_and_goes() {
        let cgroups = Cgroups::detect();
        let name = format!("test-{}", std::process::id());
        let dirs = cgroups.dirs(&name);
        cgroups.create(&dirs, Limits { memory_bytes: 1 << 30, cpu_millis: 500, tasks: 32 }).unwrap();
        assert_eq!(dirs.len(), cgroups.hierarchies.len());
        assert!(dirs.iter().all(|dir| dir.is_dir()));
        limit_processor(&dirs, 500).unwrap();
        let quota = |file: &str| dirs.iter().find_map(|dir| fs::read_to_string(dir.join(file)).ok());
        if let Some(quota) = quota("cpu.cfs_quota_us") {
            assert_eq!(quota.trim(), "50000");
        }
        if let Some(quota) = quota("cpu.max") {
            assert_eq!(quota.trim(), "50000 100000");
        }
        remove(&dirs).unwrap();
        assert!(dirs.iter().all(|dir| !dir.exists()));
        remove(&dirs).unwrap();
    }
}
