//! Standard input on its way to a command: read by a thread of its own, since a pipe that nobody writes to blocks for
//! good, and only as far as the command takes it. A file keeps what the command has not read: the next program that reads
//! it goes on there, as in `while read -r line; do heyvm exec …; done < file`.

use std::{
    fs::{self, File, Metadata},
    io::{self, Read, Seek, SeekFrom},
    os::{
        fd::AsFd,
        unix::fs::{FileExt, FileTypeExt, MetadataExt},
    },
    sync::Arc,
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

/// Standard input.
pub enum Source {
    /// A file, and where in it we began. Its position is not moved before [`Source::give_back`].
    File(Arc<File>, u64),
    /// A pipe, a terminal or the like: what is read is gone.
    Other,
}

impl Source {
    /// What standard input is.
    pub fn open() -> Self {
        let file = io::stdin().as_fd().try_clone_to_owned().map(File::from).ok();
        let file = file.filter(|file| file.metadata().is_ok_and(|meta| meta.is_file()));
        match file.and_then(|mut file| file.stream_position().ok().map(|at| (file, at))) {
            Some((file, at)) => Self::File(Arc::new(file), at),
            None => Self::Other,
        }
    }

    /// Pieces as they are read; the channel is closed at the end of the input.
    pub fn read(&self) -> mpsc::Receiver<Bytes> {
        match self {
            Self::File(file, at) => {
                let (file, mut at) = (Arc::clone(file), *at);
                pieces(move |block| {
                    let length = file.read_at(block, at)?;
                    at += length as u64;
                    Ok(length)
                })
            }
            Self::Other => pieces(|block| io::stdin().lock().read(block)),
        }
    }

    /// Moves a file's position to behind what the command has read.
    pub fn give_back(&self, read: u64) {
        if let Self::File(file, at) = self {
            // A file that cannot be positioned was not read as one.
            (&**file).seek(SeekFrom::Start(at + read)).ok();
        }
    }
}

fn pieces(mut read: impl FnMut(&mut [u8]) -> io::Result<usize> + Send + 'static) -> mpsc::Receiver<Bytes> {
    let (sender, receiver) = mpsc::channel(AHEAD);
    std::thread::spawn(move || {
        let mut block = vec![0; BLOCK];
        loop {
            match read(&mut block) {
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
