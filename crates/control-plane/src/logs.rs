//! What start commands print, kept on the host: `logs/<id>`, in records of a kind byte, a length and the bytes.
//! Kept apart from the sandbox's own directory, since it outlives the sandbox by a day.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    sync::Arc,
};

use bytes::Bytes;
use futures::stream::BoxStream;
use heyvm_api::ApiError;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::{ControlPlane, Sandbox, create::tail, errors};

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
/// Length of a record's head: kind, length.
const HEAD: usize = 5;

impl ControlPlane {
    fn log_path(&self, id: &str) -> PathBuf {
        self.config.home.join("logs").join(id)
    }

    /// A log that cannot be written harms nothing but itself.
    pub(crate) fn append_log(&self, id: &str, stderr: bool, data: &[u8]) {
        let path = self.log_path(id);
        let write = || -> io::Result<()> {
            if fs::metadata(&path).is_ok_and(|meta| meta.len() > MAX_LOG) {
                fs::rename(&path, path.with_extension("old"))?;
            }
            let mut record = vec![u8::from(stderr)];
            record.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
            record.extend(data);
            File::options().create(true).append(true).mode(0o600).open(&path)?.write_all(&record)
        };
        if let Err(error) = write() {
            tracing::warn!(%error, id, "a log could not be written");
        }
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
    pub(crate) fn resume_log(&self, sandbox: &Arc<Sandbox>) {
        let id = sandbox.record().id.clone();
        let path = self.log_path(&id);
        let length = |path: &PathBuf| {
            read_all(path).unwrap_or_default().iter().map(|chunk| chunk.data.len() as u64).sum::<u64>()
        };
        // With an older part gone the offset is unknown: what the guest still remembers may then come twice.
        let known = length(&path.with_extension("old")) + length(&path);
        let mut record = sandbox.record();
        record.log_offset = record.log_offset.max(known);
    }

    /// What the start command printed, kept until a day after the end of the sandbox; with `follow` until it ends.
    pub async fn logs(&self, who: &str, follow: bool) -> Result<BoxStream<'static, io::Result<LogChunk>>, ApiError> {
        let sandbox = self.find(who)?;
        let path = self.log_path(&sandbox.record().id.clone());
        let mut changed = sandbox.changed.subscribe();
        let (sender, receiver) = mpsc::channel(16);
        let mut chunks = read_all(&path.with_extension("old")).unwrap_or_default();
        let mut current = read_all(&path).map_err(|error| errors::io("reading the log", &error))?;
        let mut position: usize = current.iter().map(|chunk| HEAD + chunk.data.len()).sum();
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

/// Whole records from `position` on, which moves behind them; from the beginning where the log was turned over.
fn read_from(path: &PathBuf, position: &mut usize) -> io::Result<Vec<LogChunk>> {
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
    let bytes = Bytes::from(bytes);
    let (mut chunks, mut at) = (Vec::new(), 0);
    while let Some(head) = bytes.get(at..at + HEAD) {
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if at + HEAD + length > bytes.len() {
            break;
        }
        chunks.push(LogChunk { stderr: head[0] == 1, data: bytes.slice(at + HEAD..at + HEAD + length) });
        at += HEAD + length;
    }
    *position += at;
    Ok(chunks)
}
