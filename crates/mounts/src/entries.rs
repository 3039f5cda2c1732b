//! Names and what they stand for: looking up, attributes, making, removing, renaming.

use std::{fs::File, os::fd::OwnedFd};

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, Stat, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, fstat},
    io::Errno,
};

use crate::{
    Server,
    tree::{self, child, confined},
    wire::{Change, GETATTR_HANDLE, Input, KIND, Output, PERMISSIONS},
};

impl Server {
    pub(crate) fn look_up(&self, parent: u64, mut input: Input<'_>) -> Result<Output, Errno> {
        let name = input.name()?;
        match child(&self.directory(parent)?, name) {
            Ok((_, stat)) => self.entry(parent, name, &stat),
            Err(Errno::NOENT) => Ok(Output::absent()),
            Err(errno) => Err(errno),
        }
    }

    fn entry(&self, parent: u64, name: &[u8], stat: &Stat) -> Result<Output, Errno> {
        let node = self.nodes().give(parent, name, tree::identity(stat))?;
        Ok(Output::default().entry(node, stat))
    }

    pub(crate) fn forget(&self, node: u64, mut input: Input<'_>) -> Result<Output, Errno> {
        let times = input.u64()?;
        self.nodes().forget(node, times);
        Ok(Output::default())
    }

    pub(crate) fn forget_many(&self, mut input: Input<'_>) -> Result<Output, Errno> {
        let count = input.u32()?;
        input.skip(4)?;
        let mut nodes = self.nodes();
        for _ in 0..count {
            let (node, times) = (input.u64()?, input.u64()?);
            nodes.forget(node, times);
        }
        Ok(Output::default())
    }

    pub(crate) fn attributes(&self, node: u64, mut input: Input<'_>) -> Result<Output, Errno> {
        let flags = input.u32()?;
        input.skip(4)?;
        let handle = input.u64()?;
        let open = self.handles.get(handle).filter(|open| flags & GETATTR_HANDLE != 0 && open.node == node);
        let stat = match open {
            Some(open) => fstat(&open.file)?,
            None => match self.find(node) {
                // It has no name any more, but somebody has it open.
                Err(Errno::STALE) => fstat(&self.handles.of(node).ok_or(Errno::STALE)?.file)?,
                found => found?.1,
            },
        };
        Ok(Output::default().current(&stat))
    }

    /// Owners are not changed: in the guest everything is root's, here everything made is the directory's owner's.
    pub(crate) fn change(&self, node: u64, mut input: Input<'_>) -> Result<Output, Errno> {
        self.may_change()?;
        let what = Change(input.u32()?);
        input.skip(4)?;
        let (handle, size) = (input.u64()?, input.u64()?);
        input.skip(8)?;
        let (atime, mtime) = (input.u64()?, input.u64()?);
        input.skip(8)?;
        let (atime_nsec, mtime_nsec) = (input.u32()?, input.u32()?);
        input.skip(4)?;
        let mode = input.u32()?;

        let open = self.handles.get(handle).filter(|open| what.has(Change::HANDLE) && open.node == node);
        let target: OwnedFd = match &open {
            Some(open) => open.file.try_clone().map_err(|_| Errno::MFILE)?.into(),
            None => match self.find(node) {
                Err(Errno::STALE) => {
                    let open = self.handles.of(node).ok_or(Errno::STALE)?;
                    open.file.try_clone().map_err(|_| Errno::MFILE)?.into()
                }
                found => found?.0,
            },
        };
        if what.has(Change::MODE) {
            tree::set_permissions(&target, mode)?;
        }
        if what.has(Change::SIZE) {
            match &open {
                Some(open) => rustix::fs::ftruncate(&open.file, size)?,
                None => rustix::fs::ftruncate(tree::open(&target, OFlags::WRONLY)?, size)?,
            }
        }
        if what.has(Change::ATIME | Change::MTIME) {
            let time = |given: u32, now: u32, seconds: u64, nanoseconds: u32| {
                let tv_nsec = match () {
                    () if what.has(now) => UTIME_NOW,
                    () if what.has(given) => i64::from(nanoseconds.min(999_999_999)),
                    () => UTIME_OMIT,
                };
                Timespec { tv_sec: seconds as i64, tv_nsec }
            };
            let times = Timestamps {
                last_access: time(Change::ATIME, Change::ATIME_NOW, atime, atime_nsec),
                last_modification: time(Change::MTIME, Change::MTIME_NOW, mtime, mtime_nsec),
            };
            rustix::fs::utimensat(CWD, tree::itself(&target), &times, AtFlags::empty())?;
        }
        Ok(Output::default().current(&fstat(&target)?))
    }

    pub(crate) fn read_link(&self, node: u64) -> Result<Output, Errno> {
        let target = rustix::fs::readlinkat(self.find(node)?.0, "", Vec::new())?;
        Ok(Output::default().bytes(target.as_bytes()))
    }

    /// Makes something in a directory by `make` and tells of it.
    fn made<T>(
        &self,
        parent: u64,
        name: &[u8],
        make: impl FnOnce(&OwnedFd) -> Result<T, Errno>,
    ) -> Result<Output, Errno> {
        self.may_change()?;
        let dir = self.directory(parent)?;
        make(&dir)?;
        self.entry(parent, name, &child(&dir, name)?.1)
    }

    /// The text is the guest's: where it leads is looked at by whoever follows it, and nobody here does.
    pub(crate) fn make_link(&self, parent: u64, mut input: Input<'_>) -> Result<Output, Errno> {
        let (name, target) = (input.name()?, input.text()?);
        self.made(parent, name, |dir| rustix::fs::symlinkat(target, dir, name))
    }

    pub(crate) fn make_directory(&self, parent: u64, mut input: Input<'_>) -> Result<Output, Errno> {
        let mode = input.u32()?;
        input.skip(4)?;
        let name = input.name()?;
        let mode = Mode::from_raw_mode(mode & PERMISSIONS);
        self.made(parent, name, |dir| rustix::fs::mkdirat(dir, name, mode))
    }

    /// Regular files alone: no devices, pipes and sockets.
    pub(crate) fn make_file(&self, parent: u64, mut input: Input<'_>) -> Result<Output, Errno> {
        let mode = input.u32()?;
        input.skip(12)?;
        let name = input.name()?;
        if !matches!(FileType::from_raw_mode(mode & KIND), FileType::RegularFile) {
            return Err(Errno::PERM);
        }
        self.made(parent, name, |dir| create(dir, name, OFlags::WRONLY, mode))
    }

    pub(crate) fn create(&self, parent: u64, mut input: Input<'_>) -> Result<Output, Errno> {
        let (flags, mode) = (input.u32()?, input.u32()?);
        input.skip(8)?;
        let name = input.name()?;
        let asked = OFlags::from_bits_retain(flags);
        self.may_change()?;
        let dir = self.directory(parent)?;
        let flags = super::files::permitted(asked);
        let file = match create(&dir, name, flags, mode) {
            Err(Errno::EXIST) if !asked.contains(OFlags::EXCL) => tree::open(&child(&dir, name)?.0, flags)?,
            done => done?,
        };
        let stat = fstat(&file)?;
        let node = self.nodes().give(parent, name, tree::identity(&stat))?;
        match self.handles.keep(file, node) {
            Ok(handle) => Ok(Output::default().entry(node, &stat).opened(handle)),
            Err(errno) => {
                self.nodes().forget(node, 1);
                Err(errno)
            }
        }
    }

    pub(crate) fn remove(&self, parent: u64, mut input: Input<'_>, directory: bool) -> Result<Output, Errno> {
        self.may_change()?;
        let name = input.name()?;
        let flags = if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        rustix::fs::unlinkat(self.directory(parent)?, name, flags)?;
        self.nodes().remove(parent, name);
        Ok(Output::default())
    }

    pub(crate) fn rename(&self, parent: u64, mut input: Input<'_>, with_flags: bool) -> Result<Output, Errno> {
        self.may_change()?;
        let new_parent = input.u64()?;
        let mut flags = RenameFlags::empty();
        if with_flags {
            flags = RenameFlags::from_bits_retain(input.u32()?);
            input.skip(4)?;
        }
        if !(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE).contains(flags) {
            return Err(Errno::INVAL);
        }
        let (from, to) = (input.name()?, input.name()?);
        rustix::fs::renameat_with(self.directory(parent)?, from, self.directory(new_parent)?, to, flags)?;
        let mut nodes = self.nodes();
        match flags.contains(RenameFlags::EXCHANGE) {
            true => nodes.exchange((parent, from), (new_parent, to)),
            false => nodes.rename((parent, from), (new_parent, to)),
        }
        Ok(Output::default())
    }

    pub(crate) fn make_name(&self, parent: u64, mut input: Input<'_>) -> Result<Output, Errno> {
        let (node, name) = (input.u64()?, input.name()?);
        let (file, stat) = self.find(node)?;
        if stat.st_mode & KIND == 0o040_000 {
            return Err(Errno::PERM);
        }
        let itself = tree::itself(&file);
        let link = |dir: &OwnedFd| rustix::fs::linkat(CWD, itself, dir, name, AtFlags::SYMLINK_FOLLOW);
        self.made(parent, name, link)
    }

    pub(crate) fn file_system(&self) -> Result<Output, Errno> {
        let stat = rustix::fs::fstatvfs(self.tree.root())?;
        Ok(Output::default()
            .u64(stat.f_blocks)
            .u64(stat.f_bfree)
            .u64(stat.f_bavail)
            .u64(stat.f_files)
            .u64(stat.f_ffree)
            .u32(stat.f_bsize as u32)
            .u32(stat.f_namemax as u32)
            .u32(stat.f_frsize as u32)
            .zeros(28))
    }
}

/// A new regular file; EEXIST where there is anything of that name.
fn create(dir: &OwnedFd, name: &[u8], flags: OFlags, mode: u32) -> Result<File, Errno> {
    let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::NOCTTY;
    Ok(confined(dir, name, flags, Mode::from_raw_mode(mode & PERMISSIONS))?.into())
}
