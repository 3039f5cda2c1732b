//! What start commands print, kept on the host: `logs/<id>`, in records of a kind byte, a length, an offset and the bytes.
//! Kept apart from the sandbox's own directory, since it outlives the sandbox by a day.

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use bytes::{Buf, Bytes};
use futures::stream::BoxStream;
use heyvm_api::ApiError;
use heyvm_store::SandboxRow;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::{ControlPlane, Sandbox, errors, guest_command::tail};

/// A piece of what a start command printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogChunk {
    /// Whether it came on standard error.
    pub stderr: bool,
    /// The bytes.
    pub data: Bytes,
}

/// A log that has grown to this is turned over; the one before it is kept.
const MAX_LOG: u64 = 8 << 20;
/// Bytes of the end of a log from which the last lines are taken.
const TAIL_BYTES: usize = 64 << 10;
/// Length of a record's head: kind, length, offset in what one run of the start command has printed.
const HEAD: usize = 13;

/// Makes the directory, and removes from it logs that belong to no row.
pub(crate) fn prepare(home: &Path, rows: &[SandboxRow]) -> io::Result<()> {
    let dir = home.join("logs");
    fs::create_dir_all(&dir)?;
    let known: HashSet<&OsStr> = rows.iter().map(|row| OsStr::new(&row.id)).collect();
    for entry in fs::read_dir(&dir)?.flatten() {
        if entry.path().file_stem().is_some_and(|id| !known.contains(id)) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

impl ControlPlane {
    fn log_path(&self, id: &str) -> PathBuf {
        self.config.home.join("logs").join(id)
    }

    /// From here on the log tells of another run of the start command.
    pub(crate) fn begin_log(&self, sandbox: &Sandbox) {
        self.append_log(sandbox, false, 0, b"");
    }

    /// Adds what came on at `offset` of all that this run has printed. A log that cannot be written harms nothing but
    /// itself.
    pub(crate) fn append_log(&self, sandbox: &Sandbox, stderr: bool, offset: u64, data: &[u8]) {
        let id = sandbox.record().id.clone();
        let path = self.log_path(&id);
        let write = || -> io::Result<()> {
            if fs::metadata(&path).is_ok_and(|meta| meta.len() > MAX_LOG) {
                fs::rename(&path, path.with_extension("old"))?;
            }
            let mut record = vec![u8::from(stderr)];
            record.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
            record.extend(offset.to_be_bytes());
            record.extend(data);
            File::options().create(true).append(true).mode(0o600).open(&path)?.write_all(&record)
        };
        if let Err(error) = write() {
            tracing::warn!(%error, id, "a log could not be written");
        }
        sandbox.log_offset.store(offset.saturating_add(data.len() as u64), Ordering::Relaxed);
        sandbox.changed.send_replace(());
    }

    pub(crate) fn remove_log(&self, id: &str) {
        let path = self.log_path(id);
        let _ = fs::remove_file(path.with_extension("old"));
        let _ = fs::remove_file(path);
    }

    /// The last lines of a sandbox's log.
    pub(crate) fn log_tail(&self, id: &str) -> Vec<String> {
        let chunks = read_all(&self.log_path(id)).unwrap_or_default();
        let all: Vec<u8> = chunks.iter().flat_map(|chunk| chunk.data.iter().copied()).collect();
        tail(&all[all.len().saturating_sub(TAIL_BYTES)..])
    }

    /// After a restart of the daemon the log says itself how far it goes.
    pub(crate) fn resume_log(&self, sandbox: &Sandbox) {
        let path = self.log_path(&sandbox.record().id.clone());
        let last = |path: &PathBuf| read_records(path, &mut 0).unwrap_or_default().pop();
        if let Some((offset, chunk)) = last(&path).or_else(|| last(&path.with_extension("old"))) {
            sandbox.log_offset.store(offset.saturating_add(chunk.data.len() as u64), Ordering::Relaxed);
        }
    }

    /// What the start command printed, kept until a day after the end of the sandbox; with `follow` until it ends.
    pub async fn logs(&self, who: &str, follow: bool) -> Result<BoxStream<'static, io::Result<LogChunk>>, ApiError> {
        let sandbox = self.find(who)?;
        let path = self.log_path(&sandbox.record().id.clone());
        let mut changed = sandbox.changed.subscribe();
        let (sender, receiver) = mpsc::channel(16);
        let mut chunks = read_all(&path.with_extension("old")).unwrap_or_default();
        let mut position = 0;
        let mut current = read_from(&path, &mut position).map_err(|error| errors::io("reading the log", &error))?;
        chunks.append(&mut current);
        tokio::spawn(async move {
            loop {
                for chunk in chunks.drain(..) {
                    if sender.send(Ok(chunk)).await.is_err() {
                        return;
                    }
                }
                let living = sandbox.record().is_living();
                chunks = read_from(&path, &mut position).unwrap_or_default();
                if !chunks.is_empty() {
                    continue;
                }
                if !follow || !living {
                    return;
                }
                tokio::select! {
                    ended = changed.changed() => if ended.is_err() { return },
                    () = sender.closed() => return,
                }
            }
        });
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }
}

fn read_all(path: &PathBuf) -> io::Result<Vec<LogChunk>> {
    read_from(path, &mut 0)
}

/// Whole chunks from `position` on, which moves behind them; from the beginning where the log was turned over.
fn read_from(path: &PathBuf, position: &mut usize) -> io::Result<Vec<LogChunk>> {
    Ok(read_records(path, position)?.into_iter().map(|(_, chunk)| chunk).collect())
}

/// The same with the offset of each.
fn read_records(path: &PathBuf, position: &mut usize) -> io::Result<Vec<(u64, LogChunk)>> {
    use std::io::Seek;
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    if (file.metadata()?.len() as usize) < *position {
        *position = 0;
    }
    file.seek(io::SeekFrom::Start(*position as u64))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let mut rest = Bytes::from(bytes);
    let mut records = Vec::new();
    while rest.len() >= HEAD {
        let mut head = rest.slice(..HEAD);
        let (kind, length, offset) = (head.get_u8(), head.get_u32() as usize, head.get_u64());
        if rest.len() < HEAD + length {
            break;
        }
        let record = rest.split_to(HEAD + length);
        records.push((offset, LogChunk { stderr: kind == 1, data: record.slice(HEAD..) }));
        *position += HEAD + length;
    }
    Ok(records)
}
