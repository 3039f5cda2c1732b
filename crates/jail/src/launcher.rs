//! `heyvm jail`: reads one [`JailSpec`] from its standard input, confines itself and becomes the given program.
//!
//! ```text
//! daemon ──spec + descriptors──▶ launcher: cgroups, namespaces ──fork──▶ child: waits
//!        ◀──process id───────── launcher: writes the id file, lets go ─▶ child: root, descriptors, identity, exec
//! ```
//! The id file is written before the program runs, so no confined process is ever without one: a daemon that is
//! killed in between finds it. The launcher then ends; the program is nobody's child and survives the daemon.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use nix::{
    libc,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::{
        prctl,
        resource::Resource,
        resource::setrlimit,
        stat::{Mode, SFlag, mknod, stat, umask},
    },
    unistd::{ForkResult, Gid, Uid, chdir, execve, fork, getuid, pivot_root, setgroups, setresgid, setresuid, setsid},
};
use serde::{Deserialize, Serialize};

use crate::{Error, channel, process::ProcessId};

/// What a confined process is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JailSpec {
    /// Its root directory, read-only; see [`crate::root`].
    pub root: PathBuf,
    /// Program (a path below `root`) and arguments.
    pub argv: Vec<String>,
    /// User and group id it runs as, where the daemon is root; otherwise a user namespace stands in.
    pub uid: u32,
    /// Number each passed descriptor gets, in order; 0 to 2 are made by the launcher unless given.
    pub descriptors: Vec<RawFd>,
    /// Cgroup directories it is put into.
    pub cgroups: Vec<PathBuf>,
    /// Device files it may open, for example `/dev/kvm`.
    pub devices: Vec<PathBuf>,
    /// File that gets its process id and start time.
    pub id_file: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    Started { pid: i32 },
    Failed { why: String },
}

/// Directory in the jail whose entries are the process's own descriptors, for programs that open by path.
pub const DESCRIPTORS_DIR: &str = "/fd";
/// A launcher answers within milliseconds, on a busy host within seconds.
const PATIENCE: Duration = Duration::from_secs(60);
/// User id that the process sees itself as in a user namespace.
const INNER_UID: u32 = 1000;

/// Daemon side: starts `launcher` (our own program) and has it become what `spec` says. Blocks for some milliseconds.
pub fn spawn(launcher: &Path, spec: &JailSpec, descriptors: &[BorrowedFd<'_>]) -> Result<ProcessId, Error> {
    let (ours, theirs) = channel::pair().map_err(Error::io("opening a channel to the jail", launcher))?;
    channel::be_patient_for(&ours, PATIENCE).map_err(Error::io("opening a channel to the jail", launcher))?;
    let mut child = Command::new(launcher)
        .arg("jail")
        .env_clear()
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(Error::io("starting the jail launcher", launcher))?;
    let told = channel::send(&ours, spec, descriptors).and_then(|()| channel::receive::<Reply>(&ours));
    if told.is_err() {
        child.kill().map_err(Error::io("ending the jail launcher", launcher))?;
    }
    child.wait().map_err(Error::io("waiting for the jail launcher", launcher))?;
    match told.map_err(Error::io("talking to the jail launcher", launcher))? {
        Some((Reply::Started { pid }, _)) => ProcessId::of(pid).map_err(|_| {
            Error::Refused(format!("{} ended at its start", spec.argv.first().map_or("", |a| a.as_str())))
        }),
        Some((Reply::Failed { why }, _)) => Err(Error::Refused(why)),
        None => Err(Error::Refused("the jail launcher ended without a word".into())),
    }
}

/// Entry point of `heyvm jail`. Never returns an exit status that matters: the daemon reads the reply.
pub fn main_jail() -> ! {
    let socket = io::stdin();
    let reply = match launch(socket.as_fd()) {
        Ok(pid) => Reply::Started { pid },
        Err(why) => Reply::Failed { why },
    };
    let sent = channel::send(socket.as_fd(), &reply, &[]);
    std::process::exit(i32::from(sent.is_err()))
}

/// Errors here are sentences: they cross a process boundary.
type Launch<T> = Result<T, String>;

fn launch(socket: BorrowedFd<'_>) -> Launch<i32> {
    let (spec, descriptors) = channel::receive::<JailSpec>(socket)
        .map_err(told("reading the jail's description"))?
        .ok_or("no description of the jail")?;
    if descriptors.len() != spec.descriptors.len() {
        return Err("descriptors and their numbers do not match".into());
    }
    for cgroup in &spec.cgroups {
        fs::write(cgroup.join("cgroup.procs"), "0").map_err(told("entering the cgroup"))?;
    }
    enter_namespaces()?;
    let (mut go_receiver, mut go_sender) = io::pipe().map_err(told("making a pipe"))?;
    let (mut error_receiver, error_sender) = io::pipe().map_err(told("making a pipe"))?;
    // SAFETY: this program has one thread, so the child may do anything a process may.
    match unsafe { fork() }.map_err(told("forking"))? {
        ForkResult::Child => {
            drop((go_sender, error_receiver));
            let mut go = [0];
            // The end of the pipe without a byte means that the launcher died: then nobody knows this process.
            if go_receiver.read_exact(&mut go).is_ok() {
                let why = become_program(&spec, descriptors).err().unwrap_or_default();
                (&error_sender).write_all(why.as_bytes()).ok();
            }
            std::process::exit(1)
        }
        ForkResult::Parent { child } => {
            drop((go_receiver, error_sender, descriptors));
            let id = ProcessId::of(child.as_raw()).map_err(told("looking at the confined process"))?;
            fs::write(&spec.id_file, id.to_string()).map_err(told("writing the process id"))?;
            go_sender.write_all(b"!").map_err(told("letting the confined process go"))?;
            drop(go_sender);
            let mut why = String::new();
            error_receiver.read_to_string(&mut why).map_err(told("waiting for the confined process"))?;
            if why.is_empty() { Ok(child.as_raw()) } else { Err(why) }
        }
    }
}

fn told<E: std::fmt::Display>(doing: &'static str) -> impl FnOnce(E) -> String {
    move |error| format!("{doing}: {error}")
}

fn enter_namespaces() -> Launch<()> {
    let mut namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    let (uid, gid) = (getuid(), nix::unistd::getgid());
    if !uid.is_root() {
        namespaces |= CloneFlags::CLONE_NEWUSER;
    }
    unshare(namespaces).map_err(told("entering namespaces (are unprivileged user namespaces allowed here?)"))?;
    if !uid.is_root() {
        map_identity(uid, gid)?;
    }
    Ok(())
}

/// Maps our own user and group, and no other, into the new user namespace.
fn map_identity(uid: Uid, gid: Gid) -> Launch<()> {
    fs::write("/proc/self/setgroups", "deny").map_err(told("forbidding setgroups"))?;
    fs::write("/proc/self/uid_map", format!("{INNER_UID} {uid} 1")).map_err(told("mapping the user"))?;
    fs::write("/proc/self/gid_map", format!("{INNER_UID} {gid} 1")).map_err(told("mapping the group"))
}

/// Returns only on a failure.
fn become_program(spec: &JailSpec, descriptors: Vec<OwnedFd>) -> Launch<()> {
    setsid().map_err(told("starting a session"))?;
    let standard = File::options().read(true).write(true).open("/dev/null").map_err(told("opening /dev/null"))?;
    enter_root(spec)?;
    place_descriptors(spec, descriptors, &standard)?;
    limit_resources()?;
    drop_identity(spec.uid)?;
    let argv: Vec<CString> =
        spec.argv.iter().map(|a| CString::new(a.as_str())).collect::<Result<_, _>>().map_err(told("reading argv"))?;
    let program = argv.first().ok_or("no program")?;
    execve(program, &argv, &[c"HOME=/"; 1]).map_err(told("starting the confined program"))?;
    Ok(())
}

/// Makes the prepared directory the root: read-only, without devices but the named ones, without set-user-id.
fn enter_root(spec: &JailSpec) -> Launch<()> {
    umask(Mode::empty());
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).map_err(told("making mounts private"))?;
    let root = spec.root.as_path();
    mount(Some(root), root, none, MsFlags::MS_BIND, none).map_err(told("mounting the jail's root"))?;
    let read_only =
        MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(none, root, none, read_only, none).map_err(told("making the jail's root read-only"))?;
    let inside = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
    mount(Some("/proc/self/fd"), &inside(Path::new(DESCRIPTORS_DIR)), none, MsFlags::MS_BIND, none)
        .map_err(told("mounting the descriptors' directory"))?;
    provide_devices(spec, &inside)?;
    chdir(root).map_err(told("entering the jail's root"))?;
    pivot_root(".", ".").map_err(told("changing the root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(told("leaving the host's root"))?;
    chdir("/").map_err(told("entering the root"))?;
    umask(Mode::from_bits_truncate(0o077));
    Ok(())
}

/// Root makes new nodes that the unprivileged identity may open, whoever owns the host's; a user gets the host's own.
fn provide_devices(spec: &JailSpec, inside: &impl Fn(&Path) -> PathBuf) -> Launch<()> {
    let none = None::<&str>;
    if getuid().is_root() && !spec.devices.is_empty() {
        let options = Some("size=64k,mode=755");
        mount(
            Some("devices"),
            &inside(Path::new("/dev")),
            Some("tmpfs"),
            MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
            options,
        )
        .map_err(told("mounting the devices' directory"))?;
    }
    for device in &spec.devices {
        if getuid().is_root() {
            let number = stat(device).map_err(told("looking at a device"))?.st_rdev;
            let mode = Mode::from_bits_truncate(0o666);
            mknod(&inside(device), SFlag::S_IFCHR, mode, number).map_err(told("making a device"))?;
        } else {
            mount(Some(device.as_path()), &inside(device), none, MsFlags::MS_BIND, none)
                .map_err(told("mounting a device"))?;
        }
    }
    Ok(())
}

/// Gives each descriptor its number. First all are moved out of the way of the numbers that are wanted.
fn place_descriptors(spec: &JailSpec, descriptors: Vec<OwnedFd>, standard: &File) -> Launch<()> {
    let failed = || format!("placing a descriptor: {}", io::Error::last_os_error());
    let above = spec.descriptors.iter().max().map_or(3, |most| most + 1).max(3);
    let mut placed = Vec::new();
    for (fd, wanted) in descriptors.into_iter().zip(&spec.descriptors) {
        // SAFETY: fcntl with F_DUPFD_CLOEXEC on a descriptor that we own makes a new one.
        let moved = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, above) };
        if moved < 0 {
            return Err(failed());
        }
        // Its old number may be one that is wanted; it closes with the program's start in any case.
        std::mem::forget(fd);
        placed.push((moved, *wanted));
    }
    // SAFETY: close_range takes integers; everything from 3 on closes on exec, also what the daemon inherited itself.
    if unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) } < 0 {
        return Err(failed());
    }
    let standards = (0..3).filter(|n| !spec.descriptors.contains(n)).map(|n| (standard.as_raw_fd(), n));
    for (from, to) in standards.chain(placed) {
        // SAFETY: dup2 onto a number that nothing in this single-threaded child uses any more.
        if unsafe { libc::dup2(from, to) } < 0 {
            return Err(failed());
        }
    }
    Ok(())
}

fn limit_resources() -> Launch<()> {
    // Huge pages would make a sparsely used translation cache cost several times what is in it.
    prctl::set_thp_disable(true).map_err(told("forbidding huge pages"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(told("forbidding core dumps"))?;
    setrlimit(Resource::RLIMIT_NOFILE, 512, 512).map_err(told("limiting open files"))
}

fn drop_identity(uid: u32) -> Launch<()> {
    if getuid().is_root() {
        let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
        setgroups(&[]).map_err(told("dropping groups"))?;
        setresgid(group, group, group).map_err(told("dropping the group"))?;
        setresuid(user, user, user).map_err(told("dropping the user"))?;
    }
    prctl::set_no_new_privs().map_err(told("forbidding new privileges"))
}
