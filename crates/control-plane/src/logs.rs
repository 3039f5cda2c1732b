//! What start commands print, kept on the host: `logs/<id>`, in records of a kind byte, a length, an offset and the bytes.
//! Kept apart from the sandbox's own directory, since it outlives the sandbox by a day.

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use bytes::{Buf, Bytes};
use futures::stream::BoxStream;
use heyvm_api::ApiError;
use heyvm_store::SandboxRow;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::{ControlPlane, Sandbox, Who, errors, guest_command::Tail};

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
/// Bytes that are read at a time.
const PIECE: u64 = 256 << 10;
/// Length of a record's head: kind, length, offset in what one run of the start command has printed.
const HEAD: usize = 13;

/// Makes the directory, and removes from it logs that belong to no row and to no VM that is there.
pub(crate) fn prepare(home: &Path, rows: &[SandboxRow], vms: &[String]) -> io::Result<()> {
    let dir = home.join("logs");
    fs::create_dir_all(&dir)?;
    let known: HashSet<&OsStr> = rows.iter().map(|row| &row.id).chain(vms).map(OsStr::new).collect();
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
        if let Err(error) = append(&self.log_path(&id), MAX_LOG, (stderr, offset), data) {
            tracing::warn!(%error, id, "a log could not be written");
        }
        sandbox.log_offset.store(offset.saturating_add(data.len() as u64), Ordering::Relaxed);
        sandbox.changed.send_replace(());
    }

    pub(crate) fn remove_log(&self, id: &str) {
        let path = self.log_path(id);
        let _ = fs::remove_file(before(&path));
        let _ = fs::remove_file(path);
    }

    /// The last lines of a sandbox's log.
    pub(crate) fn log_tail(&self, id: &str) -> Vec<String> {
        let (mut reader, mut end) = (Reader::new(self.log_path(id)), Tail::default());
        // A log that cannot be read has no last lines.
        while let Ok(records) = reader.read() {
            if records.is_empty() {
                break;
            }
            records.iter().for_each(|(_, chunk)| end.add(&chunk.data));
        }
        end.lines()
    }

    /// After a restart of the daemon the log says itself how far it goes.
    pub(crate) fn resume_log(&self, sandbox: &Sandbox) {
        let mut reader = Reader::new(self.log_path(&sandbox.record().id.clone()));
        let mut last = None;
        while let Ok(mut records) = reader.read() {
            let Some(record) = records.pop() else { break };
            last = Some(record);
        }
        if let Some((offset, chunk)) = last {
            sandbox.log_offset.store(offset.saturating_add(chunk.data.len() as u64), Ordering::Relaxed);
        }
    }

    /// What the start command printed, kept until a day after the end of the sandbox; with `follow` until it ends.
    pub async fn logs(&self, who: &Who, follow: bool) -> Result<BoxStream<'static, io::Result<LogChunk>>, ApiError> {
        let sandbox = self.find(who)?;
        let mut reader = Reader::new(self.log_path(&sandbox.record().id.clone()));
        let mut changed = sandbox.changed.subscribe();
        let (sender, receiver) = mpsc::channel(16);
        let mut records = reader.read().map_err(|error| errors::io("reading the log", &error))?;
        tokio::spawn(async move {
            loop {
                for (_, chunk) in records.drain(..) {
                    if sender.send(Ok(chunk)).await.is_err() {
                        return;
                    }
                }
                let living = sandbox.record().is_living();
                records = match reader.read() {
                    Ok(records) => records,
                    Err(error) => return drop(sender.send(Err(error)).await),
                };
                if !records.is_empty() {
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

/// Adds a record to a log, which is turned over first where it has grown to `most`.
fn append(path: &Path, most: u64, (stderr, offset): (bool, u64), data: &[u8]) -> io::Result<()> {
    if fs::metadata(path).is_ok_and(|meta| meta.len() > most) {
        fs::rename(path, before(path))?;
    }
    let mut record = vec![u8::from(stderr)];
    record.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    record.extend(offset.to_be_bytes());
    record.extend(data);
    let mut file = File::options().create(true).append(true).mode(0o600).open(path)?;
    let whole = file.metadata()?.len();
    // Half a record would make all that follows unreadable.
    file.write_all(&record).inspect_err(|_| drop(file.set_len(whole)))
}

/// Where a log goes when it is turned over.
fn before(path: &Path) -> PathBuf {
    path.with_extension("old")
}

/// Reads a log while it grows, across its turns: the file that is open is read to its end, whatever it is called by then.
struct Reader {
    path: PathBuf,
    file: Option<File>,
    /// Whether the open file gets no more.
    finished: bool,
    /// Read, but no whole record yet.
    rest: Vec<u8>,
}

impl Reader {
    /// From the oldest that is kept.
    fn new(path: PathBuf) -> Self {
        Self { path, file: None, finished: true, rest: Vec::new() }
    }

    /// The next records with their offsets; none where all of them have been read.
    fn read(&mut self) -> io::Result<Vec<(u64, LogChunk)>> {
        loop {
            let count = match &mut self.file {
                Some(file) => file.take(PIECE).read_to_end(&mut self.rest)?,
                None => 0,
            };
            let records = whole_records(&mut self.rest);
            if !records.is_empty() {
                return Ok(records);
            }
            if count == 0 && !self.turn()? {
                return Ok(records);
            }
        }
    }

    /// At the end of a file; `false` where there is nothing to go on with.
    fn turn(&mut self) -> io::Result<bool> {
        let place = |file: &File| file.metadata().map(|meta| (meta.dev(), meta.ino()));
        let here = self.file.as_ref().map(place).transpose()?;
        let (older, newest) = (opened(&before(&self.path))?, opened(&self.path)?);
        let is_here = |file: &Option<File>| -> io::Result<bool> {
            let there = file.as_ref().map(place).transpose()?;
            Ok(there.is_some() && there == here)
        };
        // One that was turned over twice is neither: what comes after it is the older one.
        let next = if older.is_none() || is_here(&older)? {
            newest
        } else if is_here(&newest)? {
            None
        } else {
            older
        };
        if next.is_none() || is_here(&next)? {
            return Ok(false);
        }
        // It may have grown between its end and its turn.
        if std::mem::replace(&mut self.finished, true) {
            (self.file, self.finished) = (next, false);
            self.rest.clear();
        }
        Ok(true)
    }
}

fn opened(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

/// Takes the whole records from the beginning of `bytes`.
fn whole_records(bytes: &mut Vec<u8>) -> Vec<(u64, LogChunk)> {
    let mut rest = Bytes::copy_from_slice(bytes);
    let mut records = Vec::new();
    while rest.len() >= HEAD {
        let mut head = rest.slice(..HEAD);
        let (kind, length, offset) = (head.get_u8(), head.get_u32() as usize, head.get_u64());
        if rest.len() < HEAD + length {
            break;
        }
        let record = rest.split_to(HEAD + length);
        records.push((offset, LogChunk { stderr: kind == 1, data: record.slice(HEAD..) }));
    }
    bytes.drain(..bytes.len() - rest.len());
    records
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As small as it gets: some four records in a log.
    const SMALL: u64 = 60;

    fn write(path: &Path, number: u64) {
        append(path, SMALL, (false, number), &number.to_be_bytes()).unwrap();
    }

    fn read_on(reader: &mut Reader) -> Vec<u64> {
        let mut numbers = Vec::new();
        loop {
            let records = reader.read().unwrap();
            if records.is_empty() {
                return numbers;
            }
            for (offset, chunk) in records {
                assert_eq!(chunk.data, offset.to_be_bytes()[..]);
                numbers.push(offset);
            }
        }
    }

    #[test]
    fn a_reader_misses_nothing_at_a_turn() {
        // Up to four new records: the reader is in the file, or one or two turns behind.
        for lag in 1..=5 {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("log");
            let mut reader = Reader::new(path.clone());
            assert!(read_on(&mut reader).is_empty());
            let mut seen = Vec::new();
            for number in 0..60 {
                write(&path, number);
                if number % lag == 0 {
                    seen.extend(read_on(&mut reader));
                }
            }
            seen.extend(read_on(&mut reader));
            assert_eq!(seen, (0..60).collect::<Vec<_>>(), "{lag}");
        }
    }

    #[test]
    fn a_new_reader_begins_with_the_older_log() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        (0..5).for_each(|number| write(&path, number));
        assert!(before(&path).exists());
        assert_eq!(read_on(&mut Reader::new(path)), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn half_a_record_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        write(&path, 1);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..HEAD + 3]).unwrap();
        let mut reader = Reader::new(path.clone());
        assert!(read_on(&mut reader).is_empty());
        File::options().append(true).open(&path).unwrap().write_all(&whole[HEAD + 3..]).unwrap();
        assert_eq!(read_on(&mut reader), [1]);
    }
}
