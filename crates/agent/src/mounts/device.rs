//! /dev/fuse: the kernel's requests and our answers, one each per read and write.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
};

use bytes::Bytes;
use nix::{
    errno::Errno,
    libc::O_NONBLOCK,
    mount::{MsFlags, mount as mount_file_system},
    unistd,
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::descriptor;

/// The kernel wants room for its largest request, a write of 1 MiB, before it gives any.
const LARGEST: usize = (1 << 20) + (4 << 10);
const READ_AHEAD_KIB: &str = "1024";

/// Mounts a new file system whose requests the descriptor gives.
pub fn mount(path: &Path, read_only: bool) -> io::Result<OwnedFd> {
    let device = File::options().read(true).write(true).custom_flags(O_NONBLOCK).open("/dev/fuse")?;
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    flags.set(MsFlags::MS_RDONLY, read_only);
    let options =
        format!("fd={},rootmode=40755,user_id=0,group_id=0,allow_other,default_permissions", device.as_raw_fd());
    mount_file_system(Some("host"), path, Some("fuse"), flags, Some(options.as_str()))?;
    Ok(device.into())
}

/// Has the kernel read ahead by whole requests: one for 128 KiB costs nearly what one for 1 MiB does. To be called once the
/// first request is answered, which sets it, too. Looks at the kernel's own files alone; without it, it is slower.
pub fn read_ahead(path: &Path) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if let Some(device) = number_of(path, &mounts) {
        fs::write(format!("/sys/class/bdi/{device}/read_ahead_kb"), READ_AHEAD_KIB).ok();
    }
}

/// The device number of what is mounted there, the latest one. Fields: id, parent's id, device, root, mount point, …
fn number_of<'m>(path: &Path, mounts: &'m str) -> Option<&'m str> {
    mounts.lines().rev().find_map(|line| {
        let mut fields = line.split(' ').skip(2);
        let device = fields.next()?;
        // A name with white space in it stands there in other letters; it is not looked for.
        (fields.nth(1)? == path.to_str()?).then_some(device)
    })
}

/// The open device of one mount. Closing it ends the mount: whoever waits for an answer gets an error.
pub struct Device {
    fd: AsyncFd<OwnedFd>,
    buffer: Vec<u8>,
}

impl Device {
    /// Has the event loop watch it.
    pub fn watch(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self { fd: descriptor::watch(fd, Interest::READABLE)?, buffer: vec![0; LARGEST] })
    }

    /// The next request; `None` when it is mounted no more. Nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            let mut ready = self.fd.readable().await?;
            match ready.try_io(|fd| Ok(unistd::read(fd, &mut self.buffer)?)) {
                Err(_would_block) => {}
                Ok(Ok(0)) => return Ok(None),
                Ok(Ok(length)) => return Ok(Some(Bytes::copy_from_slice(&self.buffer[..length]))),
                Ok(Err(error)) => match error.raw_os_error().map(Errno::from_raw) {
                    // Whoever asked has gone, or we were interrupted.
                    Some(Errno::ENOENT | Errno::EINTR) => {}
                    Some(Errno::ENODEV) => return Ok(None),
                    _ => return Err(error),
                },
            }
        }
    }

    /// Answers. That nobody waits for it any more, or that it makes no sense to the kernel, is nothing to act upon.
    pub fn answer(&self, answer: &[u8]) {
        unistd::write(self.fd.get_ref(), answer).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mounts_device_is_found() {
        let mounts = "22 1 0:20 / / rw - overlay o rw\n30 22 0:41 / /data rw,nosuid - fuse host rw\n\
                      31 22 0:42 / /data rw,nosuid - fuse host rw\n";
        assert_eq!(number_of(Path::new("/data"), mounts), Some("0:42"));
        assert_eq!(number_of(Path::new("/dat"), mounts), None);
    }
}
