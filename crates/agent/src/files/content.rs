//! Reading and writing one file.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use heyvm_agent_protocol::{
    CHUNK,
    v1::{FileChunk, WriteFileInput, WriteFileReply},
};
use nix::libc::{O_NOCTTY, O_NONBLOCK};
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::{absolute, blocking, failed};

/// Chunks that may wait for whoever is slower.
const QUEUE: usize = 2;

/// A file's bytes on their way to the host.
pub type Chunks = mpsc::Receiver<Result<FileChunk, Status>>;

/// Sends a file. Errors found before the first byte are the call's own.
pub async fn read(path: String) -> Result<Chunks, Status> {
    let path = absolute(&path)?;
    let (file, path) = blocking(move || Ok((open_regular(&path)?, path))).await?;
    let (chunks, receiver) = mpsc::channel(QUEUE);
    tokio::task::spawn_blocking(move || send(file, &path, &chunks));
    Ok(receiver)
}

/// Neither a device nor a pipe is opened: that could block for ever or do something.
fn open_regular(path: &Path) -> Result<File, Status> {
    let opened = File::options().read(true).custom_flags(O_NONBLOCK | O_NOCTTY).open(path);
    let file = opened.map_err(|error| failed("cannot open", path, &error))?;
    let meta = file.metadata().map_err(|error| failed("cannot read", path, &error))?;
    if meta.is_file() {
        return Ok(file);
    }
    let kind = if meta.is_dir() { "a directory" } else { "not a regular file" };
    Err(Status::invalid_argument(format!("{} is {kind}", path.display())))
}

fn send(mut file: File, path: &Path, chunks: &mpsc::Sender<Result<FileChunk, Status>>) {
    loop {
        let mut data = Vec::with_capacity(CHUNK);
        let read = (&mut file).take(CHUNK as u64).read_to_end(&mut data);
        let chunk = match read {
            Ok(0) => return,
            Ok(_) => Ok(FileChunk { data }),
            Err(error) => Err(failed("cannot read", path, &error)),
        };
        let last = chunk.is_err();
        if chunks.blocking_send(chunk).is_err() || last {
            return;
        }
    }
}

/// Writes a file whole or not at all: under another name first, which then takes its place.
pub async fn write(mut requests: Streaming<WriteFileInput>) -> Result<WriteFileReply, Status> {
    let first = requests.message().await?.ok_or_else(|| Status::invalid_argument("no file was named"))?;
    let path = absolute(&first.path)?;
    let (chunks, receiver) = mpsc::channel(QUEUE);
    let mode = if first.mode == 0 { 0o644 } else { first.mode & 0o7777 };
    let writing = tokio::task::spawn_blocking(move || receive(&path, mode, first.create_parents, receiver));
    let mut next = Ok(Some(first.data));
    loop {
        match next {
            Ok(None) => break,
            Err(status) => {
                chunks.send(Err(status)).await.ok();
                break;
            }
            Ok(Some(data)) if data.is_empty() => {}
            // A writer that has failed says why in its result.
            Ok(Some(data)) => {
                if chunks.send(Ok(data)).await.is_err() {
                    break;
                }
            }
        }
        next = requests.message().await.map(|message| message.map(|m| m.data));
    }
    drop(chunks);
    writing.await.unwrap_or_else(|error| Err(Status::internal(format!("the agent failed: {error}"))))
}

fn receive(
    path: &Path,
    mode: u32,
    create_parents: bool,
    mut chunks: mpsc::Receiver<Result<Vec<u8>, Status>>,
) -> Result<WriteFileReply, Status> {
    let target = final_target(path, create_parents)?;
    let (mut file, half) = create_beside(&target).map_err(|error| failed("cannot write", path, &error))?;
    let written = (|| {
        let mut size = 0;
        while let Some(data) = chunks.blocking_recv() {
            let data = data?;
            file.write_all(&data).map_err(|error| failed("cannot write", path, &error))?;
            size += data.len() as u64;
        }
        let placed = file.set_permissions(fs::Permissions::from_mode(mode)).and_then(|()| fs::rename(&half, &target));
        placed.map_err(|error| failed("cannot write", path, &error))?;
        Ok(WriteFileReply { size })
    })();
    if written.is_err() {
        fs::remove_file(&half).ok();
    }
    written
}

/// Where a symbolic link leads is written to, as any editor does; what is not a regular file is left alone.
fn final_target(path: &Path, create_parents: bool) -> Result<PathBuf, Status> {
    let parent = path.parent().ok_or_else(|| Status::invalid_argument("/ is a directory"))?;
    if create_parents {
        fs::create_dir_all(parent).map_err(|error| failed("cannot make", parent, &error))?;
    }
    let target = match fs::canonicalize(path) {
        Ok(target) => target,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(path.to_owned()),
        Err(error) => return Err(failed("cannot write", path, &error)),
    };
    let meta = fs::metadata(&target).map_err(|error| failed("cannot write", path, &error))?;
    if meta.is_file() {
        return Ok(target);
    }
    Err(Status::invalid_argument(format!("{} is there and is not a regular file", path.display())))
}

fn create_beside(target: &Path) -> io::Result<(File, PathBuf)> {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    loop {
        let name = format!(".heyvm-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let half = target.with_file_name(name);
        match File::options().write(true).create_new(true).mode(0o600).open(&half) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            opened => return opened.map(|file| (file, half)),
        }
    }
}
