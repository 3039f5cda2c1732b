//! Into a sandbox: a file or directory here becomes a tar, sent as it is made.

use std::{
    ffi::OsString,
    fs,
    io::{self, Write},
    path::Path,
};

use bytes::Bytes;
use futures::stream;
use heyvm_api::{ApiError, ErrorCode, client::Client, files::UnpackResponse};
use ignore::WalkBuilder;
use tar::Builder;
use tokio::sync::mpsc;

use super::{Copied, Remote, invalid, watched};
use crate::{
    archive::entry::{self, Problem, Purpose},
    progress::Line,
};

const PIECE: usize = 256 << 10;
/// Pieces made ahead of the sandbox.
const AHEAD: usize = 2;

/// Copies `source` into a sandbox.
pub async fn into(client: &Client, source: &Path, target: Remote<'_>, line: Line) -> Result<Copied, ApiError> {
    let missing =
        |error| invalid(format!("{}: {error}", source.display())).hint("name a file or directory that is there");
    // A link's copy is called as the link is; `.` and the like have no name of their own.
    let typed = source.file_name().map(|_| source.to_owned());
    let source = source.canonicalize().map_err(missing)?;
    let meta = fs::metadata(&source).map_err(missing)?;
    if !meta.is_dir() && !meta.is_file() {
        return Err(refuse(&Problem::Special { path: source, what: "neither a file nor a directory" }));
    }
    let is_directory = target.is_directory(client).await?;
    let place = place(typed.as_ref().unwrap_or(&source), meta.is_dir(), &target.absolute(), is_directory)?;
    let url = target.tar(&place.directory);
    let (pieces, receiver) = mpsc::channel(AHEAD);
    let packing = tokio::task::spawn_blocking(move || pack(&source, Path::new(&place.name), pieces));
    let body = stream::unfold(receiver, |mut receiver| async { receiver.recv().await.map(|piece| (piece, receiver)) });
    let body = watched(body, line);
    let sent: Result<UnpackResponse, ApiError> = client.put(&url, "application/x-tar", body).await;
    let packed = packing.await.map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))?;
    match (packed, sent) {
        // The sandbox has said why it takes no more.
        (Err(Problem::Output(_)) | Ok(_), Err(error)) => Err(error),
        (Err(problem), _) => Err(refuse(&problem)),
        (Ok(left_out), Ok(done)) => Ok(Copied { bytes: done.bytes, entries: done.entries, left_out }),
    }
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
fn place(source: &Path, source_is_directory: bool, target: &str, target_is_directory: bool) -> Result<Place, ApiError> {
    let name = source.file_name().unwrap_or_default();
    if !source_is_directory {
        if target_is_directory || target.ends_with('/') {
            return Ok(Place { directory: target.into(), name: name.into() });
        }
        let (parent, last) = target.rsplit_once('/').unwrap_or(("", target));
        return Ok(Place { directory: format!("{parent}/"), name: last.into() });
    }
    if !target_is_directory {
        return Ok(Place { directory: target.into(), name: OsString::new() });
    }
    // Part of a query from here on.
    let name = name.to_str().ok_or_else(|| {
        invalid(format!("the name of {} is not UTF-8", source.display())).hint("name the copy: SANDBOX:/path/NAME")
    })?;
    Ok(Place { directory: format!("{}/{name}", target.trim_end_matches('/')), name: OsString::new() })
}

fn pack(source: &Path, name: &Path, pieces: mpsc::Sender<io::Result<Bytes>>) -> Result<Vec<String>, Problem> {
    let outgoing = Outgoing { pieces: pieces.clone(), data: Vec::with_capacity(PIECE) };
    let packed = write(source, name, outgoing);
    if packed.is_err() {
        // Cut off, so that half a tar is not taken for a whole one.
        let _ = pieces.blocking_send(Err(io::Error::other("the copy was given up")));
    }
    packed
}

/// A file under its name, or what a directory holds; tells the links that lead out of it, which are left out.
fn write(source: &Path, name: &Path, out: impl Write) -> Result<Vec<String>, Problem> {
    let mut builder = Builder::new(out);
    let left_out = if source.is_file() {
        entry::append_file(&mut builder, source, name, Purpose::Copy)?;
        Vec::new()
    } else {
        directory(&mut builder, source)?
    };
    builder.into_inner().and_then(|mut out| out.flush()).map_err(Problem::Output)?;
    Ok(left_out)
}

fn directory(builder: &mut Builder<impl Write>, source: &Path) -> Result<Vec<String>, Problem> {
    let mut left_out = Vec::new();
    for found in WalkBuilder::new(source).standard_filters(false).sort_by_file_name(|a, b| a.cmp(b)).build() {
        let found = found.map_err(|error| Problem::Io { path: source.to_owned(), error: io::Error::other(error) })?;
        if found.depth() == 0 {
            continue;
        }
        let name = found.path().strip_prefix(source).unwrap_or(found.path());
        match entry::append(builder, found.path(), name, Purpose::Copy) {
            Ok(()) | Err(Problem::Gone) => {}
            Err(Problem::LeadsOut { .. }) => left_out.push(name.display().to_string()),
            Err(problem) => return Err(problem),
        }
    }
    Ok(left_out)
}

fn refuse(problem: &Problem) -> ApiError {
    let hint = match problem {
        Problem::Special { .. } => "copy files, directories and links",
        Problem::LeadsOut { .. } | Problem::LeadsNowhere { .. } => {
            "make it a relative link to a file within the directory, or remove it"
        }
        Problem::Changed { .. } | Problem::Gone => "copy again, once nothing writes to it",
        Problem::Io { .. } | Problem::Output(_) => "is it readable?",
    };
    invalid(problem.to_string()).hint(hint)
}

/// Bytes on their way, in pieces of a good size.
struct Outgoing {
    pieces: mpsc::Sender<io::Result<Bytes>>,
    data: Vec<u8>,
}

impl Write for Outgoing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = bytes.len().min(PIECE - self.data.len());
        self.data.extend_from_slice(&bytes[..length]);
        if self.data.len() == PIECE {
            self.flush()?;
        }
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.data.is_empty() {
            return Ok(());
        }
        let data = std::mem::replace(&mut self.data, Vec::with_capacity(PIECE));
        self.pieces.blocking_send(Ok(data.into())).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::symlink, path::PathBuf};

    use super::*;

    #[test]
    fn a_directory_gets_a_copy_and_anything_else_becomes_it() {
        let place = |source: &str, dir, target: &str, target_is_dir| {
            let place = super::place(Path::new(source), dir, target, target_is_dir).unwrap();
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
    }

    fn names(source: &Path, name: &str) -> Result<Vec<PathBuf>, Problem> {
        let mut tar = Vec::new();
        write(source, Path::new(name), &mut tar)?;
        let mut archive = tar::Archive::new(&tar[..]);
        Ok(archive.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().into_owned()).collect())
    }

    #[test]
    fn nothing_of_a_directory_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        for name in [".git/config", "node_modules/m.js", "a"] {
            fs::create_dir_all(dir.path().join(name).parent().unwrap()).unwrap();
            fs::write(dir.path().join(name), "x").unwrap();
        }
        fs::write(dir.path().join(".gitignore"), "a\n").unwrap();
        symlink("nowhere", dir.path().join("link")).unwrap();
        let all = [".git", ".git/config", ".gitignore", "a", "link", "node_modules", "node_modules/m.js"];
        assert_eq!(names(dir.path(), "").unwrap(), all.map(PathBuf::from));
        assert_eq!(names(&dir.path().join("a"), "b").unwrap(), [Path::new("b")]);
    }

    #[test]
    fn links_that_lead_out_are_left_out_and_told_of() {
        for target in ["/etc/passwd", "../x"] {
            let dir = tempfile::tempdir().unwrap();
            symlink(target, dir.path().join("link")).unwrap();
            assert_eq!(write(dir.path(), Path::new(""), io::sink()).unwrap(), ["link"]);
            assert!(names(dir.path(), "").unwrap().is_empty());
        }
    }

    #[test]
    fn a_copy_that_is_given_up_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), "x").unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("b")).unwrap();
        let (sender, mut receiver) = mpsc::channel(8);
        assert!(matches!(pack(dir.path(), Path::new(""), sender), Err(Problem::Special { .. })));
        let mut last = None;
        while let Some(piece) = receiver.blocking_recv() {
            last = Some(piece);
        }
        assert!(last.unwrap().is_err());
    }
}
