//! The way out: one network namespace per daemon that routes, filters and translates what guests send.
//!
//! ```text
//! QEMU ──tap descriptor──▶ hvN ─┐
//! QEMU ──tap descriptor──▶ hvM ─┴─ forward + nftables + masquerade ─ up0 ──▶ pasta ──▶ the host's own sockets
//! ```
//! A guest's tap lives in this namespace, never in the host's nor in QEMU's; QEMU holds its descriptor alone. When QEMU
//! ends, the tap vanishes. Guests reach the internet and the resolver, not the host, not each other, no private range.
//! Nothing of the host's own network set-up is touched, and no privilege is needed beyond user namespaces.

mod failure;
mod holder;
mod interface;
mod ruleset;
mod supervisor;

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    io,
    net::Ipv4Addr,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
    process::{Command, Stdio},
    sync::{Mutex, TryLockError},
    time::Duration,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, Backlog, Shutdown, SockFlag, SockType, UnixAddr, bind, connect, listen, shutdown, socket,
    },
};
use serde::{Deserialize, Serialize};

pub use failure::Failure;
pub use supervisor::main_egress;

use crate::{Error, channel, environment};

/// Largest packet on guests' interfaces, in bytes: as large as pasta's own, so that nothing is cut up on the way.
pub const MTU: u32 = 65_520;
/// Where guests find a resolver: pasta passes this on to the host's.
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 53);
/// First address of the guests' range; each slot takes four: network, gateway, guest, broadcast.
const RANGE: u32 = u32::from_be_bytes([100, 96, 0, 0]);
/// Number of slots in the range 100.96.0.0/13.
pub const SLOTS: u32 = 1 << 17;

/// A holder answers within milliseconds, on a busy host within seconds; it is at its start that pasta is started, too.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the user may decide.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressSettings {
    /// Private ranges that guests may reach all the same, for example `10.1.0.0/16`.
    pub allow: Vec<String>,
}

/// Addresses of one guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// The guest's own.
    pub guest: Ipv4Addr,
    /// Its way out.
    pub gateway: Ipv4Addr,
    /// Length of the network's prefix.
    pub prefix: u8,
}

/// The addresses that belong to a slot.
pub fn addresses(slot: u32) -> Addresses {
    let network = RANGE + (slot % SLOTS) * 4;
    Addresses { gateway: Ipv4Addr::from(network + 1), guest: Ipv4Addr::from(network + 2), prefix: 30 }
}

/// What the supervisor is told at its start; the listening socket comes with it.
#[derive(Debug, Serialize, Deserialize)]
struct Start {
    settings: EgressSettings,
}

#[derive(Debug, Serialize, Deserialize)]
enum Request {
    Tap { slot: u32 },
}

#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    /// The tap's descriptor comes with it.
    Tap,
    Failed(String),
}

/// The daemon's connection to its egress holder. While it is open the holder stays.
#[derive(Debug)]
pub struct Egress {
    socket: Mutex<OwnedFd>,
}

impl Egress {
    /// Connects to the holder of `run_dir` for these settings, starting it when there is none. One with other settings
    /// stays for as long as a VM has a device there. Blocks for some milliseconds.
    pub fn ensure(run_dir: &Path, launcher: &Path, settings: &EgressSettings) -> Result<Self, Error> {
        ruleset::check(settings).map_err(|why| Error::Egress(Failure::Settings(why)))?;
        let name = socket_name(settings);
        if let Ok(socket) = dial(run_dir, &name) {
            return Ok(Self { socket: Mutex::new(socket) });
        }
        start(run_dir, launcher, settings)?;
        let at = run_dir.join(&name);
        let socket = dial(run_dir, &name).map_err(Error::io("connecting to the egress holder", at))?;
        Ok(Self { socket: Mutex::new(socket) })
    }

    /// Whether the holder is still there. It says nothing unasked: what can be read between two requests is the end.
    pub fn is_alive(&self) -> bool {
        let socket = match self.socket.try_lock() {
            Ok(socket) => socket,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // Somebody is talking with it, for as long as the answer may take: that one will see.
            Err(TryLockError::WouldBlock) => return true,
        };
        let mut news = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        poll(&mut news, PollTimeout::ZERO) == Ok(0)
    }

    /// Makes the network device of a slot; its descriptor goes to QEMU. A holder that does not answer in time is none.
    pub fn tap(&self, slot: u32) -> Result<OwnedFd, Error> {
        let socket = self.socket.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let answer = channel::send(&*socket, &Request::Tap { slot }, &[])
            .and_then(|()| channel::receive::<Reply>(&*socket))
            .inspect_err(|_| {
                // One that is closed already is as good.
                shutdown(socket.as_raw_fd(), Shutdown::Both).ok();
            })
            .map_err(Error::io("asking the egress holder for a device", "egress"))?;
        match answer {
            Some((Reply::Tap, mut descriptors)) if descriptors.len() == 1 => Ok(descriptors.remove(0)),
            Some((Reply::Failed(why), _)) => Err(Error::Refused(why)),
            _ => Err(Error::Refused("the egress holder has ended".into())),
        }
    }
}

fn start(run_dir: &Path, launcher: &Path, settings: &EgressSettings) -> Result<(), Error> {
    let listener =
        bind_socket(run_dir, &socket_name(settings)).map_err(Error::io("making the egress socket in", run_dir))?;
    let log_path = run_dir.join("egress.log");
    let log = std::fs::File::options()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(&log_path)
        .map_err(Error::io("opening the egress log", log_path))?;
    let (ours, theirs) = channel::pair().map_err(Error::io("opening a channel to the egress holder", run_dir))?;
    channel::be_patient_for(&ours, PATIENCE).map_err(Error::io("opening a channel to the egress holder", run_dir))?;
    // The supervisor lives as long as the sandboxes do, and pasta and nft get their environment from it.
    let mut child = environment::clean(&mut Command::new(launcher))
        .arg("egress")
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::from(log))
        .spawn()
        .map_err(Error::io("starting the egress holder", launcher))?;
    let reply = channel::send(&ours, &Start { settings: settings.clone() }, &[listener.as_fd()])
        .and_then(|()| channel::receive::<Result<(), Failure>>(&ours));
    if reply.is_err() {
        child.kill().map_err(Error::io("ending", launcher))?;
    }
    // The first process leaves at once; the supervisor is its child, so that it is nobody's afterwards.
    child.wait().map_err(Error::io("waiting for", launcher))?;
    match reply.map_err(Error::io("talking to the egress holder", launcher))? {
        Some((Ok(()), _)) => Ok(()),
        Some((Err(failure), _)) => Err(Error::Egress(failure)),
        None => Err(Error::Egress("the egress holder ended without a word".into())),
    }
}

/// In the daemon's `run` directory; another one for other settings, since a holder's rules are those of its start.
fn socket_name(settings: &EgressSettings) -> String {
    let mut hash = DefaultHasher::new();
    settings.allow.hash(&mut hash);
    format!("egress-{:016x}.sock", hash.finish())
}

/// Socket paths are limited to 107 bytes; a directory's descriptor makes every path short.
fn short_address(run_dir: &Path, name: &str) -> io::Result<(std::fs::File, UnixAddr)> {
    let dir = std::fs::File::open(run_dir)?;
    let address = UnixAddr::new(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()).as_str())?;
    Ok((dir, address))
}

fn bind_socket(run_dir: &Path, name: &str) -> io::Result<OwnedFd> {
    // What is left there makes binding fail.
    std::fs::remove_file(run_dir.join(name)).ok();
    let (_dir, address) = short_address(run_dir, name)?;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    bind(listener.as_raw_fd(), &address)?;
    listen(&listener, Backlog::new(16)?)?;
    Ok(listener)
}

fn dial(run_dir: &Path, name: &str) -> io::Result<OwnedFd> {
    let (_dir, address) = short_address(run_dir, name)?;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    channel::be_patient_for(&socket, PATIENCE)?;
    connect(socket.as_raw_fd(), &address)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::{sync::Barrier, time::Instant};

    use super::*;

    #[test]
    fn a_holder_that_hangs_holds_up_nobody_for_good() {
        let (ours, _hangs) = channel::pair().unwrap();
        channel::be_patient_for(&ours, Duration::from_millis(300)).unwrap();
        let egress = Egress { socket: Mutex::new(ours) };
        let (began, asked) = (Instant::now(), Barrier::new(2));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                asked.wait();
                assert!(
                    matches!(egress.tap(0), Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::TimedOut)
                );
            });
            asked.wait();
            while began.elapsed() < Duration::from_millis(100) {
                let look = Instant::now();
                assert!(egress.is_alive());
                assert!(look.elapsed() < Duration::from_millis(100), "a look waits for no answer");
            }
        });
        assert!(!egress.is_alive(), "its late answer would be taken for the next one's");
    }

    #[test]
    fn slots_do_not_overlap() {
        let (first, second) = (addresses(0), addresses(1));
        assert_eq!(first.guest, Ipv4Addr::new(100, 96, 0, 2));
        assert_eq!(first.gateway, Ipv4Addr::new(100, 96, 0, 1));
        assert_eq!(second.gateway, Ipv4Addr::new(100, 96, 0, 5));
        assert_eq!(addresses(SLOTS - 1).guest, Ipv4Addr::new(100, 103, 255, 254));
    }
}
