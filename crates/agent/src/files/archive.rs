//! Tar streams between the host and the threads that read and write files.

use std::{
    fs,
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use heyvm_agent_protocol::{
    CHUNK,
    v1::{FileChunk, UnpackInput, UnpackReply},
};
use heyvm_bounded_tar::{Kind, Options, Packer, Problem, Rules, Shrunk};
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::{absolute, blocking, content::Chunks, failed, unpack};
use crate::process::Identity;

/// Chunks that may wait for whoever is slower.
const QUEUE: usize = 4;

/// Unpacks what the host sends below the directory that its first message names.
/// Where that is asked for it belongs to `user` afterwards.
pub async fn unpack(mut requests: Streaming<UnpackInput>, user: &str) -> Result<UnpackReply, Status> {
    let first = requests.message().await?.ok_or_else(|| Status::invalid_argument("no directory was named"))?;
    let dir = absolute(&first.path)?;
    let options = Options::for_a_guest().limits(first.max_bytes, first.max_entries).below(&first.root);
    let mut options = options.map_err(|error| unpack::refused(&error))?;
    if first.as_user && !user.is_empty() {
        let identity = Identity::find(user, Path::new("/etc"));
        let identity = identity.map_err(|error| Status::invalid_argument(error.to_string()))?;
        options = options.owned_by(identity.uid, identity.gid);
    }
    let (chunks, receiver) = mpsc::channel(QUEUE);
    let unpacking = tokio::task::spawn_blocking(move || {
        unpack::unpack(&dir, first.clean, &options, Incoming { chunks: receiver, current: io::Cursor::default() })
    });
    let mut next = Ok(Some(first.data));
    loop {
        match next {
            Ok(None) => break,
            Err(status) => {
                chunks.send(Err(status)).await.ok();
                break;
            }
            Ok(Some(data)) if data.is_empty() => {}
            // The zeros behind the last entry are nobody's; an archive that is refused is not read on.
            Ok(Some(data)) => {
                if chunks.send(Ok(data)).await.is_err() && unpacking.is_finished() {
                    break;
                }
            }
        }
        next = requests.message().await.map(|message| message.map(|m| m.data));
    }
    drop(chunks);
    unpacking.await.unwrap_or_else(|error| Err(Status::internal(format!("the agent failed: {error}"))))
}

/// The host's chunks as one stream of bytes.
struct Incoming {
    chunks: mpsc::Receiver<Result<Vec<u8>, Status>>,
    current: io::Cursor<Vec<u8>>,
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let length = self.current.read(buffer)?;
            if length > 0 || buffer.is_empty() {
                return Ok(length);
            }
            match self.chunks.blocking_recv() {
                None => return Ok(0),
                Some(Ok(data)) => self.current = io::Cursor::new(data),
                Some(Err(status)) => return Err(io::Error::other(status.message().to_owned())),
            }
        }
    }
}

/// Packs a file under its own name, or a directory's contents under names relative to it.
pub async fn pack(path: String) -> Result<Chunks, Status> {
    let path = absolute(&path)?;
    let (meta, path) = blocking(move || {
        let meta = fs::metadata(&path).map_err(|error| failed("cannot read", &path, &error))?;
        Ok((meta, path))
    })
    .await?;
    if !meta.is_dir() && !meta.is_file() {
        return Err(Status::invalid_argument(format!("{} is neither a file nor a directory", path.display())));
    }
    let (chunks, receiver) = mpsc::channel(QUEUE);
    tokio::task::spawn_blocking(move || {
        // Files in use may change meanwhile: as many bytes as the header says, whatever becomes of them.
        let rules = Rules { shrunk: Shrunk::Padded, owners: true };
        let mut packing = Packing { packer: Packer::new(Outgoing::new(&chunks), rules), device: meta.dev() };
        let packed = if meta.is_dir() { packing.directory(&path) } else { packing.single(&path) };
        let packed = packed.and_then(|()| packing.packer.finish()?.flush().map_err(Problem::Output));
        if let Err(problem) = packed {
            chunks.blocking_send(Err(refused(&problem))).ok();
        }
    });
    Ok(receiver)
}

/// Bytes on their way to the host, in chunks of a good size.
struct Outgoing<'a> {
    chunks: &'a mpsc::Sender<Result<FileChunk, Status>>,
    data: Vec<u8>,
}

impl<'a> Outgoing<'a> {
    fn new(chunks: &'a mpsc::Sender<Result<FileChunk, Status>>) -> Self {
        Self { chunks, data: Vec::with_capacity(CHUNK) }
    }
}

impl Write for Outgoing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = bytes.len().min(CHUNK - self.data.len());
        self.data.extend_from_slice(&bytes[..length]);
        if self.data.len() == CHUNK {
            self.flush()?;
        }
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.data.is_empty() {
            return Ok(());
        }
        let data = std::mem::replace(&mut self.data, Vec::with_capacity(CHUNK));
        self.chunks.blocking_send(Ok(FileChunk { data })).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

struct Packing<'a> {
    packer: Packer<Outgoing<'a>>,
    /// Other file systems, such as /proc, are left out.
    device: u64,
}

impl Packing<'_> {
    fn single(&mut self, path: &Path) -> Result<(), Problem> {
        let name = path.file_name().map(PathBuf::from).unwrap_or_default();
        // The path may be a symbolic link: the file it leads to is what was asked for.
        let real = fs::canonicalize(path).map_err(|error| Problem::io(path, error))?;
        self.packer.append_file(&real, &name).map(drop)
    }

    fn directory(&mut self, root: &Path) -> Result<(), Problem> {
        let mut pending = vec![PathBuf::new()];
        while let Some(dir) = pending.pop() {
            let failed = |error| Problem::io(&root.join(&dir), error);
            let mut entries =
                fs::read_dir(root.join(&dir)).map_err(failed)?.collect::<io::Result<Vec<_>>>().map_err(failed)?;
            entries.sort_by_key(fs::DirEntry::file_name);
            for entry in entries {
                let (path, name) = (entry.path(), dir.join(entry.file_name()));
                // What has just been removed is not there.
                let Ok(meta) = entry.metadata() else { continue };
                if meta.is_dir() && meta.dev() != self.device {
                    continue;
                }
                match self.packer.append(&path, &name) {
                    Ok(Kind::Directory) => pending.push(name),
                    Ok(_) | Err(Problem::Gone) => {}
                    Err(problem) => return Err(problem),
                }
            }
        }
        Ok(())
    }
}

fn refused(problem: &Problem) -> Status {
    match problem {
        Problem::Io { path, error } => failed("cannot pack", path, error),
        Problem::Changed { .. } | Problem::Gone | Problem::Output(_) => Status::internal(problem.to_string()),
    }
}
