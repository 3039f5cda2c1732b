//! The sandbox's disk while it is mounted: grown, and held still while the host copies it.

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use nix::libc::{EINVAL, c_int};

use crate::console;

// linux/fs.h; linux/ext4.h (since Linux 3.3).
nix::ioctl_readwrite!(fifreeze, b'X', 119, c_int);
nix::ioctl_readwrite!(fithaw, b'X', 120, c_int);
nix::ioctl_write_ptr!(ext4_resize_fs, b'f', 16, u64);

/// A device's new size is known after this.
const NEWS: Duration = Duration::from_secs(2);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Size of the file system's blocks, which the host has chosen.
const BLOCK: u64 = 4096;

/// Where ext4's superblock begins, and in it the two halves of the number of blocks (kernel's Documentation/filesystems/
/// ext4/super.rst).
const SUPERBLOCK: u64 = 1024;
const BLOCKS_LOW: usize = 0x4;
const BLOCKS_HIGH: usize = 0x150;

/// Bytes of the file system on a device.
pub fn size(device: &File) -> io::Result<u64> {
    let mut superblock = [0; 1024];
    device.read_exact_at(&mut superblock, SUPERBLOCK)?;
    let word = |at: usize| u64::from(u32::from_le_bytes([0, 1, 2, 3].map(|byte| superblock[at + byte])));
    Ok((word(BLOCKS_HIGH) << 32 | word(BLOCKS_LOW)) * BLOCK)
}

/// Grows the file system to so many bytes of its device. `disk` is any directory of it.
pub fn grow(disk: &File, bytes: u64) -> io::Result<()> {
    let blocks = bytes / BLOCK;
    // SAFETY: the kernel reads the number and keeps nothing of it.
    unsafe { ext4_resize_fs(disk.as_raw_fd(), &blocks) }?;
    Ok(())
}

/// The same, for a device that has just become larger: the kernel may learn of it a moment later. Blocks.
pub fn grow_soon(disk: &File, bytes: u64) -> io::Result<()> {
    let late = Instant::now() + NEWS;
    loop {
        match grow(disk, bytes) {
            Err(error) if error.raw_os_error() == Some(EINVAL) && Instant::now() < late => {
                std::thread::sleep(LOOK_EVERY)
            }
            other => return other,
        }
    }
}

/// Whether the disk is held still, and since which call.
#[derive(Debug, Default)]
pub struct Stillness {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    held: Option<File>,
    holds: u64,
}

impl Stillness {
    /// Writes out what waits, and has every further write wait until [`Stillness::end`], or the deadline: the host may be
    /// gone by then. Blocks.
    pub fn begin(self: &Arc<Self>, disk: File, deadline: Duration) -> io::Result<()> {
        let hold = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if state.held.is_some() {
                return Err(io::Error::from(io::ErrorKind::ResourceBusy));
            }
            let mut unused = 0;
            // SAFETY: the kernel takes a number that it does not look at.
            unsafe { fifreeze(disk.as_raw_fd(), &mut unused) }?;
            state.holds += 1;
            state.held = Some(disk);
            state.holds
        };
        let still = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(deadline).await;
            let is_the_same = still.state.lock().unwrap_or_else(PoisonError::into_inner).holds == hold;
            if is_the_same {
                still.end_or_say();
            }
        });
        Ok(())
    }

    /// Lets go. Where that fails there is nobody to tell but the console.
    pub fn end_or_say(&self) {
        if let Err(error) = self.end() {
            console::say(format_args!("the disk cannot be let go: {error}"));
        }
    }

    /// Lets go; whether it was held until now.
    pub fn end(&self) -> io::Result<bool> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(disk) = state.held.take() else { return Ok(false) };
        let mut unused = 0;
        // SAFETY: as above.
        unsafe { fithaw(disk.as_raw_fd(), &mut unused) }?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_size_is_read_from_the_superblock() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(300 << 20).unwrap();
        let made = Command::new("mkfs.ext4").args(["-q", "-F", "-b", "4096"]).arg(file.path()).status().unwrap();
        assert!(made.success());
        assert_eq!(size(file.as_file()).unwrap(), 300 << 20);
    }
}
