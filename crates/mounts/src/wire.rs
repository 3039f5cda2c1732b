//! The FUSE protocol, as far as it is needed. Source: Linux's `include/uapi/linux/fuse.h`, version 7.31 (kernel 5.15 has
//! 7.34). Numbers are in the guest's byte order, which is this host's.

use std::ops::BitOr;

use rustix::io::Errno;

/// Largest piece of a file in one request, in bytes.
pub const MAX_WRITE: u32 = 1 << 20;
/// Longest name of a file, in bytes.
pub const MAX_NAME: usize = 255;
/// How long the guest may go by what it knows of a file or a name.
pub const VALID_SECONDS: u64 = 1;

/// Number of the directory itself.
pub const ROOT: u64 = 1;

const VERSION: u32 = 7;
const REVISION: u32 = 31;
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
const PAGE: u32 = 4096;
/// Requests that the guest's kernel has under way by itself (read-ahead, late closes).
const MAX_BACKGROUND: u16 = 32;

/// What the guest asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Operation {
    Lookup,
    Forget,
    GetAttr,
    SetAttr,
    ReadLink,
    SymLink,
    MakeNode,
    MakeDir,
    Unlink,
    RemoveDir,
    Rename,
    Rename2,
    Link,
    Open,
    Read,
    Write,
    StatFs,
    Release,
    Sync,
    Init,
    OpenDir,
    ReadDir,
    ReadDirPlus,
    ReleaseDir,
    SyncDir,
    Create,
    Destroy,
    BatchForget,
    Allocate,
    Seek,
    CopyRange,
    /// Answered with ENOSYS: the guest's kernel does without, and does not ask again.
    Other,
}

impl Operation {
    fn of(opcode: u32) -> Self {
        match opcode {
            1 => Self::Lookup,
            2 => Self::Forget,
            3 => Self::GetAttr,
            4 => Self::SetAttr,
            5 => Self::ReadLink,
            6 => Self::SymLink,
            8 => Self::MakeNode,
            9 => Self::MakeDir,
            10 => Self::Unlink,
            11 => Self::RemoveDir,
            12 => Self::Rename,
            13 => Self::Link,
            14 => Self::Open,
            15 => Self::Read,
            16 => Self::Write,
            17 => Self::StatFs,
            18 => Self::Release,
            20 => Self::Sync,
            26 => Self::Init,
            27 => Self::OpenDir,
            28 => Self::ReadDir,
            29 => Self::ReleaseDir,
            30 => Self::SyncDir,
            35 => Self::Create,
            38 => Self::Destroy,
            42 => Self::BatchForget,
            43 => Self::Allocate,
            44 => Self::ReadDirPlus,
            45 => Self::Rename2,
            46 => Self::Seek,
            47 => Self::CopyRange,
            _ => Self::Other,
        }
    }

    /// Whether the guest waits for an answer.
    pub fn is_answered(self) -> bool {
        !matches!(self, Self::Forget | Self::BatchForget)
    }
}

/// The head of a request.
#[derive(Debug, Clone, Copy)]
pub struct Head {
    /// What is asked for.
    pub operation: Operation,
    /// The request's own number.
    pub unique: u64,
    /// The file it is about.
    pub node: u64,
}

/// Splits a request into its head and the rest; `None` when it is not a whole one.
pub fn request(bytes: &[u8]) -> Option<(Head, Input<'_>)> {
    let mut input = Input(bytes);
    let length = input.u32().ok()? as usize;
    let head = Head { operation: Operation::of(input.u32().ok()?), unique: input.u64().ok()?, node: input.u64().ok()? };
    (length == bytes.len() && length >= IN_HEADER).then(|| (head, Input(&bytes[IN_HEADER..])))
}

/// An answer, ready for /dev/fuse.
pub fn answer(unique: u64, outcome: Result<Output, Errno>) -> Vec<u8> {
    let (mut bytes, error) = match outcome {
        Ok(output) => (output.0, 0),
        Err(errno) => (Output::default().0, -errno.raw_os_error()),
    };
    let length = bytes.len() as u32;
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    bytes[4..8].copy_from_slice(&error.to_ne_bytes());
    bytes[8..OUT_HEADER].copy_from_slice(&unique.to_ne_bytes());
    bytes
}

/// What is left of a request. What is too short is EINVAL.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], Errno> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(taken)
    }

    /// The next four bytes.
    pub fn u32(&mut self) -> Result<u32, Errno> {
        Ok(u32::from_ne_bytes(self.take(4)?.try_into().map_err(|_| Errno::INVAL)?))
    }

    /// The next eight bytes.
    pub fn u64(&mut self) -> Result<u64, Errno> {
        Ok(u64::from_ne_bytes(self.take(8)?.try_into().map_err(|_| Errno::INVAL)?))
    }

    /// Passes over so many bytes.
    pub fn skip(&mut self, length: usize) -> Result<(), Errno> {
        self.take(length).map(drop)
    }

    /// Bytes up to a zero byte, which is taken, too.
    pub fn text(&mut self) -> Result<&'a [u8], Errno> {
        let length = self.0.iter().position(|&byte| byte == 0).ok_or(Errno::INVAL)?;
        let text = self.take(length)?;
        self.skip(1)?;
        Ok(text)
    }

    /// A name within a directory: one step, and not the one back.
    pub fn name(&mut self) -> Result<&'a [u8], Errno> {
        let name = self.text()?;
        match name {
            b"" | b"." | b".." => Err(Errno::INVAL),
            _ if name.contains(&b'/') => Err(Errno::INVAL),
            _ if name.len() > MAX_NAME => Err(Errno::NAMETOOLONG),
            _ => Ok(name),
        }
    }
}

/// The body of an answer, behind room for its head.
#[derive(Debug)]
pub struct Output(Vec<u8>);

impl Default for Output {
    fn default() -> Self {
        Self(vec![0; OUT_HEADER])
    }
}

impl Output {
    /// A body that is about this long.
    pub fn with_capacity(length: usize) -> Self {
        let mut bytes = Vec::with_capacity(OUT_HEADER + length);
        bytes.resize(OUT_HEADER, 0);
        Self(bytes)
    }

    /// Length of the body so far.
    pub fn len(&self) -> usize {
        self.0.len() - OUT_HEADER
    }

    /// Appends.
    pub fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    /// Appends.
    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    /// Appends.
    pub fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    /// Appends.
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// Appends zeros.
    pub fn zeros(mut self, count: usize) -> Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }

    /// Room for `length` bytes, to be filled, of which `fill` says how many it has used.
    pub fn filled(
        mut self,
        length: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
    ) -> Result<Self, Errno> {
        let start = self.0.len();
        self.0.resize(start + length, 0);
        let used = fill(&mut self.0[start..])?;
        self.0.truncate(start + used.min(length));
        Ok(self)
    }

    /// `fuse_attr`. To the guest everything is root's: its users have no meaning here, nor ours there.
    pub fn attributes(self, stat: &rustix::fs::Stat) -> Self {
        self.u64(stat.st_ino)
            .u64(stat.st_size as u64)
            .u64(stat.st_blocks as u64)
            .u64(stat.st_atime as u64)
            .u64(stat.st_mtime as u64)
            .u64(stat.st_ctime as u64)
            .u32(stat.st_atime_nsec as u32)
            .u32(stat.st_mtime_nsec as u32)
            .u32(stat.st_ctime_nsec as u32)
            .u32(stat.st_mode & (KIND | PERMISSIONS))
            .u32(u32::try_from(stat.st_nlink).unwrap_or(u32::MAX))
            .zeros(12)
            .u32(PAGE)
            .zeros(4)
    }

    /// `fuse_attr_out`.
    pub fn current(self, stat: &rustix::fs::Stat) -> Self {
        self.u64(VALID_SECONDS).zeros(8).attributes(stat)
    }

    /// `fuse_entry_out`.
    pub fn entry(self, node: u64, stat: &rustix::fs::Stat) -> Self {
        self.u64(node).zeros(8).u64(VALID_SECONDS).u64(VALID_SECONDS).zeros(8).attributes(stat)
    }

    /// `fuse_entry_out` of a name that is not there, which the guest may go by, too.
    pub fn absent() -> Self {
        Self::default().zeros(16).u64(VALID_SECONDS).zeros(ENTRY - 24)
    }

    /// `fuse_open_out`.
    pub fn opened(self, handle: u64) -> Self {
        self.u64(handle).zeros(8)
    }

    /// `fuse_write_out`.
    pub fn written(length: usize) -> Self {
        Self::default().u32(length as u32).zeros(4)
    }
}

/// Bytes of a `fuse_entry_out`.
pub const ENTRY: usize = 128;
/// The bits of a mode that say what a file is.
pub const KIND: u32 = 0o170_000;
/// The bits of a mode that a guest sees and may set: not those that lend a program its owner's rights.
pub const PERMISSIONS: u32 = 0o1777;

/// Bits of `fuse_setattr_in.valid`.
#[derive(Debug, Clone, Copy)]
pub struct Change(pub u32);

#[allow(missing_docs)]
impl Change {
    pub const MODE: u32 = 1;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const HANDLE: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;

    pub fn has(self, bits: u32) -> bool {
        self.0 & bits != 0
    }
}

/// Bit of `fuse_getattr_in.getattr_flags`: a handle is given.
pub const GETATTR_HANDLE: u32 = 1;
/// Bit of `fuse_fsync_in.fsync_flags`: data alone.
pub const SYNC_DATA: u32 = 1;

mod ability {
    pub const ASYNC_READ: u32 = 1;
    pub const ATOMIC_TRUNCATE: u32 = 1 << 3;
    pub const BIG_WRITES: u32 = 1 << 5;
    pub const AUTO_INVALIDATE: u32 = 1 << 12;
    pub const READDIR_PLUS: u32 = 1 << 13;
    pub const READDIR_PLUS_WHEN_WORTH_IT: u32 = 1 << 14;
    pub const PARALLEL_DIRECTORIES: u32 = 1 << 18;
    pub const MAX_PAGES: u32 = 1 << 22;
}

/// Answers `fuse_init_in`: what both can do. Nothing that comes later depends on it.
pub fn initialized(mut input: Input<'_>) -> Result<Output, Errno> {
    let (version, revision) = (input.u32()?, input.u32()?);
    if version > VERSION {
        // It asks again, in our version.
        return Ok(Output::default().u32(VERSION).u32(REVISION).zeros(56));
    }
    if version < VERSION || revision < REVISION {
        return Err(Errno::PROTO);
    }
    let (read_ahead, able) = (input.u32()?, input.u32()?);
    let wanted = [
        ability::ASYNC_READ,
        ability::ATOMIC_TRUNCATE,
        ability::BIG_WRITES,
        ability::AUTO_INVALIDATE,
        ability::READDIR_PLUS,
        ability::READDIR_PLUS_WHEN_WORTH_IT,
        ability::PARALLEL_DIRECTORIES,
        ability::MAX_PAGES,
    ];
    let wanted = wanted.into_iter().fold(0, u32::bitor);
    Ok(Output::default()
        .u32(VERSION)
        .u32(REVISION)
        .u32(read_ahead.min(MAX_WRITE))
        .u32(able & wanted)
        .u16(MAX_BACKGROUND)
        .u16(MAX_BACKGROUND * 3 / 4)
        .u32(MAX_WRITE)
        .u32(1)
        .u16((MAX_WRITE / PAGE) as u16)
        .zeros(34))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_have_the_length_that_the_kernel_expects() {
        let init = [7_u32, 38, 1 << 20, u32::MAX].map(u32::to_ne_bytes).concat();
        assert_eq!(initialized(Input(&init)).unwrap().len(), 64);
        let newer = [8_u32, 0, 0, 0].map(u32::to_ne_bytes).concat();
        assert_eq!(initialized(Input(&newer)).unwrap().len(), 64);
        let stat = rustix::fs::stat("/").unwrap();
        assert_eq!(Output::default().attributes(&stat).len(), 88);
        assert_eq!(Output::default().current(&stat).len(), 104);
        assert_eq!(Output::default().entry(2, &stat).len(), ENTRY);
        assert_eq!(Output::absent().len(), ENTRY);
        assert_eq!(Output::default().opened(1).len(), 16);
        let refused = answer(7, Err(Errno::NOENT));
        assert_eq!(refused, [16_u32.to_ne_bytes(), (-2_i32).to_ne_bytes(), 7_u32.to_ne_bytes(), [0; 4]].concat());
    }

    #[test]
    fn a_name_is_one_step_down() {
        let name = |text: &[u8]| Input(text).name().map(<[u8]>::to_vec);
        assert_eq!(name(b"a\0").unwrap(), b"a");
        assert_eq!(name(b"...\0").unwrap(), b"...");
        for bad in [&b"\0"[..], b".\0", b"..\0", b"a/b\0", b"/\0", b"no end", b""] {
            assert_eq!(name(bad), Err(Errno::INVAL), "{bad:?}");
        }
        assert_eq!(name(&[[b'a'; 256].as_slice(), b"\0"].concat()), Err(Errno::NAMETOOLONG));
    }
}
