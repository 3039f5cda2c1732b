//! Open directories. A position is the host file system's own, so that nothing of a listing is kept here.

use std::{fs::File, mem::MaybeUninit, os::fd::OwnedFd, sync::PoisonError};

use rustix::{
    fs::{OFlags, RawDir, SeekFrom, Stat},
    io::Errno,
};

use crate::{
    Server,
    tree::{self, child},
    wire::{ENTRY, Input, MAX_NAME, MAX_WRITE, Output},
};

const READING: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY);
/// What the host's kernel gives at once, in bytes.
const BUFFER: usize = 32 << 10;
/// Bytes of a `fuse_dirent` without its name.
const DIRENT: usize = 24;

impl Server {
    pub(crate) fn open_directory(&self, node: u64) -> Result<Output, Errno> {
        let file = tree::open(&self.find(node)?.0, READING)?;
        Ok(Output::default().opened(self.handles.keep(file, node)?))
    }

    /// As many entries as fit, from a position on; with `plus` each with its attributes, as if it had been looked up.
    pub(crate) fn read_directory(&self, node: u64, mut input: Input<'_>, plus: bool) -> Result<Output, Errno> {
        let (handle, position, size) = (input.u64()?, input.u64()?, input.u32()?);
        let size = size.min(MAX_WRITE) as usize;
        let list = |file: &File| {
            rustix::fs::seek(file, SeekFrom::Start(position))?;
            let dir: OwnedFd = file.try_clone().map_err(|_| Errno::MFILE)?.into();
            self.list((node, &dir), size, plus)
        };
        match self.handles.get(handle) {
            Some(open) => {
                let _one_position = open.reading.lock().unwrap_or_else(PoisonError::into_inner);
                self.with_file((handle, node), READING, list)
            }
            None => self.with_file((handle, node), READING, list),
        }
    }

    fn list(&self, (node, dir): (u64, &OwnedFd), size: usize, plus: bool) -> Result<Output, Errno> {
        let mut output = Output::with_capacity(size.min(BUFFER));
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        let mut entries = RawDir::new(dir, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            let head = if plus { ENTRY } else { 0 };
            if name.len() > MAX_NAME || output.len() + head + padded(DIRENT + name.len()) > size {
                break;
            }
            if plus {
                output = match self.looked_up(node, dir, name) {
                    Some((number, stat)) => output.entry(number, &stat),
                    // The guest looks it up when it wants to know.
                    None => output.zeros(ENTRY),
                };
            }
            let kind = rustix::fs::FileType::as_raw_mode(entry.file_type()) >> 12;
            output = output
                .u64(entry.ino())
                .u64(entry.next_entry_cookie())
                .u32(name.len() as u32)
                .u32(kind & 0o17)
                .bytes(name)
                .zeros(padded(DIRENT + name.len()) - DIRENT - name.len());
        }
        Ok(output)
    }

    fn looked_up(&self, node: u64, dir: &OwnedFd, name: &[u8]) -> Option<(u64, Stat)> {
        if name == b"." || name == b".." {
            return None;
        }
        let (_, stat) = child(dir, name).ok()?;
        Some((self.nodes().give(node, name, tree::identity(&stat)).ok()?, stat))
    }
}

fn padded(length: usize) -> usize {
    length.next_multiple_of(8)
}
