//! The input and output of one child: pipes or a pseudo-terminal, our ends and its ends.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

use heyvm_agent_protocol::CHUNK;
use nix::{fcntl::OFlag, libc, unistd::pipe2};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::unix::pipe,
};

use super::{Command, spawn::Descriptors, terminal};
use crate::descriptor;

/// Our ends. What is not there has not been asked for or has come to its end.
pub struct Streams {
    /// To the child's standard input.
    pub input: Option<Input>,
    /// From its standard output, or everything a terminal shows.
    pub stdout: Option<Output>,
    /// From its standard error.
    pub stderr: Option<Output>,
    /// From descriptor 3: what a session's shell tells at its end.
    pub report: Option<Output>,
    /// The terminal, to change its size.
    pub terminal: Option<OwnedFd>,
}

/// The child's ends; dropped once it runs.
pub struct Theirs {
    standard: [OwnedFd; 3],
    report: Option<OwnedFd>,
    terminal: bool,
}

/// Something a child reads.
pub enum Input {
    /// A pipe.
    Pipe(pipe::Sender),
    /// A terminal.
    Terminal(AsyncFd<OwnedFd>),
}

/// Something a child writes.
pub enum Output {
    /// A pipe.
    Pipe(pipe::Receiver),
    /// A terminal.
    Terminal(AsyncFd<OwnedFd>),
}

impl Streams {
    /// Makes what the command asks for.
    pub fn open(command: &Command) -> io::Result<(Self, Theirs)> {
        if command.detached {
            let null = || File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from);
            let streams = Self { input: None, stdout: None, stderr: None, report: None, terminal: None };
            let standard = [null()?, null()?, null()?];
            return Ok((streams, Theirs { standard, report: None, terminal: false }));
        }
        let (report, their_report) = command.report.then(output_pipe).transpose()?.unzip();
        if let Some(size) = &command.terminal {
            let made = terminal::open(size)?;
            let input = descriptor::watch(made.ours.try_clone()?, Interest::WRITABLE)?;
            let output = descriptor::watch(made.ours.try_clone()?, Interest::READABLE)?;
            let streams = Self {
                input: Some(Input::Terminal(input)),
                stdout: Some(Output::Terminal(output)),
                stderr: None,
                report,
                terminal: Some(made.ours),
            };
            let standard = [made.program.try_clone()?, made.program.try_clone()?, made.program];
            return Ok((streams, Theirs { standard, report: their_report, terminal: true }));
        }
        let (input, stdin) = if command.stdin {
            let (theirs, ours) = pipe2(OFlag::O_CLOEXEC)?;
            (Some(Input::Pipe(pipe::Sender::from_owned_fd(ours)?)), theirs)
        } else {
            (None, File::open("/dev/null")?.into())
        };
        let (stdout, their_stdout) = output_pipe()?;
        let (stderr, their_stderr) = output_pipe()?;
        let streams = Self { input, stdout: Some(stdout), stderr: Some(stderr), report, terminal: None };
        Ok((streams, Theirs { standard: [stdin, their_stdout, their_stderr], report: their_report, terminal: false }))
    }
}

fn output_pipe() -> io::Result<(Output, OwnedFd)> {
    let (ours, theirs) = pipe2(OFlag::O_CLOEXEC)?;
    Ok((Output::Pipe(pipe::Receiver::from_owned_fd(ours)?), theirs))
}

impl Theirs {
    /// As `spawn` wants them.
    pub fn descriptors<'a>(&'a self, script: Option<&'a OwnedFd>) -> Descriptors<'a> {
        Descriptors {
            standard: self.standard.each_ref().map(AsFd::as_fd),
            report: self.report.as_ref().map(AsFd::as_fd),
            script: script.map(AsFd::as_fd),
            terminal: self.terminal,
        }
    }
}

impl Output {
    /// The next bytes, at most [`CHUNK`]; none at the end. May be cancelled without loss.
    pub async fn read(&self) -> Option<Vec<u8>> {
        loop {
            let ready = match self {
                Self::Pipe(pipe) => pipe.readable().await,
                Self::Terminal(fd) => fd.readable().await.map(drop),
            };
            if ready.is_err() {
                return None;
            }
            match self.try_read() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // A terminal whose last program has left gives an error.
                Err(_) | Ok(None) => return None,
                Ok(Some(data)) => return Some(data),
            }
        }
    }

    /// What is there now; `WouldBlock` when nothing is.
    pub fn try_read(&self) -> io::Result<Option<Vec<u8>>> {
        let mut data = Vec::with_capacity(CHUNK);
        let length = match self {
            Self::Pipe(pipe) => pipe.try_read_buf(&mut data)?,
            Self::Terminal(fd) => fd.try_io(Interest::READABLE, |fd| read_into(fd, &mut data))?,
        };
        // Most output is short, and a queue of it should be, too.
        if length < CHUNK / 2 {
            data.shrink_to_fit();
        }
        Ok((length > 0).then_some(data))
    }
}

fn read_into(fd: &OwnedFd, data: &mut Vec<u8>) -> io::Result<usize> {
    data.resize(CHUNK, 0);
    let read = nix::unistd::read(fd, data);
    data.truncate(read.unwrap_or(0));
    Ok(read?)
}

nix::ioctl_read_bad!(bytes_to_read, libc::FIONREAD, libc::c_int);

/// An end of a pipe that nobody writes to any more, kept to know what was never read.
pub struct Unread(File);

impl Unread {
    /// Bytes in it.
    pub fn bytes(&self) -> u64 {
        in_pipe(&self.0)
    }
}

fn in_pipe(pipe: &impl AsRawFd) -> u64 {
    let mut bytes = 0;
    // SAFETY: the kernel writes one integer.
    let told = unsafe { bytes_to_read(pipe.as_raw_fd(), &raw mut bytes) };
    told.ok().and_then(|_| u64::try_from(bytes).ok()).unwrap_or(0)
}

impl Input {
    /// Bytes that were written and not read yet.
    pub fn unread(&self) -> u64 {
        match self {
            Self::Pipe(pipe) => in_pipe(pipe),
            Self::Terminal(_) => 0,
        }
    }

    /// Closes it; what is still unread of a pipe can be told later.
    pub fn close(self) -> Option<Unread> {
        let Self::Pipe(pipe) = self else { return None };
        let path = format!("/proc/self/fd/{}", pipe.as_raw_fd());
        File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map(Unread).ok()
    }

    /// Writes some of `data`; how much. May be cancelled without loss.
    pub async fn write(&self, data: &[u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => loop {
                pipe.writable().await?;
                match pipe.try_write(data) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    done => return done,
                }
            },
            Self::Terminal(fd) => fd.async_io(Interest::WRITABLE, |fd| Ok(nix::unistd::write(fd, data)?)).await,
        }
    }
}
