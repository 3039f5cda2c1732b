//! Pseudo-terminals.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

use heyvm_agent_protocol::v1::Pty;
use nix::libc;

nix::ioctl_write_ptr_bad!(set_size, libc::TIOCSWINSZ, libc::winsize);
nix::ioctl_write_ptr_bad!(unlock, libc::TIOCSPTLCK, libc::c_int);

/// A new pseudo-terminal.
pub struct Terminal {
    /// Our end, non-blocking.
    pub ours: OwnedFd,
    /// The program's end.
    pub program: OwnedFd,
}

/// Opens one of the given size.
pub fn open(size: &Pty) -> io::Result<Terminal> {
    let open = |custom| File::options().read(true).write(true).custom_flags(custom).open("/dev/ptmx");
    let ours = open(libc::O_NOCTTY | libc::O_NONBLOCK)?;
    // SAFETY: the kernel reads one integer.
    unsafe { unlock(ours.as_raw_fd(), &0) }?;
    resize(&ours, size)?;
    Ok(Terminal { program: peer(&ours)?, ours: ours.into() })
}

/// Tells the terminal's programs of a new size.
pub fn resize(ours: &impl AsRawFd, size: &Pty) -> io::Result<()> {
    let clamp = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    let size = libc::winsize { ws_row: clamp(size.rows), ws_col: clamp(size.cols), ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel reads one winsize.
    unsafe { set_size(ours.as_raw_fd(), &raw const size) }?;
    Ok(())
}

/// The other end, by descriptor: its name under /dev/pts is the sandbox's to change.
fn peer(ours: &File) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: touches no memory; what it returns is a descriptor of our own or negative.
    unsafe {
        let fd = libc::ioctl(ours.as_raw_fd(), libc::TIOCGPTPEER, libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}
