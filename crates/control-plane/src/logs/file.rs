//! The file of a log, and its turns. Synchronous: it waits for the disk.
#![expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::{Buf, Bytes};
use chrono::{DateTime, Utc};
use heyvm_store::SandboxRow;

use super::LogChunk;
use crate::guest_command::Tail;

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
pub fn prepare(home: &Path, rows: &[SandboxRow], vms: &[String]) -> io::Result<()> {
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

/// Removes a log, where there is one.
pub fn remove(path: &Path) {
    for file in [before(path), path.to_owned()] {
        if let Err(error) = fs::remove_file(&file)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %file.display(), "a log could not be removed");
        }
    }
}

/// The last lines of a log. One that cannot be read has none.
pub fn tail(path: PathBuf) -> Vec<String> {
    let (mut reader, mut end) = (Reader::new(path), Tail::default());
    while let Ok(records) = reader.read() {
        if records.is_empty() {
            break;
        }
        records.iter().for_each(|(_, chunk)| end.add(&chunk.data));
    }
    end.lines()
}

/// How much of what its run has printed is in a log; `None` for an empty one.
pub fn reach(path: PathBuf) -> Option<u64> {
    let mut reader = Reader::new(path);
    let mut last = None;
    while let Ok(mut records) = reader.read() {
        let Some(record) = records.pop() else { break };
        last = Some(record);
    }
    last.map(|(offset, chunk)| offset.saturating_add(chunk.data.len() as u64))
}

/// Adds a record to a log, which is turned over first where it has grown large.
pub fn append(path: &Path, (stderr, offset): (bool, u64), data: &[u8]) -> io::Result<()> {
    append_within(path, MAX_LOG, (stderr, offset), data)
}

/// The same, turned over where it has grown to `most`.
pub fn append_within(path: &Path, most: u64, (stderr, offset): (bool, u64), data: &[u8]) -> io::Result<()> {
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
pub struct Reader {
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
    pub fn new(path: PathBuf) -> Self {
        Self { path, file: None, position: 0, finished: true, rest: Vec::new() }
    }

    /// The next records with their offsets; none where all of them have been read.
    pub fn read(&mut self) -> io::Result<Vec<(u64, LogChunk)>> {
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
    pub fn turn(&mut self) -> io::Result<bool> {
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
        append_within(path, SMALL, (false, number), &number.to_be_bytes()).unwrap();
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
        append_within(&path, SMALL, (true, 12), b"err\n").unwrap();
        let records = Reader::new(path).read().unwrap();
        let told: Vec<_> = records.iter().map(|(offset, chunk)| (*offset, chunk.stderr, &chunk.data[..])).collect();
        assert_eq!(told, [(0, false, &b"out\n"[..]), (4, true, b"eight by"), (12, true, b"err\n")]);
        assert_eq!((records[0].1.time, records[1].1.time), (None, None));
        let time = records[2].1.time.unwrap();
        assert!(before <= time && time <= Utc::now(), "{time}");
    }
}
