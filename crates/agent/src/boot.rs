//! From the kernel's first step to a guest that waits for its host: file systems, modules, the port.
//!
//! Everything that is the same in all clones is done here, before the template is taken, and nothing that differs.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{OpenOptionsExt, symlink},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use heyvm_agent_protocol::{PORT_NAME, ports};
use nix::{
    errno::Errno,
    kmod::{ModuleInitFlags, finit_module},
    libc::{O_DIRECTORY, O_NOCTTY},
    mount::{MsFlags, mount},
    sys::stat::{Mode, umask},
};

use crate::{console, personalize::network, pit, settings};

/// The cgroup that everything but the agent lives in.
pub const SANDBOX_CGROUP: &str = "/sys/fs/cgroup/sandbox";
/// Processes and threads of a sandbox, at most, and a quarter of what the kernel would allow for so much memory: a fork
/// bomb ends here and leaves memory to the others.
const MAX_TASKS: u64 = 4096;
/// Devices appear a moment after their module is loaded.
const DEVICE_DEADLINE: Duration = Duration::from_secs(10);

/// A guest that is up.
pub struct Booted {
    /// The port that the host's calls come from.
    pub calls: PathBuf,
    /// The port that connections to programs come from.
    pub streams: PathBuf,
    /// Where children are born, where the kernel has such a thing.
    pub cgroup: Option<OwnedFd>,
}

/// Brings the guest up.
pub fn boot() -> io::Result<Booted> {
    umask(Mode::from_bits_truncate(0o022));
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount_new("proc", "/proc", quiet, "")?;
    mount_new("sysfs", "/sys", quiet, "")?;
    mount_new("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=0755")?;
    console::open(File::options().write(true).custom_flags(O_NOCTTY).open("/dev/console")?);
    load_modules(Path::new("/modules"))?;
    await_file(Path::new("/dev/vda"))?;
    mount(Some("/dev/vda"), "/ro", Some("erofs"), MsFlags::MS_RDONLY, None::<&str>).map_err(named("/ro"))?;
    mount_the_rest(quiet)?;
    settings::apply()?;
    if let Err(error) = pit::stop() {
        console::say(format_args!("could not stop the interval timer: {error}"));
    }
    network::prepare();
    let cgroup = make_cgroup().inspect_err(|error| console::say(format_args!("no limit on processes: {error}"))).ok();
    Ok(Booted { calls: find_port(PORT_NAME)?, streams: find_port(ports::PORT_NAME)?, cgroup })
}

fn named(what: &str) -> impl FnOnce(Errno) -> io::Error {
    move |errno| io::Error::other(format!("{what}: {}", errno.desc()))
}

fn mount_new(kind: &str, at: &str, flags: MsFlags, options: &str) -> io::Result<()> {
    fs::create_dir_all(at)?;
    match mount(Some(kind), at, Some(kind), flags, Some(options).filter(|o| !o.is_empty())) {
        // Some kernels mount their devices themselves.
        Err(Errno::EBUSY) => Ok(()),
        done => done.map_err(named(at)),
    }
}

/// What programs expect below /dev, /sys and /run; a clone moves these mounts into its root as they are.
fn mount_the_rest(quiet: MsFlags) -> io::Result<()> {
    let no_devices = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount_new("devpts", "/dev/pts", MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, "gid=5,mode=620,ptmxmode=666")?;
    mount_new("tmpfs", "/dev/shm", no_devices, "mode=1777")?;
    mount_new("mqueue", "/dev/mqueue", quiet, "")?;
    // With /dev/shm, which may take half of the memory, it must not take all: what is in them cannot be given up.
    mount_new("tmpfs", "/run", no_devices, "mode=0755,size=20%")?;
    for (name, target) in [("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        match symlink(format!("/proc/self/{target}"), format!("/dev/{name}")) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Loads every module that is listed and frees the memory that the files took.
fn load_modules(dir: &Path) -> io::Result<()> {
    let order = fs::read_to_string(dir.join("order"))?;
    for name in order.lines().map(str::trim).filter(|name| !name.is_empty()) {
        let file = File::open(dir.join(name)).map_err(|error| io::Error::other(format!("{name}: {error}")))?;
        match finit_module(&file, c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(Errno::EEXIST) => {}
            // One that this machine has no use for: what is really needed is missed later on.
            Err(errno) => console::say(format_args!("module {name}: {}", errno.desc())),
        }
    }
    Ok(heyvm_trees::remove(dir)?)
}

fn make_cgroup() -> io::Result<OwnedFd> {
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount_new("cgroup2", "/sys/fs/cgroup", quiet, "nsdelegate")?;
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+pids")?;
    fs::create_dir_all(SANDBOX_CGROUP)?;
    let threads = fs::read_to_string("/proc/sys/kernel/threads-max")?.trim().parse().unwrap_or(MAX_TASKS);
    fs::write(format!("{SANDBOX_CGROUP}/pids.max"), MAX_TASKS.min(threads / 4).to_string())?;
    Ok(File::options().read(true).custom_flags(O_DIRECTORY).open(SANDBOX_CGROUP)?.into())
}

fn find_port(name: &str) -> io::Result<PathBuf> {
    let search = || {
        let ports = fs::read_dir("/sys/class/virtio-ports").ok()?.flatten();
        let named = |port: &fs::DirEntry| fs::read_to_string(port.path().join("name")).is_ok_and(|n| n.trim() == name);
        ports.into_iter().find(named).map(|port| Path::new("/dev").join(port.file_name()))
    };
    let port = until(|| search().filter(|port| port.exists()));
    port.ok_or_else(|| io::Error::other(format!("there is no virtio-serial port {name}")))
}

fn await_file(path: &Path) -> io::Result<()> {
    until(|| path.exists().then_some(())).ok_or_else(|| io::Error::other(format!("{} has not come", path.display())))
}

fn until<T>(look: impl Fn() -> Option<T>) -> Option<T> {
    let give_up = Instant::now() + DEVICE_DEADLINE;
    loop {
        let found = look();
        if found.is_some() || Instant::now() > give_up {
            return found;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
