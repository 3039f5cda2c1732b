//! What a template does for its clones: has the programs that most first commands need in memory.

use std::{
    ffi::CString,
    fs::File,
    io::{self, Read},
    time::Duration,
};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use crate::process::{
    Spawner,
    spawn::{Descriptors, Program, spawn},
    user::Identity,
};

const IMAGE: &str = "/ro";
/// Bytes that are read at most.
const MAX_BYTES: u64 = 128 << 20;
/// One file is read up to here.
const MAX_FILE: u64 = 24 << 20;
/// One program that takes longer is ended.
const DEADLINE: Duration = Duration::from_secs(20);

/// Read as a whole, so that no page of them has to be fetched later.
const FILES: [&str; 12] = [
    "/bin/sh",
    "/bin/bash",
    "/bin/busybox",
    "/usr/bin/env",
    "/bin/cat",
    "/bin/ls",
    "/lib64/ld-linux-x86-64.so.2",
    "/lib/x86_64-linux-gnu/libc.so.6",
    "/lib/ld-musl-x86_64.so.1",
    "/usr/bin/python3",
    "/usr/local/bin/python3",
    "/lib/x86_64-linux-gnu/libm.so.6",
];

/// Run from the image, as far as it has them.
const COMMANDS: [&[&str]; 9] = [
    &["/bin/true"],
    &["/bin/sh", "-c", ":"],
    &["/bin/sh", "-c", "cat /etc/passwd | head -1; ls /; env; mkdir -p /tmp; uname -a; id; sleep 0"],
    &["/bin/bash", "-ic", TERMINAL],
    &["/usr/bin/python3", "-c", PYTHON],
    &["/usr/local/bin/python3", "-c", PYTHON],
    &["/usr/bin/node", "-e", NODE],
    &["/usr/local/bin/node", "-e", NODE],
    &["/usr/bin/curl", "--version"],
];
/// What a shell at a terminal needs before its first prompt: line editing, and what the terminal can.
const TERMINAL: &str = "TERM=xterm-256color; bind -l";
const PYTHON: &str = "import http.server, json, socket, subprocess, threading, argparse, logging, urllib.request";
const NODE: &str = "require('http').createServer(); require('fs'); require('path')";

/// Reads and runs what there is; how many bytes were read.
pub async fn warm_up(spawner: &Spawner) -> u64 {
    let read = tokio::task::spawn_blocking(read_files).await.unwrap_or(0);
    for command in COMMANDS {
        // A program that the image does not have is no loss.
        run(spawner, command).await.ok();
    }
    read
}

fn read_files() -> u64 {
    let Ok(image) = File::open(IMAGE) else { return 0 };
    let mut total = 0;
    for path in FILES {
        if total < MAX_BYTES {
            total += read_file(&image, path).unwrap_or(0);
        }
    }
    total
}

fn read_file(image: &File, path: &str) -> io::Result<u64> {
    let how = OpenHow::new().flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK);
    let file = File::from(openat2(image, path, how.resolve(ResolveFlag::RESOLVE_IN_ROOT))?);
    if !file.metadata()?.is_file() {
        return Ok(0);
    }
    io::copy(&mut file.take(MAX_FILE), &mut io::sink())
}

async fn run(spawner: &Spawner, command: &[&str]) -> io::Result<()> {
    let texts = |texts: &[&str]| texts.iter().copied().map(CString::new).collect::<Result<Vec<_>, _>>();
    let null = File::options().read(true).write(true).open("/dev/null")?;
    let program = Program {
        root: Some(CString::new(IMAGE)?),
        candidates: texts(&command[..1])?,
        argv: texts(command)?,
        env: texts(&["PATH=/usr/local/bin:/usr/bin:/bin", "HOME=/"])?,
        cwd: c"/".into(),
        identity: Identity::root(),
    };
    let standard = [&null; 3].map(std::os::fd::AsFd::as_fd);
    let descriptors = Descriptors { standard, report: None, script: None, terminal: false };
    let started = spawner.reaper.adopt(|| spawn(&program, &descriptors, None));
    let mut child = started.map_err(io::Error::other)?;
    if tokio::time::timeout(DEADLINE, child.ended()).await.is_err() {
        child.signal_group(nix::libc::SIGKILL).ok();
        child.ended().await;
    }
    Ok(())
}
