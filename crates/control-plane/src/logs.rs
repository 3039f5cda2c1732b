//! What start commands print, kept on the host: `logs/<id>`, in records of a kind byte, a length, an offset, a time and the
//! bytes. Kept apart from the sandbox's own directory, since it outlives the sandbox by a day.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
};

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::stream::BoxStream;
use heyvm_api::ApiError;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

use self::file::Reader;
pub(crate) use self::file::prepare;
use crate::{
    ControlPlane, Sandbox, Who,
    blocking::blocking,
    errors,
    log_lines::{Beginnings, Lines, Skip},
};

mod file;

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

impl ControlPlane {
    fn log_path(&self, id: &str) -> PathBuf {
        self.config.home.join("logs").join(id)
    }

    /// From here on the log tells of another run of the start command.
    pub(crate) async fn begin_log(&self, sandbox: &Sandbox) {
        self.append_log(sandbox, false, 0, Vec::new()).await;
    }

    /// Adds what came on at `offset` of all that this run has printed. A log that cannot be written harms nothing but
    /// itself.
    pub(crate) async fn append_log(&self, sandbox: &Sandbox, stderr: bool, offset: u64, data: Vec<u8>) {
        let id = sandbox.record().id.clone();
        let (path, end) = (self.log_path(&id), offset.saturating_add(data.len() as u64));
        let turn = Arc::clone(&sandbox.log_turn).lock_owned().await;
        let appended = blocking(move || {
            let _turn = turn;
            file::append(&path, (stderr, offset), &data).map_err(|error| errors::io("writing the log", &error))
        });
        if let Err(error) = appended.await.flatten() {
            tracing::warn!(%error, id, "a log could not be written");
        }
        sandbox.log_offset.store(end, Ordering::Relaxed);
        sandbox.changed.send_replace(());
    }

    pub(crate) async fn remove_log(&self, id: &str) {
        let path = self.log_path(id);
        if let Err(error) = blocking(move || file::remove(&path)).await {
            tracing::warn!(%error, id, "a log could not be removed");
        }
    }

    /// The last lines of a sandbox's log.
    pub(crate) async fn log_tail(&self, id: &str) -> Vec<String> {
        let path = self.log_path(id);
        blocking(move || file::tail(path)).await.unwrap_or_default()
    }

    /// After a restart of the daemon the log says itself how far it goes.
    pub(crate) async fn resume_log(&self, sandbox: &Sandbox) {
        let path = self.log_path(&sandbox.record().id.clone());
        if let Ok(Some(reach)) = blocking(move || file::reach(path)).await {
            sandbox.log_offset.store(reach, Ordering::Relaxed);
        }
    }

    /// What the start command printed, kept until a day after the end of the sandbox.
    pub async fn logs(&self, who: &Who, query: LogQuery) -> Result<BoxStream<'static, io::Result<LogChunk>>, ApiError> {
        let sandbox = self.find(who)?;
        let path = self.log_path(&sandbox.record().id.clone());
        let changed = sandbox.changed.subscribe();
        let log = blocking(move || Log::open(path, query)).await?;
        let log = log.map_err(|error| errors::io("reading the log", &error))?;
        let (sender, receiver) = mpsc::channel(16);
        tokio::spawn(async move {
            if let Err(error) = send(log, &sandbox, changed, query.follow, &sender).await {
                // Whoever has gone needs no error.
                sender.send(Err(error)).await.ok();
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
        let chunks;
        (log, chunks) = read_on(log).await?;
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

async fn read_on(mut log: Log) -> io::Result<(Log, Option<Vec<LogChunk>>)> {
    let read = tokio::task::spawn_blocking(move || log.read().map(|chunks| (log, chunks)));
    read.await.map_err(io::Error::other)?
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

#[cfg(test)]
mod tests {
    use super::*;

    /// As small as it gets: some four records in a log.
    const SMALL: u64 = 60;

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
        let print =
            |number: u64| file::append_within(&path, SMALL, (false, number), format!("{number}\n").as_bytes()).unwrap();
        (0..5).for_each(print);
        assert!(path.with_extension("old").exists());
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
