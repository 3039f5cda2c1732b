//! Waiting for processes and signalling them by number: the kernel knows signals that have no name.

use nix::{errno::Errno, libc};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// With this exit status.
    Exited(i32),
    /// By this signal.
    Killed(i32),
}

impl Ended {
    /// The code a shell gives for it.
    pub fn code(self) -> i32 {
        match self {
            Self::Exited(code) => code,
            Self::Killed(signal) => 128 + signal,
        }
    }

    /// The signal, or 0.
    pub fn signal(self) -> i32 {
        match self {
            Self::Exited(_) => 0,
            Self::Killed(signal) => signal,
        }
    }
}

/// Collects `pid`, or any child for -1, if one has ended.
pub fn next(pid: i32) -> Option<(i32, Ended)> {
    let mut status = 0;
    // SAFETY: the kernel writes one integer.
    let found = unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) };
    if found <= 0 {
        return None;
    }
    let end = if libc::WIFSIGNALED(status) {
        Ended::Killed(libc::WTERMSIG(status))
    } else {
        Ended::Exited(libc::WEXITSTATUS(status))
    };
    Some((found, end))
}

/// Whether this process has children, ended or not.
pub fn any_left() -> bool {
    // SAFETY: an all-zero siginfo_t is valid; the kernel fills it in.
    let answer = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        libc::waitid(libc::P_ALL, 0, &raw mut info, libc::WEXITED | libc::WNOHANG | libc::WNOWAIT)
    };
    Errno::result(answer) != Err(Errno::ECHILD)
}

/// `kill(2)`.
pub fn kill(pid: i32, signal: i32) -> nix::Result<()> {
    // SAFETY: touches no memory.
    Errno::result(unsafe { libc::kill(pid, signal) }).map(drop)
}
