//! What a test may not leave behind: processes, disks, sockets, network devices, mounts, cgroups.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::Ran;

/// How long things may take to go once they have been told to.
const PATIENCE: Duration = Duration::from_secs(10);

/// A process that belongs to a home.
#[derive(Debug, Clone)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Short name, as the kernel has it.
    pub name: String,
    /// Command line.
    pub arguments: Vec<String>,
}

impl Process {
    /// Whether it is a virtual machine.
    pub fn is_qemu(&self) -> bool {
        self.name.starts_with("qemu") || self.arguments.first().is_some_and(|program| program.contains("qemu-system"))
    }
}

/// Every process that has something to do with a directory: named in its environment or command line, or open in it.
pub fn processes_of(directory: &Path) -> Vec<Process> {
    let needle = directory.to_str().expect("UTF-8 path").as_bytes();
    let holds = |bytes: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
    let own = std::process::id() as i32;
    let mut found = Vec::new();
    for entry in entries(Path::new("/proc")) {
        let Some(pid) = entry.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        if pid == own || fs::read_to_string(entry.join("stat")).is_ok_and(|stat| stat.contains(") Z ")) {
            continue;
        }
        let command = fs::read(entry.join("cmdline")).unwrap_or_default();
        let belongs = holds(&command)
            || fs::read(entry.join("environ")).is_ok_and(|environment| holds(&environment))
            || entries(&entry.join("fd")).any(|fd| fs::read_link(fd).is_ok_and(|target| target.starts_with(directory)));
        if belongs {
            let arguments =
                command.split(|byte| *byte == 0).map(|text| String::from_utf8_lossy(text).into_owned()).collect();
            let name = fs::read_to_string(entry.join("comm")).unwrap_or_default().trim().to_owned();
            found.push(Process { pid, name, arguments });
        }
    }
    found
}

/// The virtual machines of a home.
pub fn machines_of(directory: &Path) -> Vec<Process> {
    processes_of(directory).into_iter().filter(Process::is_qemu).collect()
}

/// What is left of sandboxes after all were removed, the daemon still running.
pub fn left_after_removal(root: &Path, home: &Path, ids: &[String]) -> Vec<String> {
    patiently(|| {
        let mut left: Vec<String> =
            machines_of(root).iter().map(|machine| format!("QEMU process {}", machine.pid)).collect();
        left.extend(entries(&home.join("sandboxes")).map(|path| format!("{}", path.display())));
        left.extend(control_groups(ids).into_iter().map(|path| format!("cgroup {}", path.display())));
        left.extend(network_devices(root).into_iter().map(|device| format!("network device {device}")));
        left
    })
}

/// What is left of a home after its daemon has ended in order and no sandbox is there.
pub fn left_after_shutdown(root: &Path) -> Vec<String> {
    patiently(|| {
        let mut left: Vec<String> = processes_of(root)
            .iter()
            .map(|process| format!("process {} ({}): {}", process.pid, process.name, process.arguments.join(" ")))
            .collect();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let root = root.to_str().expect("UTF-8 path");
        left.extend(mounts.lines().filter(|line| line.contains(root)).map(|line| format!("mount {line}")));
        left
    })
}

/// Kills every process of a directory: the last resort, so that a failed test does not disturb the others.
pub fn end_all(directory: &Path) {
    for process in processes_of(directory) {
        let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
    }
}

/// Entries of a directory; none when it cannot be read.
pub fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn patiently(mut look: impl FnMut() -> Vec<String>) -> Vec<String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = look();
        if left.is_empty() || Instant::now() > deadline {
            return left;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Control groups whose name has one of these ids in it.
fn control_groups(ids: &[String]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut directories = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(directory) = directories.pop() {
        for path in entries(&directory).filter(|path| path.is_dir() && !path.is_symlink()) {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if ids.iter().any(|id| name.contains(id.as_str())) {
                found.push(path.clone());
            }
            directories.push(path);
        }
    }
    found
}

/// Tap devices in the network namespaces of a home's processes; those of sandboxes, since nothing else makes any.
fn network_devices(root: &Path) -> Vec<String> {
    let host = fs::read_link("/proc/self/ns/net").ok();
    let mut seen = vec![host];
    let mut found = Vec::new();
    for process in processes_of(root) {
        let namespace = fs::read_link(format!("/proc/{}/ns/net", process.pid)).ok();
        if namespace.is_none() || seen.contains(&namespace) {
            continue;
        }
        seen.push(namespace);
        let net = format!("--net=/proc/{}/ns/net", process.pid);
        let listed = Ran::of(Command::new("nsenter").args([&net, "ip", "-o", "link", "show", "type", "tun"]), b"");
        found.extend(
            listed
                .out()
                .lines()
                .filter_map(|line| line.split(": ").nth(1))
                .filter(|name| name.starts_with("hv"))
                .map(str::to_owned),
        );
    }
    found
}
