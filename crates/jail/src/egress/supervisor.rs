//! `heyvm egress`: starts the namespace's holder and keeps pasta running beside it.
//!
//! ```text
//! first process ─fork─▶ supervisor (host's network) ─fork─▶ holder (own network, own user namespace unless root)
//!      ends                   │ runs pasta, again when it ends; ends when the holder does
//! ```

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    net::Ipv4Addr,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    libc,
    sched::{CloneFlags, unshare},
    sys::{
        prctl,
        signal::Signal,
        wait::{WaitStatus, wait},
    },
    unistd::{ForkResult, Pid, fork, getgid, getuid, setsid},
};

use super::{Failure, RESOLVER, Start, holder, interface};
use crate::channel;

/// What network devices of programs are made from; open to all on most systems, but not where no udev runs.
pub(super) const TUN: &str = "/dev/net/tun";
/// pasta's device in the namespace.
pub(super) const UPLINK: &str = "up0";
/// A pasta that ended is started again after this.
const RESTART_DELAY: Duration = Duration::from_millis(300);
/// One that ends at once, again and again, is started ever more seldom.
const LONGEST_RESTART_DELAY: Duration = Duration::from_secs(60);
/// A pasta that has lived this long was all right.
const ALL_RIGHT: Duration = Duration::from_secs(10);

/// Entry point of `heyvm egress`.
pub fn main_egress() -> ! {
    let socket = io::stdin();
    // SAFETY: this program has one thread, so the child may do anything a process may.
    match unsafe { fork() } {
        Ok(ForkResult::Parent { .. }) => std::process::exit(0),
        Ok(ForkResult::Child) => {}
        Err(error) => fail(socket.as_fd(), format!("forking the egress supervisor: {error}").into()),
    }
    match supervise(socket.as_fd()) {
        Ok(()) => std::process::exit(0),
        Err(why) => fail(socket.as_fd(), why),
    }
}

fn fail(socket: BorrowedFd<'_>, failure: Failure) -> ! {
    eprintln!("{failure}");
    channel::send(socket, &Err::<(), Failure>(failure), &[]).ok();
    std::process::exit(1)
}

fn supervise(socket: BorrowedFd<'_>) -> Result<(), Failure> {
    let told = |doing: &'static str| move |error: io::Error| format!("{doing}: {error}");
    let (start, mut descriptors) =
        channel::receive::<Start>(socket).map_err(told("reading the egress settings"))?.ok_or("no egress settings")?;
    let listener = descriptors.pop().ok_or("no egress socket")?;
    setsid().ok();
    // pasta itself would not say which device it is.
    File::options().read(true).write(true).open(TUN).map_err(|error| Failure::tun(&error))?;
    let host = interface::own_addresses();
    let (mut ready, holder) = start_holder(start, host, listener)?;
    let mut pasta = start_pasta(holder)?;
    let mut answer = Vec::new();
    ready.read_to_end(&mut answer).map_err(told("waiting for the egress namespace"))?;
    let made: Result<(), Failure> =
        serde_json::from_slice(&answer).unwrap_or_else(|_| Err("the egress namespace could not be made".into()));
    if let Err(failure) = made {
        pasta.kill().ok();
        return Err(failure);
    }
    channel::send(socket, &Ok::<(), Failure>(()), &[]).map_err(told("answering the daemon"))?;
    keep_running(holder, pasta)
}

/// Starts pasta again when it ends, until the holder does.
fn keep_running(holder: Pid, mut pasta: Child) -> Result<(), Failure> {
    let (mut began, mut delay) = (Instant::now(), RESTART_DELAY);
    loop {
        let ended = match wait() {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) => pid,
            Ok(_) => continue,
            Err(error) => return Err(format!("waiting for children: {error}").into()),
        };
        if ended == holder {
            pasta.kill().ok();
            return Ok(());
        }
        if ended.as_raw() == pasta.id() as i32 {
            if began.elapsed() > ALL_RIGHT {
                delay = RESTART_DELAY;
            }
            std::thread::sleep(delay);
            delay = (delay * 2).min(LONGEST_RESTART_DELAY);
            pasta = start_pasta(holder)?;
            began = Instant::now();
        }
    }
}

/// Returns the end of a pipe that says, in JSON, that the namespace works, or why it does not.
fn start_holder(start: Start, host: Vec<Ipv4Addr>, listener: OwnedFd) -> Result<(io::PipeReader, Pid), Failure> {
    let told = |doing: &'static str| move |error: io::Error| format!("{doing}: {error}");
    let (mut in_namespace, entered) = io::pipe().map_err(told("making a pipe"))?;
    let (ready, mut say) = io::pipe().map_err(told("making a pipe"))?;
    // SAFETY: this program has one thread, so the child may do anything a process may.
    match unsafe { fork() }.map_err(|error| format!("forking the egress holder: {error}"))? {
        ForkResult::Child => {
            drop((in_namespace, ready));
            let held = enter_namespace().and_then(|()| {
                drop(entered);
                holder::prepare(&start.settings, &host)
            });
            say.write_all(&serde_json::to_vec(&held).unwrap_or_default()).ok();
            drop(say);
            if held.is_ok() {
                holder::serve(listener);
            }
            std::process::exit(i32::from(held.is_err()))
        }
        ForkResult::Parent { child } => {
            drop((entered, say, listener));
            in_namespace.read_to_end(&mut Vec::new()).map_err(told("waiting for the egress holder"))?;
            Ok((ready, child))
        }
    }
}

fn enter_namespace() -> Result<(), Failure> {
    let told = |doing: &'static str| move |error: String| format!("{doing}: {error}");
    let (uid, gid) = (getuid(), getgid());
    let mut namespaces = CloneFlags::CLONE_NEWNET;
    if !uid.is_root() {
        namespaces |= CloneFlags::CLONE_NEWUSER;
    }
    prctl::set_pdeathsig(Signal::SIGTERM).map_err(|e| told("tying the holder to its supervisor")(e.to_string()))?;
    unshare(namespaces).map_err(|error| Failure::namespace("entering a network namespace", error))?;
    if uid.is_root() {
        give_up_capabilities().map_err(|e| told("giving up capabilities")(e.to_string()))?;
    } else {
        let write =
            |file: &str, text: String| fs::write(file, text).map_err(|e| Failure::namespace("mapping the user", e));
        write("/proc/self/setgroups", "deny".into())?;
        write("/proc/self/uid_map", format!("0 {uid} 1"))?;
        write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    }
    Ok(())
}

/// What the holder needs from now on, and less than pasta has: nobody may look into the namespaces of a process that can
/// do more than he can.
fn give_up_capabilities() -> io::Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    const NET_ADMIN: u32 = 1 << 12;
    let header = [VERSION_3, 0];
    // Effective, permitted and inheritable; the lower 32 capabilities first.
    let sets = [NET_ADMIN, NET_ADMIN, 0, 0, 0, 0];
    // SAFETY: the kernel reads two numbers and, in version 3, six; both are there.
    match unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn start_pasta(holder: Pid) -> Result<Child, Failure> {
    let mut command = Command::new("pasta");
    command
        .args(["--foreground", "--quiet", "--ipv4-only", "--config-net", "--no-map-gw", "--ns-ifname", UPLINK])
        .args(["-t", "none", "-u", "none", "-T", "none", "-U", "none", "--dns-forward"])
        .arg(RESOLVER.to_string())
        .args(["--netns", &format!("/proc/{holder}/ns/net")])
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    if getuid().is_root() {
        command.args(["--runas", "0"]);
    } else {
        command.args(["--userns", &format!("/proc/{holder}/ns/user")]);
    }
    // SAFETY: between fork and exec only prctl is called, which is safe there.
    unsafe { command.pre_exec(|| Ok(prctl::set_pdeathsig(Signal::SIGTERM)?)) };
    command.spawn().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Failure::NoPasta,
        _ => format!("starting pasta: {error}").into(),
    })
}
