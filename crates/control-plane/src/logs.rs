//! What start commands print, kept on the host: `logs/<id>`, in records of a kind byte, a length, an offset, a time and the
//! bytes. Kept apart from the sandbox's own directory, since it outlives the sandbox by a day.

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
};

use bytes::{Buf, Bytes};
use chrono::{DateTime, Utc};
use futures::stream::BoxStream;
use heyvm_api::ApiError;
use heyvm_store::SandboxRow;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

use crate::{
    ControlPlane, Sandbox, Who, errors,
    guest_command::Tail,
    log_lines::{Beginnings, Lines, Skip},
};

/// A piece of what a start command printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogChunk {
    /// Whether it came on standard error.
    pub stderr: bool,
    /// When it came, by the host's clock; earlier versions did not record that.
    pub time: Option<DateTime<Utc>>,
    /// The bytes.
    pub data: Bytes,
}

/// Which part of a log is asked for, and how.
#[derive(Debug, Clone, Copy, Default)]
pub struct LogQuery {
    /// Go on until the sandbox ends.
    pub follow: bool,
    /// Only so many lines of what there is.
    pub tail: Option<u64>,
    /// A chunk per line, so that each has its time. A line is waited for until it is whole, unless it is very long.
    pub by_line: bool,
}

/// A log that has grown to this is turned over; the one before it is kept.
const MAX_LOG: u64 = 8 << 20;
/// Bytes that are read at a time.
const PIECE: usize = 256 << 10;
/// Length of a record's head: kind, length, offset in what one run of the start command has printed.
const HEAD: usize = 13;
/// Bits of a record's kind. A bit for the time, so that logs of earlier versions, whose records have none, are read and
/// written on: their sandboxes run across an upgrade, and a log is turned over by its length alone.
const STDERR: u8 = 1;
const TIMED: u8 = 2;
/// Microseconds since 1970, between head and bytes. They count for the length, so that an earlier version keeps in step.
const TIME: usize = 8;

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

    /// What the start command printed, kept until a day after the end of the sandbox.
    pub async fn logs(&self, who: &Who, query: LogQuery) -> Result<BoxStream<'static, io::Result<LogChunk>>, ApiError> {
        let sandbox = self.find(who)?;
        let path = self.log_path(&sandbox.record().id.clone());
        let changed = sandbox.changed.subscribe();
        let opened = tokio::task::spawn_blocking(move || Log::open(path, query)).await;
        let log =
            opened.map_err(|error| errors::internal(&error))?.map_err(|error| errors::io("reading the log", &error))?;
        let (sender, receiver) = mpsc::channel(16);
        tokio::spawn(async move {
            if let Err(error) = send(log, &sandbox, changed, query.follow, &sender).await {
                let _ = sender.send(Err(error)).await;
            }
        });
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }
}

/// Sends a log to its end, or, followed, to the end of the sandbox.
async fn send(
    mut log: Log,
    sandbox: &Sandbox,
    mut changed: watch::Receiver<()>,
    follow: bool,
    sender: &mpsc::Sender<io::Result<LogChunk>>,
) -> io::Result<()> {
    loop {
        let living = sandbox.record().is_living();
        let chunks = log.read()?;
        let is_at_end = chunks.is_none();
        let ends = is_at_end && !(follow && living);
        for chunk in chunks.unwrap_or_else(|| if ends { log.rest() } else { Vec::new() }) {
            if sender.send(Ok(chunk)).await.is_err() {
                return Ok(());
            }
        }
        if ends {
            return Ok(());
        }
        if is_at_end {
            tokio::select! {
                ended = changed.changed() => if ended.is_err() { return Ok(()) },
                () = sender.closed() => return Ok(()),
            }
        }
    }
}

/// The part of a log that is asked for.
struct Log {
    reader: Reader,
    skip: Skip,
    lines: Option<Lines>,
}

impl Log {
    fn open(path: PathBuf, query: LogQuery) -> io::Result<Self> {
        let mut reader = Reader::new(path);
        // From here on it reads the same, whatever is turned over meanwhile.
        reader.turn()?;
        let mut skipped = 0;
        if let Some(tail) = query.tail {
            // Read twice rather than kept: a guest may print empty lines alone.
            let (mut counted, mut beginnings) = (reader.clone(), Beginnings::default());
            loop {
                let records = counted.read()?;
                if records.is_empty() {
                    break;
                }
                records.iter().for_each(|(_, chunk)| beginnings.add(chunk));
            }
            skipped = beginnings.before_last(tail);
        }
        Ok(Self { reader, skip: Skip::new(skipped), lines: query.by_line.then(Lines::default) })
    }

    /// What comes next, or nothing at the end of what there is.
    fn read(&mut self) -> io::Result<Option<Vec<LogChunk>>> {
        let records = self.reader.read()?;
        if records.is_empty() {
            return Ok(None);
        }
        let kept = records.into_iter().map(|(_, chunk)| self.skip.keep(chunk)).filter(|chunk| !chunk.data.is_empty());
        Ok(Some(match &mut self.lines {
            Some(lines) => kept.flat_map(|chunk| lines.add(chunk)).collect(),
            None => kept.collect(),
        }))
    }

    /// The beginnings of lines that have no end.
    fn rest(&mut self) -> Vec<LogChunk> {
        self.lines.as_mut().map(Lines::rest).unwrap_or_default()
    }
}

/// Adds a record to a log, which is turned over first where it has grown to `most`.
fn append(path: &Path, most: u64, (stderr, offset): (bool, u64), data: &[u8]) -> io::Result<()> {
    if fs::metadata(path).is_ok_and(|meta| meta.len() > most) {
        fs::rename(path, before(path))?;
    }
    let mut record = vec![TIMED | if stderr { STDERR } else { 0 }];
    record.extend(u32::try_from(TIME + data.len()).unwrap_or(u32::MAX).to_be_bytes());
    record.extend(offset.to_be_bytes());
    record.extend(Utc::now().timestamp_micros().to_be_bytes());
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
/// A clone goes on from the same place by itself.
#[derive(Clone)]
struct Reader {
    path: PathBuf,
    file: Option<Arc<File>>,
    /// How far the open file has been read.
    position: u64,
    /// Whether the open file gets no more.
    finished: bool,
    /// Read, but no whole record yet.
    rest: Vec<u8>,
}

impl Reader {
    /// From the oldest that is kept.
    fn new(path: PathBuf) -> Self {
        Self { path, file: None, position: 0, finished: true, rest: Vec::new() }
    }

    /// The next records with their offsets; none where all of them have been read.
    fn read(&mut self) -> io::Result<Vec<(u64, LogChunk)>> {
        loop {
            let count = self.read_piece()?;
            let records = whole_records(&mut self.rest);
            if !records.is_empty() {
                return Ok(records);
            }
            if count == 0 && !self.turn()? {
                return Ok(records);
            }
        }
    }

    fn read_piece(&mut self) -> io::Result<usize> {
        let Some(file) = &self.file else { return Ok(0) };
        let begin = self.rest.len();
        self.rest.resize(begin + PIECE, 0);
        let count = file.read_at(&mut self.rest[begin..], self.position);
        self.rest.truncate(begin + count.as_ref().map_or(0, |count| *count));
        self.position += count.as_ref().map_or(0, |count| *count as u64);
        count
    }

    /// At the end of a file; `false` where there is nothing to go on with.
    fn turn(&mut self) -> io::Result<bool> {
        let place = |file: &File| file.metadata().map(|meta| (meta.dev(), meta.ino()));
        let here = self.file.as_deref().map(place).transpose()?;
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
            (self.file, self.position, self.finished) = (next.map(Arc::new), 0, false);
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
        let mut data = rest.split_to(HEAD + length).slice(HEAD..);
        let is_timed = kind & TIMED != 0 && data.len() >= TIME;
        let time = is_timed.then(|| data.get_i64()).and_then(DateTime::from_timestamp_micros);
        records.push((offset, LogChunk { stderr: kind & STDERR != 0, time, data }));
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

    /// As versions wrote it that recorded no time.
    fn untimed(stderr: bool, offset: u64, data: &[u8]) -> Vec<u8> {
        let head = [&[u8::from(stderr)][..], &(data.len() as u32).to_be_bytes(), &offset.to_be_bytes()].concat();
        [&head, data].concat()
    }

    #[test]
    fn records_of_earlier_versions_are_read_before_those_with_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        fs::write(&path, [untimed(false, 0, b"out\n"), untimed(true, 4, b"eight by")].concat()).unwrap();
        let before = Utc::now() - chrono::Duration::milliseconds(1);
        append(&path, SMALL, (true, 12), b"err\n").unwrap();
        let records = Reader::new(path).read().unwrap();
        let told: Vec<_> = records.iter().map(|(offset, chunk)| (*offset, chunk.stderr, &chunk.data[..])).collect();
        assert_eq!(told, [(0, false, &b"out\n"[..]), (4, true, b"eight by"), (12, true, b"err\n")]);
        assert_eq!((records[0].1.time, records[1].1.time), (None, None));
        let time = records[2].1.time.unwrap();
        assert!(before <= time && time <= Utc::now(), "{time}");
    }

    fn all(log: &mut Log) -> String {
        let mut text = Vec::new();
        while let Some(chunks) = log.read().unwrap() {
            chunks.iter().for_each(|chunk| text.extend_from_slice(&chunk.data));
        }
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn the_last_lines_are_the_last_ones_across_a_turn_and_others_follow() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let print = |number: u64| append(&path, SMALL, (false, number), format!("{number}\n").as_bytes()).unwrap();
        (0..5).for_each(print);
        assert!(before(&path).exists());
        let open = |tail| Log::open(path.clone(), LogQuery { tail, ..LogQuery::default() }).unwrap();
        for (tail, expected) in
            [(None, "0\n1\n2\n3\n4\n"), (Some(9), "0\n1\n2\n3\n4\n"), (Some(3), "2\n3\n4\n"), (Some(0), "")]
        {
            assert_eq!(all(&mut open(tail)), expected, "{tail:?}");
        }
        let mut followed = open(Some(1));
        assert_eq!(all(&mut followed), "4\n");
        (5..7).for_each(print);
        assert_eq!(all(&mut followed), "5\n6\n");
    }
}
