//! Guest memory as anonymous files.
//!
//! A template's memory is kept in a file on disk and brought into a *sealed* anonymous file when it is first needed.
//! The seal is what lets clones share it safely: QEMU opens its memory for writing and maps it privately, and a QEMU
//! that was taken over could otherwise write to the pages that every later clone starts from.
#![expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]

use std::{
    ffi::CStr,
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    os::fd::AsRawFd,
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    libc,
    sys::memfd::{MFdFlags, memfd_create},
};

/// Bytes of a log that are looked at; who writes it may write without end.
const LOG_BYTES: u64 = 64 << 10;
const BLOCK: usize = 1 << 20;
const PAGE: usize = 4096;
const NAME: &CStr = c"heyvm-guest-memory";

/// New memory of `bytes`, all zeroes.
pub fn create(bytes: u64) -> io::Result<File> {
    let file = File::from(memfd_create(NAME, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.set_len(bytes)?;
    Ok(file)
}

/// What was written to an anonymous file that a confined process has as its log.
pub fn read_log(log: &File) -> String {
    let mut text = Vec::new();
    let own = File::open(format!("/proc/self/fd/{}", log.as_raw_fd()));
    own.map(|file| file.take(LOG_BYTES).read_to_end(&mut text)).ok();
    String::from_utf8_lossy(&text).into_owned()
}

/// From now on nobody can change the memory or its size, but for private copies of its pages.
pub fn seal(memory: &File) -> io::Result<()> {
    let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(memory, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(())
}

/// Copies what is not a hole and not zero; `to` must be all zeroes. Its size becomes `from`'s.
pub fn copy_sparse(from: &File, to: &File) -> io::Result<u64> {
    let (mut from, mut to) = (from, to);
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut block = vec![0; BLOCK];
    let (mut position, mut copied) = (0, 0);
    while let Some((start, end)) = next_data(from, position, length)? {
        from.seek(SeekFrom::Start(start))?;
        position = start;
        while position < end {
            let wanted = BLOCK.min((end - position) as usize);
            from.read_exact(&mut block[..wanted])?;
            for run in nonzero_runs(&block[..wanted]) {
                to.seek(SeekFrom::Start(position + run.start as u64))?;
                copied += run.len() as u64;
                to.write_all(&block[run])?;
            }
            position += wanted as u64;
        }
    }
    Ok(copied)
}

/// Stretches of pages that hold anything but zeroes.
fn nonzero_runs(block: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for (index, page) in block.chunks(PAGE).enumerate() {
        if page.iter().all(|byte| *byte == 0) {
            continue;
        }
        let start = index * PAGE;
        match runs.last_mut() {
            Some(last) if last.end == start => last.end = start + page.len(),
            _ => runs.push(start..start + page.len()),
        }
    }
    runs
}

/// The next stretch of data at or after `position`.
fn next_data(file: &File, position: u64, length: u64) -> io::Result<Option<(u64, u64)>> {
    let seek = |from: u64, whence| {
        // SAFETY: lseek on a descriptor that we hold.
        let found = unsafe { libc::lseek(file.as_raw_fd(), from as libc::off_t, whence) };
        if found >= 0 { Ok(Some(found as u64)) } else { none_past_the_end(io::Error::last_os_error()) }
    };
    if position >= length {
        return Ok(None);
    }
    let Some(start) = seek(position, libc::SEEK_DATA)? else { return Ok(None) };
    Ok(Some((start, seek(start, libc::SEEK_HOLE)?.unwrap_or(length))))
}

fn none_past_the_end(error: io::Error) -> io::Result<Option<u64>> {
    if error.raw_os_error() == Some(libc::ENXIO) { Ok(None) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_keep_their_holes() {
        let from = create(64 << 20).unwrap();
        (&from).seek(SeekFrom::Start(33 << 20)).unwrap();
        (&from).write_all(b"here").unwrap();
        let to = tempfile::tempfile().unwrap();
        assert_eq!(copy_sparse(&from, &to).unwrap(), PAGE as u64);
        assert_eq!(to.metadata().unwrap().len(), 64 << 20);
        let mut read = [0; 4];
        (&to).seek(SeekFrom::Start(33 << 20)).unwrap();
        (&to).read_exact(&mut read).unwrap();
        assert_eq!(&read, b"here");
        use std::os::unix::fs::MetadataExt;
        assert!(to.metadata().unwrap().blocks() < 1000);
    }

    #[test]
    fn sealed_memory_cannot_be_written_even_through_a_new_descriptor() {
        let memory = create(1 << 20).unwrap();
        seal(&memory).unwrap();
        let again =
            File::options().read(true).write(true).open(format!("/proc/self/fd/{}", memory.as_raw_fd())).unwrap();
        assert_eq!((&again).write_all(b"x").unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert!(again.set_len(2 << 20).is_err());
    }
}
