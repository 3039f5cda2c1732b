//! A tree as a tar: each file whole, or refused by name.

use std::{
    collections::HashMap,
    fmt,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use rustix::fs::OFlags;
use tar::{Builder, EntryType, GnuExtSparseHeader, Header};

use crate::holes::{self, Piece};

const BLOCK: u64 = 512;
/// Files with more than one name that are remembered; of more, each name becomes a file of its own.
const MAX_LINKED: usize = 200_000;
/// Names of what is left out that are remembered; the others are counted.
const MAX_NAMED: usize = 20;

/// How a tar is to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// What is done with a file that becomes shorter while it is read.
    pub shrunk: Shrunk,
    /// Whether files keep their owners; else all are root's.
    pub owners: bool,
}

/// What is done with a file that becomes shorter while it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shrunk {
    /// The tar is given up.
    Refused,
    /// Zeros stand for what is missing.
    Padded,
}

/// What was appended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A directory, without what it holds.
    Directory,
    /// A file.
    File,
    /// A symbolic link, or one more name of a file.
    Link,
    /// Nothing: a socket, a FIFO, a device.
    Special,
}

/// Why something cannot be packed.
#[derive(Debug)]
pub enum Problem {
    /// It became shorter, or something else, while it was read.
    Changed {
        /// Where.
        path: PathBuf,
    },
    /// It is no longer there.
    Gone,
    /// It cannot be read.
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The tar cannot be written.
    Output(io::Error),
}

impl Problem {
    /// A failure to read `path`.
    pub fn io(path: &Path, error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::Gone,
            _ => Self::Io { path: path.to_owned(), error },
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Changed { path } => write!(f, "{} changed while it was packed", path.display()),
            Self::Gone => write!(f, "it is no longer there"),
            Self::Io { path, error } => write!(f, "{}: {error}", path.display()),
            Self::Output(error) => write!(f, "{error}"),
        }
    }
}

/// A tar that is being made.
pub struct Packer<W: Write> {
    builder: Builder<W>,
    rules: Rules,
    /// Files with several names, by device and inode, and the name under which each was packed.
    linked: HashMap<(u64, u64), PathBuf>,
    special: Vec<PathBuf>,
    specials: u64,
}

impl<W: Write> Packer<W> {
    /// An empty tar.
    pub fn new(out: W, rules: Rules) -> Self {
        Self { builder: Builder::new(out), rules, linked: HashMap::new(), special: Vec::new(), specials: 0 }
    }

    /// Ends the tar.
    pub fn finish(self) -> Result<W, Problem> {
        self.builder.into_inner().map_err(Problem::Output)
    }

    /// Where the tar goes.
    pub fn get_ref(&self) -> &W {
        self.builder.get_ref()
    }

    /// How many sockets, FIFOs and devices were left out, and the names of the first ones.
    pub fn left_out(&self) -> (u64, &[PathBuf]) {
        (self.specials, &self.special)
    }

    /// Adds what is at `path` under `name`; a directory without what it holds, a link as the link it is.
    pub fn append(&mut self, path: &Path, name: &Path) -> Result<Kind, Problem> {
        let meta = fs::symlink_metadata(path).map_err(|error| Problem::io(path, error))?;
        let kind = meta.file_type();
        if kind.is_dir() {
            let mut header = self.header(EntryType::Directory, &meta);
            self.builder.append_data(&mut header, name, io::empty()).map_err(Problem::Output)?;
            return Ok(Kind::Directory);
        }
        if kind.is_symlink() {
            let target = fs::read_link(path).map_err(|error| Problem::io(path, error))?;
            let mut header = self.header(EntryType::Symlink, &meta);
            self.builder.append_link(&mut header, name, target).map_err(Problem::Output)?;
            return Ok(Kind::Link);
        }
        if kind.is_file() {
            return self.append_file(path, name);
        }
        debug_assert!(kind.is_socket() || kind.is_fifo() || kind.is_char_device() || kind.is_block_device());
        self.specials += 1;
        if self.special.len() < MAX_NAMED {
            self.special.push(name.to_owned());
        }
        Ok(Kind::Special)
    }

    /// Adds the file at `path`, or a link to where it was packed under another name.
    pub fn append_file(&mut self, path: &Path, name: &Path) -> Result<Kind, Problem> {
        // What has become a link or a FIFO since it was looked at is neither followed nor waited for.
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        let opened = File::options().read(true).custom_flags(flags.bits().cast_signed()).open(path);
        let file = opened.map_err(|error| Problem::io(path, error))?;
        let meta = file.metadata().map_err(|error| Problem::io(path, error))?;
        if !meta.is_file() {
            return Err(Problem::Changed { path: path.to_owned() });
        }
        if meta.nlink() > 1 {
            if let Some(first) = self.linked.get(&(meta.dev(), meta.ino())) {
                let first = first.clone();
                let mut header = self.header(EntryType::Link, &meta);
                self.builder.append_link(&mut header, name, first).map_err(Problem::Output)?;
                return Ok(Kind::Link);
            }
            if self.linked.len() < MAX_LINKED {
                self.linked.insert((meta.dev(), meta.ino()), name.to_owned());
            }
        }
        self.append_opened(path, name, &file, None)?;
        Ok(Kind::File)
    }

    /// Adds a file that is open under any name, with a mode of its own or another. `path` stands for it in errors.
    pub fn append_opened(
        &mut self,
        path: &Path,
        name: &Path,
        mut file: &File,
        mode: Option<u32>,
    ) -> Result<(), Problem> {
        let read_error = |error| Problem::io(path, error);
        let meta = file.metadata().map_err(read_error)?;
        let pieces = holes::pieces(file, meta.len()).map_err(read_error)?;
        let mut header = self.header(if pieces.is_some() { EntryType::GNUSparse } else { EntryType::Regular }, &meta);
        if let Some(mode) = mode {
            header.set_mode(mode);
        }
        if let Some(pieces) = pieces {
            return self.append_sparse(path, name, header, meta.len(), file, &pieces);
        }
        file.rewind().map_err(read_error)?;
        self.append_content(path, name, header, file)
    }

    /// Adds a file of known size whose content comes from anywhere: exactly as many bytes as the header says. One that
    /// grows meanwhile is cut off there; one that shrinks would have the rest of the archive misread.
    pub fn append_content(
        &mut self,
        path: &Path,
        name: &Path,
        mut header: Header,
        content: impl Read,
    ) -> Result<(), Problem> {
        let size = header.size().map_err(Problem::Output)?;
        let mut content = Exactly::new(content, size, self.rules.shrunk);
        let appended = self.builder.append_data(&mut header, name, &mut content);
        content.problem(path).map_or(Ok(()), Err)?;
        appended.map_err(Problem::Output)
    }

    /// Adds a file with holes, in GNU's format for them.
    fn append_sparse(
        &mut self,
        path: &Path,
        name: &Path,
        mut header: Header,
        size: u64,
        mut file: &File,
        pieces: &[Piece],
    ) -> Result<(), Problem> {
        let stored = pieces.iter().map(|(_, length)| length).sum();
        header.set_size(stored);
        self.set_name(&mut header, name)?;
        let Some(gnu) = header.as_gnu_mut() else { return Err(Problem::Output(io::ErrorKind::InvalidData.into())) };
        gnu.set_real_size(size);
        for (slot, (offset, length)) in gnu.sparse.iter_mut().zip(pieces) {
            slot.set_offset(*offset);
            slot.set_length(*length);
        }
        let (_, more) = pieces.split_at(pieces.len().min(gnu.sparse.len()));
        gnu.set_is_extended(!more.is_empty());
        header.set_cksum();
        let out = self.builder.get_mut();
        out.write_all(header.as_bytes()).map_err(Problem::Output)?;
        let slots = GnuExtSparseHeader::new().sparse.len();
        let mut chunks = more.chunks(slots).peekable();
        while let Some(chunk) = chunks.next() {
            let mut extended = GnuExtSparseHeader::new();
            for (slot, (offset, length)) in extended.sparse.iter_mut().zip(chunk) {
                slot.set_offset(*offset);
                slot.set_length(*length);
            }
            extended.set_is_extended(chunks.peek().is_some());
            out.write_all(extended.as_bytes()).map_err(Problem::Output)?;
        }
        for (offset, length) in pieces {
            file.seek(SeekFrom::Start(*offset)).map_err(|error| Problem::io(path, error))?;
            let mut content = Exactly::new(file, *length, self.rules.shrunk);
            let copied = io::copy(&mut content, out);
            content.problem(path).map_or(Ok(()), Err)?;
            copied.map_err(Problem::Output)?;
        }
        let padding = stored.next_multiple_of(BLOCK) - stored;
        io::copy(&mut io::repeat(0).take(padding), out).map_err(Problem::Output)?;
        Ok(())
    }

    /// Gives a header its name, with an entry for a long one before it.
    fn set_name(&mut self, header: &mut Header, name: &Path) -> Result<(), Problem> {
        if header.set_path(name).is_ok() {
            return Ok(());
        }
        let bytes = name.as_os_str().as_bytes();
        let mut long = Header::new_gnu();
        long.set_entry_type(EntryType::GNULongName);
        long.set_path("././@LongLink").map_err(Problem::Output)?;
        long.set_size(bytes.len() as u64 + 1);
        long.set_mode(0o644);
        long.set_cksum();
        self.builder.append(&long, bytes.chain(&[0][..])).map_err(Problem::Output)?;
        let field = &mut header.as_old_mut().name;
        let length = bytes.len().min(field.len());
        field[..length].copy_from_slice(&bytes[..length]);
        Ok(())
    }

    fn header(&self, kind: EntryType, meta: &fs::Metadata) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(meta.mode() & 0o7777);
        let (uid, gid) = if self.rules.owners { (meta.uid(), meta.gid()) } else { (0, 0) };
        header.set_uid(uid.into());
        header.set_gid(gid.into());
        // Zero stands for no time: the unpacker gives the time of unpacking.
        header.set_mtime(u64::try_from(meta.mtime()).unwrap_or(0));
        header.set_size(if kind == EntryType::Regular { meta.len() } else { 0 });
        header
    }
}

/// So many bytes of a file; keeps failures to read apart from failures to write.
struct Exactly<R> {
    inner: io::Take<R>,
    padded: bool,
    missing: u64,
    failure: Option<io::Error>,
}

impl<R: Read> Exactly<R> {
    fn new(inner: R, size: u64, shrunk: Shrunk) -> Self {
        Self { inner: inner.take(size), padded: shrunk == Shrunk::Padded, missing: 0, failure: None }
    }

    /// What went wrong at reading, once the content has been read as far as it goes.
    fn problem(self, path: &Path) -> Option<Problem> {
        match self.failure {
            Some(error) => Some(Problem::Io { path: path.to_owned(), error }),
            None if self.missing > 0 && !self.padded => Some(Problem::Changed { path: path.to_owned() }),
            None => None,
        }
    }
}

impl<R: Read> Read for Exactly<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.inner.read(buffer) {
            Ok(0) if self.inner.limit() > 0 && !buffer.is_empty() => {
                self.missing = self.inner.limit();
                if !self.padded {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                let count = buffer.len().min(usize::try_from(self.missing).unwrap_or(usize::MAX));
                buffer[..count].fill(0);
                self.inner.set_limit(self.missing - count as u64);
                Ok(count)
            }
            Ok(count) => Ok(count),
            Err(error) => {
                let kind = error.kind();
                if kind != io::ErrorKind::Interrupted {
                    self.failure = Some(error);
                }
                Err(kind.into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(size: u64, content: impl Read, shrunk: Shrunk) -> Result<Vec<u8>, Problem> {
        let mut packer = Packer::new(Vec::new(), Rules { shrunk, owners: false });
        let mut header = Header::new_gnu();
        header.set_size(size);
        packer.append_content(Path::new("/app/log"), Path::new("log"), header, content)?;
        packer.finish()
    }

    fn content(tar: &[u8]) -> String {
        let mut archive = tar::Archive::new(tar);
        io::read_to_string(archive.entries().unwrap().next().unwrap().unwrap()).unwrap()
    }

    #[test]
    fn a_file_that_grows_is_cut_off_where_it_ended() {
        assert_eq!(content(&packed(5, &b"12345 and more"[..], Shrunk::Refused).unwrap()), "12345");
    }

    #[test]
    fn a_file_that_shrinks_is_refused_by_name_or_padded() {
        let shrunk = packed(5, &b"123"[..], Shrunk::Refused).unwrap_err();
        assert!(matches!(&shrunk, Problem::Changed { path } if path == Path::new("/app/log")), "{shrunk}");
        assert_eq!(content(&packed(5, &b"123"[..], Shrunk::Padded).unwrap()), "123\0\0");
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::from_raw_os_error(5))
            }
        }
        let unreadable = packed(5, Broken, Shrunk::Padded).unwrap_err();
        assert!(
            matches!(&unreadable, Problem::Io { .. }) && unreadable.to_string().contains("/app/log"),
            "{unreadable}"
        );
    }
}
