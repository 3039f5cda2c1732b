//! Open files: reading, writing and what else is done by handle.

use rustix::{
    fs::{FallocateFlags, OFlags, SeekFrom},
    io::Errno,
};

use crate::{
    Server, tree,
    wire::{Input, MAX_WRITE, Output, SYNC_DATA},
};

/// What of the guest's flags counts here: how the file is used, and nothing of how it is found.
pub(crate) fn permitted(asked: OFlags) -> OFlags {
    let access = asked & OFlags::RWMODE;
    // 3 is no way to use a file.
    let access = if access == OFlags::RWMODE { OFlags::RDWR } else { access };
    access | asked & (OFlags::APPEND | OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC)
}

fn writes(flags: OFlags) -> bool {
    flags.intersects(OFlags::RWMODE | OFlags::TRUNC | OFlags::APPEND)
}

/// `fuse_read_in` and `fuse_write_in`.
struct Span {
    handle: u64,
    offset: u64,
    size: u32,
    flags: OFlags,
}

impl Span {
    fn of(input: &mut Input<'_>) -> Result<Self, Errno> {
        let (handle, offset, size) = (input.u64()?, input.u64()?, input.u32()?);
        input.skip(12)?;
        // Of a file that is opened once more, whatever was to be done at the first opening is done.
        let flags = permitted(OFlags::from_bits_retain(input.u32()?)).difference(OFlags::TRUNC);
        input.skip(4)?;
        Ok(Self { handle, offset, size, flags })
    }
}

impl Server {
    pub(crate) fn open_file(&self, node: u64, mut input: Input<'_>) -> Result<Output, Errno> {
        let flags = permitted(OFlags::from_bits_retain(input.u32()?));
        if writes(flags) {
            self.may_change()?;
        }
        let file = match self.find(node) {
            Err(Errno::STALE) => tree::open(&self.opened_before(node)?, flags)?,
            found => tree::open(&found?.0, flags)?,
        };
        Ok(Output::default().opened(self.handles.keep(file, node)?))
    }

    /// A file without a name that is open nevertheless.
    fn opened_before(&self, node: u64) -> Result<std::os::fd::OwnedFd, Errno> {
        let open = self.handles.of(node).ok_or(Errno::STALE)?;
        Ok(open.file.try_clone().map_err(|_| Errno::MFILE)?.into())
    }

    pub(crate) fn read(&self, node: u64, mut input: Input<'_>) -> Result<Output, Errno> {
        let Span { handle, offset, size, flags } = Span::of(&mut input)?;
        let size = size.min(MAX_WRITE) as usize;
        let flags = flags.difference(OFlags::APPEND);
        self.with_file((handle, node), flags, |file| {
            let fill = |buffer: &mut [u8]| {
                let mut filled = 0;
                while filled < buffer.len() {
                    match rustix::io::pread(file, &mut buffer[filled..], offset.saturating_add(filled as u64)) {
                        Ok(0) => break,
                        Ok(read) => filled += read,
                        Err(Errno::INTR) => {}
                        Err(errno) => return Err(errno),
                    }
                }
                Ok(filled)
            };
            Output::with_capacity(size).filled(size, fill)
        })
    }

    pub(crate) fn write(&self, node: u64, mut input: Input<'_>) -> Result<Output, Errno> {
        self.may_change()?;
        let Span { handle, offset, size, flags } = Span::of(&mut input)?;
        let data = input.0;
        if data.len() != size as usize || size > MAX_WRITE {
            return Err(Errno::INVAL);
        }
        self.with_file((handle, node), flags, |file| {
            let mut written = 0;
            while written < data.len() {
                match rustix::io::pwrite(file, &data[written..], offset.saturating_add(written as u64)) {
                    Ok(0) => break,
                    Ok(more) => written += more,
                    Err(Errno::INTR) => {}
                    // What was written is told; what came in its way is told the next time.
                    Err(_) if written > 0 => break,
                    Err(errno) => return Err(errno),
                }
            }
            Ok(Output::written(written))
        })
    }

    pub(crate) fn sync(&self, node: u64, mut input: Input<'_>) -> Result<Output, Errno> {
        let (handle, flags) = (input.u64()?, input.u32()?);
        self.with_file((handle, node), OFlags::RDONLY, |file| match flags & SYNC_DATA {
            0 => rustix::fs::fsync(file),
            _ => rustix::fs::fdatasync(file),
        })?;
        Ok(Output::default())
    }

    pub(crate) fn allocate(&self, node: u64, mut input: Input<'_>) -> Result<Output, Errno> {
        self.may_change()?;
        let (handle, offset, length, mode) = (input.u64()?, input.u64()?, input.u64()?, input.u32()?);
        let mode = FallocateFlags::from_bits_retain(mode);
        let known = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        if !known.contains(mode) {
            return Err(Errno::OPNOTSUPP);
        }
        self.with_file((handle, node), OFlags::RDWR, |file| rustix::fs::fallocate(file, mode, offset, length))?;
        Ok(Output::default())
    }

    /// Data and holes alone: other positions are the guest's own affair.
    pub(crate) fn seek(&self, node: u64, mut input: Input<'_>) -> Result<Output, Errno> {
        let (handle, offset, whence) = (input.u64()?, input.u64()?, input.u32()?);
        let to = match whence {
            3 => SeekFrom::Data(offset),
            4 => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        let found = self.with_file((handle, node), OFlags::RDONLY, |file| rustix::fs::seek(file, to))?;
        Ok(Output::default().u64(found))
    }

    pub(crate) fn copy_range(&self, node: u64, mut input: Input<'_>) -> Result<Output, Errno> {
        self.may_change()?;
        let (from, mut at) = (input.u64()?, input.u64()?);
        let (target, to, mut there) = (input.u64()?, input.u64()?, input.u64()?);
        // The guest is told how much it was, and asks again.
        let length = usize::try_from(input.u64()?).unwrap_or(usize::MAX).min(64 << 20);
        let copied = self.with_file((from, node), OFlags::RDONLY, |source| {
            self.with_file((to, target), OFlags::RDWR, |file| {
                rustix::fs::copy_file_range(source, Some(&mut at), file, Some(&mut there), length)
            })
        })?;
        Ok(Output::written(copied))
    }

    pub(crate) fn close(&self, mut input: Input<'_>) -> Result<Output, Errno> {
        self.handles.close(input.u64()?);
        Ok(Output::default())
    }
}
