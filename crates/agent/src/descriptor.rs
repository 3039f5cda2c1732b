//! Descriptors: those that the event loop watches, and those that need a certain number.

use std::{
    io,
    os::fd::{AsFd, FromRawFd, OwnedFd, RawFd},
};

use nix::fcntl::{FcntlArg, fcntl};
use tokio::io::{Interest, unix::AsyncFd};

/// Has the event loop watch a non-blocking descriptor.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the AsyncFd owns the descriptor and nobody can close it before the registration ends.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(|error| error.into_parts().1)
}

/// Another descriptor of the same file, whose number is above `number`.
pub fn above(fd: impl AsFd, number: RawFd) -> nix::Result<OwnedFd> {
    let made = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(number + 1))?;
    // SAFETY: the descriptor is new, and this is its only owner.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}
