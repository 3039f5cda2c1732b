//! The process that lives in the egress namespace: sets up routing and the filter, then makes taps on request.

use std::{
    fs,
    io::{self, Write},
    net::Ipv4Addr,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{SockFlag, accept4},
};

use super::{EgressSettings, Failure, MTU, Reply, Request, addresses, interface, ruleset, supervisor::UPLINK};
use crate::channel;

/// The uplink is there after some ten milliseconds; a pasta that failed never makes it.
const UPLINK_DEADLINE: Duration = Duration::from_secs(10);
/// With no daemon and no guest for this long, the namespace is no longer needed.
const IDLE_LIMIT: Duration = Duration::from_secs(2);
const IDLE_CHECK: u16 = 500;

/// Sets up everything but the taps.
pub fn prepare(settings: &EgressSettings, host: &[Ipv4Addr]) -> Result<(), Failure> {
    // AppArmor lets a process enter a namespace in which it then may do nothing.
    interface::bring_up("lo", None, None).map_err(|error| Failure::namespace("bringing up loopback", error))?;
    for (name, value) in [("ip_forward", "1"), ("conf/all/rp_filter", "1"), ("conf/default/rp_filter", "1")] {
        fs::write(format!("/proc/sys/net/ipv4/{name}"), value).map_err(|error| format!("setting {name}: {error}"))?;
    }
    load_rules(&ruleset::render(settings, UPLINK, host))?;
    let deadline = Instant::now() + UPLINK_DEADLINE;
    while !interface::exists(UPLINK) {
        if Instant::now() > deadline {
            return Err(Failure::NoUplink);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn load_rules(rules: &str) -> Result<(), Failure> {
    let mut nft = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Failure::NoNft,
            _ => Failure::Otherwise(format!("starting nft: {error}")),
        })?;
    let fed = nft.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(rules.as_bytes()));
    let output = nft.wait_with_output().map_err(|error| format!("waiting for nft: {error}"))?;
    if output.status.success() && fed.is_ok() {
        return Ok(());
    }
    Err(Failure::FilterRefused(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

/// Serves until nobody needs the namespace any more.
pub fn serve(listener: OwnedFd) {
    let mut clients: Vec<OwnedFd> = Vec::new();
    let mut taps: Vec<String> = Vec::new();
    let mut idle_since = Instant::now();
    loop {
        let ready = wait_for_any(&listener, &clients);
        if ready.first() == Some(&true)
            && let Ok(fd) = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)
        {
            // SAFETY: accept4 has just made this descriptor for us.
            clients.push(unsafe { OwnedFd::from_raw_fd(fd) });
        }
        let mut readable = ready.into_iter().skip(1);
        clients.retain(|client| !readable.next().unwrap_or(false) || answer(client, &mut taps).is_ok());
        taps.retain(|name| interface::exists(name));
        if !clients.is_empty() || !taps.is_empty() {
            idle_since = Instant::now();
        } else if idle_since.elapsed() > IDLE_LIMIT {
            return;
        }
    }
}

/// Which of the listener and the clients can be read; all false after [`IDLE_CHECK`] milliseconds.
fn wait_for_any(listener: &OwnedFd, clients: &[OwnedFd]) -> Vec<bool> {
    let mut all: Vec<PollFd> =
        std::iter::once(listener).chain(clients).map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
    // After an error none can be read: they are looked at again.
    poll(&mut all, PollTimeout::from(IDLE_CHECK)).ok();
    all.iter().map(|fd| fd.any().unwrap_or(false)).collect()
}

/// An error ends the conversation.
fn answer(client: &OwnedFd, taps: &mut Vec<String>) -> io::Result<()> {
    let Some((Request::Tap { slot }, _)) = channel::receive::<Request>(client)? else {
        return Err(io::ErrorKind::UnexpectedEof.into());
    };
    let name = format!("hv{slot}");
    let addresses = addresses(slot);
    let made = interface::make_tap(&name).and_then(|tap| {
        interface::bring_up(&name, Some((addresses.gateway, addresses.prefix)), Some(MTU)).map(|()| tap)
    });
    match made {
        Ok(tap) => {
            taps.push(name);
            channel::send(client, &Reply::Tap, &[tap.as_fd()])
        }
        Err(error) => channel::send(client, &Reply::Failed(format!("making the network device {name}: {error}")), &[]),
    }
}
