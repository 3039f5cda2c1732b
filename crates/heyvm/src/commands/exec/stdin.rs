//! Standard input on its way to a command: read by a thread of its own, since a pipe that nobody writes to blocks for
//! good, and only as far as the command takes it.

use std::{
    fs::{self, Metadata},
    io::{self, Read},
    os::unix::fs::{FileTypeExt, MetadataExt},
};

use bytes::Bytes;
use nix::unistd::{getpgrp, tcgetpgrp};
use tokio::sync::mpsc;

/// Largest piece.
pub const BLOCK: usize = 64 << 10;
/// Pieces read ahead of the command.
const AHEAD: usize = 2;

/// Whether there is anything to pass on: not where it is closed or /dev/null, and not in the background of a terminal,
/// where reading would stop us.
pub fn is_wanted() -> bool {
    let Ok(stdin) = fs::metadata("/proc/self/fd/0") else { return false };
    let null = fs::metadata("/dev/null").ok();
    if null.is_some_and(|null| is_same_device(&stdin, &null)) {
        return false;
    }
    !super::is_interactive() || tcgetpgrp(io::stdin()).is_ok_and(|group| group == getpgrp())
}

fn is_same_device(one: &Metadata, other: &Metadata) -> bool {
    one.file_type().is_char_device() && one.rdev() == other.rdev()
}

/// Pieces as they are read; the channel is closed at the end of the input.
pub fn read() -> mpsc::Receiver<Bytes> {
    let (sender, receiver) = mpsc::channel(AHEAD);
    std::thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        let mut block = vec![0; BLOCK];
        loop {
            match stdin.read(&mut block) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => return,
                Ok(length) => {
                    if sender.blocking_send(Bytes::copy_from_slice(&block[..length])).is_err() {
                        return;
                    }
                }
            }
        }
    });
    receiver
}
