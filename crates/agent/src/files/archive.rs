//! Tar streams between the host and the threads that read and write files.

use std::{
    fs::{self, File, Metadata},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use heyvm_agent_protocol::{
    CHUNK,
    v1::{FileChunk, UnpackInput, UnpackReply},
};
use nix::libc::{O_NOCTTY, O_NOFOLLOW, O_NONBLOCK};
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::{
    absolute, blocking,
    content::Chunks,
    failed,
    unpack::{self, Limits, Wanted},
};

/// Chunks that may wait for whoever is slower.
const QUEUE: usize = 4;

/// Unpacks what the host sends below the directory that its first message names.
pub async fn unpack(mut requests: Streaming<UnpackInput>) -> Result<UnpackReply, Status> {
    let first = requests.message().await?.ok_or_else(|| Status::invalid_argument("no directory was named"))?;
    let dir = absolute(&first.path)?;
    let wanted = Wanted::new(&first.root, Limits::new(first.max_bytes, first.max_entries))?;
    let (chunks, receiver) = mpsc::channel(QUEUE);
    let unpacking = tokio::task::spawn_blocking(move || {
        unpack::unpack(&dir, first.clean, wanted, Incoming { chunks: receiver, current: io::Cursor::default() })
    });
    let mut next = Ok(Some(first.data));
    loop {
        match next {
            Ok(None) => break,
            Err(status) => {
                let _ = chunks.send(Err(status)).await;
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
        let mut packing = Packing { builder: tar::Builder::new(Outgoing::new(&chunks)), device: meta.dev() };
        let packed = if meta.is_dir() { packing.directory(&path) } else { packing.single(&path, &meta) };
        if let Err(error) = packed.and_then(|()| packing.builder.into_inner()?.flush()) {
            let _ = chunks.blocking_send(Err(failed("cannot pack", &path, &error)));
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
    builder: tar::Builder<Outgoing<'a>>,
    /// Other file systems, such as /proc, are left out.
    device: u64,
}

impl Packing<'_> {
    fn single(&mut self, path: &Path, meta: &Metadata) -> io::Result<()> {
        let name = path.file_name().map(PathBuf::from).unwrap_or_default();
        // The path may be a symbolic link: the file it leads to is what was asked for.
        self.file(&fs::canonicalize(path)?, &name, meta)
    }

    fn directory(&mut self, root: &Path) -> io::Result<()> {
        let mut pending = vec![PathBuf::new()];
        while let Some(dir) = pending.pop() {
            let mut entries = fs::read_dir(root.join(&dir))?.collect::<io::Result<Vec<_>>>()?;
            entries.sort_by_key(fs::DirEntry::file_name);
            for entry in entries {
                let (path, name) = (entry.path(), dir.join(entry.file_name()));
                // What has just been removed is not there.
                let Ok(meta) = entry.metadata() else { continue };
                let kind = meta.file_type();
                if kind.is_dir() && meta.dev() == self.device {
                    self.builder.append_data(&mut header(&meta, 0), &name, io::empty())?;
                    pending.push(name);
                } else if kind.is_symlink() {
                    self.builder.append_link(&mut header(&meta, 0), &name, fs::read_link(&path)?)?;
                } else if kind.is_file() {
                    self.file(&path, &name, &meta)?;
                }
            }
        }
        Ok(())
    }

    /// Exactly as many bytes as the header says, whatever becomes of the file meanwhile.
    fn file(&mut self, path: &Path, name: &Path, meta: &Metadata) -> io::Result<()> {
        let opened = File::options().read(true).custom_flags(O_NONBLOCK | O_NOCTTY | O_NOFOLLOW).open(path)?;
        let bytes = opened.chain(io::repeat(0)).take(meta.len());
        self.builder.append_data(&mut header(meta, meta.len()), name, bytes)
    }
}

fn header(meta: &Metadata, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_metadata(meta);
    header.set_size(size);
    header
}
