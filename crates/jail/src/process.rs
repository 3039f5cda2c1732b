//! Processes that are not our children: known by id and start time, waited for and signalled through a pidfd.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    str::FromStr,
};

use nix::{
    libc,
    poll::{PollFd, PollFlags, poll},
};

/// Milliseconds: a killed process has to give its memory back first, and may wait for a disk.
const KILL_DEADLINE: u16 = 30_000;

/// A process, told apart from a later one with the same id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessId {
    /// Process id in our namespace.
    pub pid: i32,
    /// Clock ticks from the host's boot to its start, as in `/proc/PID/stat`.
    pub started: u64,
}

impl ProcessId {
    /// The process that has this id now.
    pub fn of(pid: i32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let started = start_time(&stat).ok_or_else(|| io::Error::other("unreadable /proc stat line"))?;
        Ok(Self { pid, started })
    }

    /// Whether this very process still runs (a zombie does not); an error when that cannot be found out now, as when no
    /// file descriptor is left.
    pub fn look(self) -> io::Result<bool> {
        match fs::read_to_string(format!("/proc/{}/stat", self.pid)) {
            Ok(stat) => Ok(start_time(&stat) == Some(self.started) && !is_zombie(&stat)),
            Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH) => {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// As [`Self::look`]; a process counts as alive until it is known to have ended.
    pub fn is_alive(self) -> bool {
        self.look().unwrap_or(true)
    }

    /// A descriptor that becomes readable when the process ends; `None` when it has ended already.
    pub fn open(self) -> io::Result<Option<ProcessHandle>> {
        // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, self.pid, 0) };
        if fd < 0 {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(libc::ESRCH) { Ok(None) } else { Err(error) };
        }
        // SAFETY: the descriptor is new and ours alone; the kernel's int fits.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        // The id may have been given to another process before the open: the start time decides.
        Ok(self.look()?.then_some(ProcessHandle { fd }))
    }

    /// Ends the process at once, if it still runs, and blocks until it is gone, with all it held.
    pub fn kill(self) -> io::Result<()> {
        match self.open()? {
            Some(handle) => handle.kill().and_then(|()| handle.gone()),
            None => Ok(()),
        }
    }
}

impl std::fmt::Display for ProcessId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.pid, self.started)
    }
}

impl FromStr for ProcessId {
    type Err = io::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut words = text.split_ascii_whitespace().map(str::parse::<u64>);
        match (words.next(), words.next()) {
            (Some(Ok(pid)), Some(Ok(started))) if pid <= i32::MAX as u64 => Ok(Self { pid: pid as i32, started }),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "not a process id and a start time")),
        }
    }
}

/// A pidfd.
#[derive(Debug)]
pub struct ProcessHandle {
    fd: OwnedFd,
}

impl ProcessHandle {
    /// Sends SIGKILL.
    pub fn kill(&self) -> io::Result<()> {
        // SAFETY: pidfd_send_signal with a null siginfo is kill(2) on a descriptor that we own.
        let result = unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, self.fd.as_raw_fd(), libc::SIGKILL, std::ptr::null::<u8>(), 0)
        };
        let error = io::Error::last_os_error();
        if result == 0 || error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error) }
    }

    /// Blocks until the process has ended.
    fn gone(&self) -> io::Result<()> {
        let mut ended = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ended, KILL_DEADLINE)? {
            0 => Err(io::Error::new(io::ErrorKind::TimedOut, "it hangs in the kernel")),
            _ => Ok(()),
        }
    }

    /// The descriptor, readable once the process has ended.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

/// Field 22 of `/proc/PID/stat`; the command's name before it may hold spaces and parentheses.
fn start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

fn is_zombie(stat: &str) -> bool {
    stat.rsplit_once(')').is_some_and(|(_, rest)| matches!(rest.split_ascii_whitespace().next(), Some("Z" | "X")))
}

/// Closes what this program has inherited beside its standard streams: what outlives its caller must not hold the caller's
/// locks and pipes open. To be called before anything else is opened.
pub fn close_inherited() {
    // SAFETY: close_range takes integers, and nothing of this program is open yet beyond the standard streams.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
}

/// An id that is new at every boot of this host.
pub fn host_boot_id() -> io::Result<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_is_known_until_it_ends() {
        let mut child = Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().unwrap();
        let id = ProcessId::of(child.id() as i32).unwrap();
        assert!(id.is_alive());
        assert_eq!(id.to_string().parse::<ProcessId>().unwrap(), id);
        let other = ProcessId { started: id.started + 1, ..id };
        assert!(!other.is_alive());
        other.kill().unwrap();
        assert!(id.is_alive(), "a process with another start time is not ours to kill");
        id.kill().unwrap();
        assert!(!id.is_alive(), "it is gone when this returns");
        child.wait().unwrap();
        assert!(id.open().unwrap().is_none());
    }

    #[test]
    fn names_with_parentheses_do_not_confuse() {
        let stat = "7 (a) b (c) S 1 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4711 0 0";
        assert_eq!(start_time(stat), Some(4711));
        assert!(!is_zombie(stat));
    }
}
