//! One file, directory or link as an entry of a tar: whole, or refused by name.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Component, Path, PathBuf},
};

use nix::libc::{O_NOCTTY, O_NOFOLLOW, O_NONBLOCK};
use tar::{Builder, EntryType, Header};

/// What a tar is made for. In none may a link lead out of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To be deployed: links lead to what is there, and the same files are the same archive, whenever they were written.
    Deploy,
    /// To be a copy: links may lead to nothing, and files keep their times.
    Copy,
}

/// Why something cannot be packed.
#[derive(Debug)]
pub enum Problem {
    /// A socket, a pipe, a device.
    Special { path: PathBuf, what: &'static str },
    /// A link out of the directory.
    LeadsOut { path: PathBuf, target: PathBuf },
    /// A link to nothing.
    LeadsNowhere { path: PathBuf, target: PathBuf },
    /// It became shorter, or something else, while it was read.
    Changed { path: PathBuf },
    /// It is not there any more.
    Gone,
    /// It cannot be read.
    Io { path: PathBuf, error: io::Error },
    /// The tar cannot be written.
    Output(io::Error),
}

impl Problem {
    /// Reading `path` has failed.
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
            Self::Special { path, what } => write!(f, "{} is {what}, which cannot be packed", path.display()),
            Self::LeadsOut { path, target } => {
                write!(f, "{} leads to {}, outside of the directory", path.display(), target.display())
            }
            Self::LeadsNowhere { path, target } => {
                write!(f, "{} leads to {}, which is not there", path.display(), target.display())
            }
            Self::Changed { path } => write!(f, "{} changed while it was packed", path.display()),
            Self::Gone => write!(f, "it is not there any more"),
            Self::Io { path, error } => write!(f, "{}: {error}", path.display()),
            Self::Output(error) => write!(f, "{error}"),
        }
    }
}

/// Adds what is at `path` under `name`; a directory without what it holds.
pub fn append(builder: &mut Builder<impl Write>, path: &Path, name: &Path, purpose: Purpose) -> Result<(), Problem> {
    let meta = fs::symlink_metadata(path).map_err(|error| Problem::io(path, error))?;
    let kind = meta.file_type();
    if kind.is_dir() {
        let mut header = header(EntryType::Directory, &meta, purpose);
        return builder.append_data(&mut header, name, io::empty()).map_err(Problem::Output);
    }
    if kind.is_symlink() {
        let target = fs::read_link(path).map_err(|error| Problem::io(path, error))?;
        check_link(path, name, &target, purpose)?;
        let mut header = header(EntryType::Symlink, &meta, purpose);
        return builder.append_link(&mut header, name, target).map_err(Problem::Output);
    }
    if kind.is_file() {
        return append_file(builder, path, name, purpose);
    }
    let what = match kind {
        kind if kind.is_socket() => "a socket",
        kind if kind.is_fifo() => "a pipe",
        _ => "a device",
    };
    Err(Problem::Special { path: path.to_owned(), what })
}

/// Adds the file at `path`.
pub fn append_file(
    builder: &mut Builder<impl Write>,
    path: &Path,
    name: &Path,
    purpose: Purpose,
) -> Result<(), Problem> {
    // What has become a link or a pipe since it was looked at is neither followed nor waited for.
    let opened = File::options().read(true).custom_flags(O_NOFOLLOW | O_NONBLOCK | O_NOCTTY).open(path);
    let file = opened.map_err(|error| Problem::io(path, error))?;
    let meta = file.metadata().map_err(|error| Problem::io(path, error))?;
    if !meta.is_file() {
        return Err(Problem::Changed { path: path.to_owned() });
    }
    append_content(builder, path, name, header(EntryType::Regular, &meta, purpose), file)
}

/// Adds exactly as many bytes as the header says: a file that grows meanwhile is cut off there, one that shrinks is
/// refused, since the rest of the archive would be misread.
fn append_content(
    builder: &mut Builder<impl Write>,
    path: &Path,
    name: &Path,
    mut header: Header,
    content: impl Read,
) -> Result<(), Problem> {
    let size = header.size().map_err(Problem::Output)?;
    let mut content = Watched { inner: content.take(size), failure: None };
    let appended = builder.append_data(&mut header, name, &mut content);
    if let Some(error) = content.failure {
        return Err(Problem::Io { path: path.to_owned(), error });
    }
    appended.map_err(Problem::Output)?;
    if content.inner.limit() > 0 { Err(Problem::Changed { path: path.to_owned() }) } else { Ok(()) }
}

/// Tells failures to read from failures to write.
struct Watched<R> {
    inner: R,
    failure: Option<io::Error>,
}

impl<R: Read> Read for Watched<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer).map_err(|error| {
            let kind = error.kind();
            if kind != io::ErrorKind::Interrupted {
                self.failure = Some(error);
            }
            kind.into()
        })
    }
}

/// Owners stay here.
fn header(kind: EntryType, meta: &fs::Metadata, purpose: Purpose) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(meta.permissions().mode() & 0o777);
    header.set_uid(0);
    header.set_gid(0);
    // Who unpacks an archive of no time gives it the time of unpacking.
    header.set_mtime(if purpose == Purpose::Copy { u64::try_from(meta.mtime()).unwrap_or(0) } else { 0 });
    header.set_size(if kind == EntryType::Regular { meta.len() } else { 0 });
    header
}

fn check_link(path: &Path, name: &Path, target: &Path, purpose: Purpose) -> Result<(), Problem> {
    let (shown, target) = (path.to_owned(), target.to_owned());
    if !stays_inside(&name.parent().unwrap_or(Path::new("")).join(&target)) {
        return Err(Problem::LeadsOut { path: shown, target });
    }
    if purpose == Purpose::Deploy && fs::metadata(path).is_err() {
        return Err(Problem::LeadsNowhere { path: shown, target });
    }
    Ok(())
}

/// Relative, and never above where it began.
fn stays_inside(path: &Path) -> bool {
    let mut depth = 0_i64;
    path.components().all(|part| {
        depth += match part {
            Component::Normal(_) => 1,
            Component::CurDir => 0,
            Component::ParentDir => -1,
            Component::RootDir | Component::Prefix(_) => return false,
        };
        depth >= 0
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(size: u64, content: impl Read) -> Result<Vec<u8>, Problem> {
        let mut builder = Builder::new(Vec::new());
        let mut header = Header::new_gnu();
        header.set_size(size);
        append_content(&mut builder, Path::new("/app/log"), Path::new("log"), header, content)?;
        Ok(builder.into_inner().unwrap())
    }

    #[test]
    fn a_file_that_grows_is_cut_off_where_it_ended() {
        let archive = packed(5, &b"12345 and more"[..]).unwrap();
        let mut archive = tar::Archive::new(&archive[..]);
        let texts: Vec<String> = archive.entries().unwrap().map(|e| io::read_to_string(e.unwrap()).unwrap()).collect();
        assert_eq!(texts, ["12345"]);
    }

    #[test]
    fn a_file_that_shrinks_or_cannot_be_read_is_told_of_by_name() {
        let shrunk = packed(5, &b"123"[..]).unwrap_err();
        assert!(matches!(&shrunk, Problem::Changed { path } if path == Path::new("/app/log")), "{shrunk}");
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::from_raw_os_error(nix::libc::EIO))
            }
        }
        let unreadable = packed(5, Broken).unwrap_err();
        assert!(
            matches!(&unreadable, Problem::Io { .. }) && unreadable.to_string().contains("/app/log"),
            "{unreadable}"
        );
    }

    #[test]
    fn links_are_judged_from_where_they_stand() {
        for (path, inside) in [
            ("a", true),
            ("a/../b", true),
            ("a/b/../../c", true),
            ("..", false),
            ("a/../..", false),
            ("a/../../a/b", false),
            ("/etc/passwd", false),
        ] {
            assert_eq!(stays_inside(Path::new(path)), inside, "{path}");
        }
    }
}
