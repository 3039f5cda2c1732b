//! What a test may not leave behind: processes, disks, sockets, mounts, cgroups. Network devices need no look of their
//! own: they live in namespaces, and those in processes.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

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
    /// Whether it is a machine that the daemon keeps in reserve for later sandboxes.
    pub reserve: bool,
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
        let mut open = entries(&entry.join("fd"))
            .filter_map(|fd| fs::read_link(fd).ok())
            .filter(|target| target.starts_with(directory));
        let first = open.next();
        let reserve = first.iter().chain(&open.collect::<Vec<_>>()).any(|path| in_reserve(path));
        let belongs = holds(&command)
            || first.is_some()
            || fs::read(entry.join("environ")).is_ok_and(|environment| holds(&environment));
        if belongs {
            let arguments =
                command.split(|byte| *byte == 0).map(|text| String::from_utf8_lossy(text).into_owned()).collect();
            let name = fs::read_to_string(entry.join("comm")).unwrap_or_default().trim().to_owned();
            found.push(Process { pid, name, arguments, reserve });
        }
    }
    found
}

/// The virtual machines of a home's sandboxes.
pub fn machines_of(directory: &Path) -> Vec<Process> {
    processes_of(directory).into_iter().filter(|process| process.is_qemu() && !process.reserve).collect()
}

/// The directories of a home's sandboxes.
pub fn sandboxes_of(home: &Path) -> Vec<PathBuf> {
    entries(&home.join("sandboxes")).filter(|path| !in_reserve(path)).collect()
}

/// Control groups of a home's virtual machines, and those that bear the name of one of its sandboxes, gone or not.
pub fn control_groups_of(directory: &Path, sandboxes: &[String]) -> Vec<PathBuf> {
    let machines = processes_of(directory).into_iter().filter(Process::is_qemu);
    let mut found: Vec<_> = machines.flat_map(|machine| control_groups(machine.pid)).collect();
    named_below(Path::new("/sys/fs/cgroup"), sandboxes, &mut found);
    found
}

fn named_below(directory: &Path, names: &[String], found: &mut Vec<PathBuf>) {
    for path in entries(directory).filter(|path| path.is_dir() && !path.is_symlink()) {
        let name = path.file_name().unwrap_or_default();
        if names.iter().any(|sandbox| name == sandbox.as_str()) {
            found.push(path);
        } else {
            named_below(&path, names, found);
        }
    }
}

/// Machines in reserve have ids that no sandbox has.
fn in_reserve(path: &Path) -> bool {
    path.components().any(|part| part.as_os_str().to_string_lossy().starts_with("reserve-"))
}

/// What is left of sandboxes after all were removed, the daemon still running.
pub fn left_after_removal(root: &Path, home: &Path) -> Vec<String> {
    patiently(|| {
        let mut left: Vec<String> =
            machines_of(root).iter().map(|machine| format!("QEMU process {}", machine.pid)).collect();
        left.extend(sandboxes_of(home).iter().map(|path| format!("{}", path.display())));
        left
    })
}

/// What is left of a home after its daemon has ended in order and no sandbox is there.
pub fn left_after_shutdown(root: &Path, home: &Path, control_groups: &[PathBuf]) -> Vec<String> {
    patiently(|| {
        let mut left: Vec<String> = processes_of(root)
            .iter()
            .map(|process| format!("process {} ({}): {}", process.pid, process.name, process.arguments.join(" ")))
            .collect();
        left.extend(entries(&home.join("sandboxes")).map(|path| format!("{}", path.display())));
        left.extend(
            control_groups.iter().filter(|path| path.exists()).map(|path| format!("cgroup {}", path.display())),
        );
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let root = root.to_str().expect("UTF-8 path");
        left.extend(mounts.lines().filter(|line| line.contains(root)).map(|line| format!("mount {line}")));
        left
    })
}

/// Kills every process of a directory: the last resort, so that a failed test does not disturb the others.
pub fn end_all(directory: &Path) {
    for process in processes_of(directory) {
        kill(Pid::from_raw(process.pid), Signal::SIGKILL).ok();
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

/// The control groups a process is in, but for the ones it shares with the whole system.
fn control_groups(pid: i32) -> Vec<PathBuf> {
    let table = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let path = |line: &str| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, group) = (fields.next()?, fields.next()?);
        Some(Path::new("/sys/fs/cgroup").join(controllers).join(group.trim_start_matches('/')))
    };
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    table.lines().filter(|line| !own.contains(line)).filter_map(path).filter(|path| path.exists()).collect()
}
