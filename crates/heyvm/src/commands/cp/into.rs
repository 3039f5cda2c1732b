//! Into a sandbox: a file or directory here becomes a tar, sent as it is made. What is neither (a pipe, a terminal, the
//! standard input) is read to its end first, since a tar says beforehand how long its files are.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File, Metadata},
    io::{self, Seek, Write},
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use heyvm_api::{ApiError, ErrorCode, client::Client, files::UnpackResponse};
use heyvm_bounded_tar::{Packer, Problem};
use ignore::WalkBuilder;

use super::{Copied, Remote, STANDARD, invalid, watched};
use crate::{
    archive::{RULES, left_out},
    outgoing::{self, Outgoing},
    progress::Line,
};

/// Mode of a file whose source has none of its own.
const MODE: u32 = 0o644;

/// Copies `source` into a sandbox.
pub async fn into(client: &Client, source: &Path, target: Remote<'_>, line: Line) -> Result<Copied, ApiError> {
    let source = Source::of(source)?;
    let is_directory = target.is_directory(client).await?;
    let place = place(source.name.as_deref(), source.is_directory(), &target.absolute(), is_directory)?;
    let url = target.tar(&place.directory);
    let (outgoing, body) = outgoing::pipe();
    let packing = tokio::task::spawn_blocking(move || pack(source, Path::new(&place.name), outgoing));
    let sent: Result<UnpackResponse, ApiError> = client.put(&url, "application/x-tar", watched(body, line)).await;
    let packed = packing.await.map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))?;
    match (packed, sent) {
        // The sandbox has said why it takes no more.
        (Err(Problem::Output(_)) | Ok(_), Err(error)) => Err(error),
        (Err(problem), _) => Err(refuse(&problem)),
        (Ok(notes), Ok(done)) => {
            Ok(Copied { bytes: done.bytes, entries: done.entries, notes: notes.into_iter().collect() })
        }
    }
}

/// What is to be copied.
struct Source {
    what: What,
    /// What it is called; `.` and the standard input have no name of their own.
    name: Option<OsString>,
}

enum What {
    Directory(PathBuf),
    File(PathBuf),
    /// Its end shows only at the end.
    Stream(File),
}

impl Source {
    fn of(typed: &Path) -> Result<Self, ApiError> {
        if typed.as_os_str() == STANDARD {
            let stdin = File::open("/dev/stdin").or_else(|_| owned_stdin());
            let stdin =
                stdin.map_err(|error| invalid(format!("standard input: {error}")).hint("Redirect a file to it."))?;
            return Ok(Self { what: What::Stream(stdin), name: None });
        }
        let missing =
            |error| invalid(format!("{}: {error}", typed.display())).hint("name a file or directory that is there");
        let meta = fs::metadata(typed).map_err(missing)?;
        // A link's copy is called as the link is.
        let named = |path: &Path| path.file_name().map(OsString::from);
        if is_stream(&meta) {
            // /dev/fd/63 of a `<(command)` leads to no path: what it stands for is opened, not where its text leads.
            let stream = File::open(typed).map_err(missing)?;
            return Ok(Self { what: What::Stream(stream), name: named(typed) });
        }
        let real = typed.canonicalize().map_err(missing)?;
        let name = named(typed).or_else(|| named(&real));
        if meta.is_dir() {
            return Ok(Self { what: What::Directory(real), name });
        }
        if meta.is_file() {
            return Ok(Self { what: What::File(real), name });
        }
        Err(invalid(format!("{} is a socket or a block device", typed.display()))
            .hint("Copy files, directories, pipes or the standard input."))
    }

    fn is_directory(&self) -> bool {
        matches!(self.what, What::Directory(_))
    }
}

fn is_stream(meta: &Metadata) -> bool {
    let kind = meta.file_type();
    kind.is_fifo() || kind.is_char_device()
}

/// A socket as standard input cannot be opened by its name.
fn owned_stdin() -> io::Result<File> {
    use std::os::fd::AsFd;
    Ok(io::stdin().as_fd().try_clone_to_owned()?.into())
}

/// Where a copy goes.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    /// Directory that the tar is unpacked in.
    directory: String,
    /// Name of a file in it; a directory's content goes right in.
    name: OsString,
}

/// A target that is a directory gets a copy in it; any other target becomes the copy.
fn place(
    name: Option<&OsStr>,
    source_is_directory: bool,
    target: &str,
    target_is_directory: bool,
) -> Result<Place, ApiError> {
    if !source_is_directory {
        if target_is_directory || target.ends_with('/') {
            let name = name.ok_or_else(|| {
                invalid("the copy of the standard input has no name".into()).hint("Name it: SANDBOX:/path/NAME")
            })?;
            return Ok(Place { directory: target.into(), name: name.into() });
        }
        let (parent, last) = target.rsplit_once('/').unwrap_or(("", target));
        return Ok(Place { directory: format!("{parent}/"), name: last.into() });
    }
    if !target_is_directory {
        return Ok(Place { directory: target.into(), name: OsString::new() });
    }
    // Part of a query from here on.
    let name = name.unwrap_or_default();
    let name = name.to_str().ok_or_else(|| {
        invalid(format!("the name {} is not UTF-8", name.display())).hint("name the copy: SANDBOX:/path/NAME")
    })?;
    Ok(Place { directory: format!("{}/{name}", target.trim_end_matches('/')), name: OsString::new() })
}

fn pack(source: Source, name: &Path, outgoing: Outgoing) -> Result<Option<String>, Problem> {
    let mut packer = Packer::new(outgoing, RULES);
    match source.what {
        What::File(path) => drop(packer.append_file(&path, name)?),
        What::Directory(path) => directory(&mut packer, &path)?,
        What::Stream(stream) => {
            let file = whole(stream).map_err(|error| Problem::Io { path: name.to_owned(), error })?;
            packer.append_opened(name, name, &file, Some(MODE))?;
        }
    }
    let note = left_out(packer.left_out());
    packer.finish()?.finish().map_err(Problem::Output)?;
    Ok(note)
}

/// All of a stream as a file without a name, which says how long it is.
fn whole(mut stream: File) -> io::Result<File> {
    let mut file = tempfile::tempfile()?;
    io::copy(&mut stream, &mut file)?;
    file.flush()?;
    file.rewind()?;
    Ok(file)
}

fn directory(packer: &mut Packer<impl Write>, source: &Path) -> Result<(), Problem> {
    for found in WalkBuilder::new(source).standard_filters(false).sort_by_file_name(|a, b| a.cmp(b)).build() {
        let found = found.map_err(|error| Problem::Io { path: source.to_owned(), error: io::Error::other(error) })?;
        if found.depth() == 0 {
            continue;
        }
        let name = found.path().strip_prefix(source).unwrap_or(found.path());
        match packer.append(found.path(), name) {
            Ok(_) | Err(Problem::Gone) => {}
            Err(problem) => return Err(problem),
        }
    }
    Ok(())
}

fn refuse(problem: &Problem) -> ApiError {
    let hint = match problem {
        Problem::Changed { .. } | Problem::Gone => "copy again, once nothing writes to it",
        Problem::Io { .. } | Problem::Output(_) => "Make it readable.",
    };
    invalid(problem.to_string()).hint(hint)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use nix::sys::stat::Mode;

    use super::*;

    #[test]
    fn a_directory_gets_a_copy_and_anything_else_becomes_it() {
        let place = |source: &str, dir, target: &str, target_is_dir| {
            let place = super::place(Path::new(source).file_name(), dir, target, target_is_dir).unwrap();
            (place.directory, place.name.into_string().unwrap())
        };
        let told = |directory: &str, name: &str| (directory.to_owned(), name.to_owned());
        assert_eq!(place("/here/a.txt", false, "/tmp", true), told("/tmp", "a.txt"));
        assert_eq!(place("/here/a.txt", false, "/tmp/b.txt", false), told("/tmp/", "b.txt"));
        assert_eq!(place("/here/a.txt", false, "/b.txt", false), told("/", "b.txt"));
        assert_eq!(place("/here/a.txt", false, "/new/", false), told("/new/", "a.txt"));
        assert_eq!(place("/here/tree", true, "/srv", true), told("/srv/tree", ""));
        assert_eq!(place("/here/tree", true, "/", true), told("/tree", ""));
        assert_eq!(place("/here/tree", true, "/srv/new", false), told("/srv/new", ""));
        assert_eq!(place("/", true, "/srv", true), told("/srv/", ""));
        assert!(super::place(None, false, "/srv", true).is_err(), "the standard input has no name");
    }

    /// The tar of a copy, and its note.
    async fn packed(source: &Path, name: &str) -> Result<(Vec<u8>, Option<String>), Problem> {
        use futures::TryStreamExt;
        let (outgoing, body) = outgoing::pipe();
        let (source, name) = (Source::of(source).unwrap(), PathBuf::from(name));
        let packing = tokio::task::spawn_blocking(move || pack(source, &name, outgoing));
        let tar: Result<Vec<_>, _> = body.try_collect().await;
        let note = packing.await.unwrap()?;
        Ok((tar.unwrap().concat(), note))
    }

    fn entries(tar: &[u8]) -> Vec<(PathBuf, String)> {
        let mut archive = tar::Archive::new(tar);
        let entries = archive.entries().unwrap().map(Result::unwrap);
        entries.map(|mut entry| (entry.path().unwrap().into_owned(), io::read_to_string(&mut entry).unwrap())).collect()
    }

    #[tokio::test]
    async fn nothing_of_a_directory_is_ignored_and_links_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        for name in [".git/config", "node_modules/m.js", "a"] {
            fs::create_dir_all(dir.path().join(name).parent().unwrap()).unwrap();
            fs::write(dir.path().join(name), "x").unwrap();
        }
        fs::write(dir.path().join(".gitignore"), "a\n").unwrap();
        for (name, target) in [("dangling", "nowhere"), ("etc", "/etc/passwd"), ("up", "../x")] {
            symlink(target, dir.path().join(name)).unwrap();
        }
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("b.sock")).unwrap();
        nix::unistd::mkfifo(&dir.path().join("queue"), Mode::S_IRWXU).unwrap();
        let (tar, note) = packed(dir.path(), "").await.unwrap();
        let names: Vec<_> = entries(&tar).into_iter().map(|(name, _)| name.display().to_string()).collect();
        let all =
            [".git", ".git/config", ".gitignore", "a", "dangling", "etc", "node_modules", "node_modules/m.js", "up"];
        assert_eq!(names, all);
        assert_eq!(note.unwrap(), "2 sockets, FIFOs and devices were left out: b.sock, queue");
        let (tar, note) = packed(&dir.path().join("a"), "b").await.unwrap();
        assert_eq!((entries(&tar), note), (vec![("b".into(), "x".into())], None));
    }

    #[tokio::test]
    async fn a_pipe_is_read_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
        let writing = std::thread::spawn({
            let pipe = pipe.clone();
            move || fs::write(pipe, "content").unwrap()
        });
        let (tar, _) = packed(&pipe, "f").await.unwrap();
        writing.join().unwrap();
        assert_eq!(entries(&tar), [("f".into(), "content".into())]);
    }
}
