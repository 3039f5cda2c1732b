//! A log by lines: where its last ones begin, and each whole with its time. The lines of the two streams are counted and
//! kept apart, since a piece of one may stand within a line of the other.

use bytes::{Buf, Bytes};
use chrono::{DateTime, Utc};

use crate::LogChunk;

/// A longer line is passed on as it comes: it is not waited for, and only its beginning has a time.
const MAX_LINE: usize = 16 << 10;

/// Counts lines by their beginnings.
#[derive(Debug, Default)]
pub(crate) struct Beginnings {
    count: u64,
    within: [bool; 2],
}

impl Beginnings {
    pub fn add(&mut self, chunk: &LogChunk) {
        let within = &mut self.within[usize::from(chunk.stderr)];
        let ends = chunk.data.iter().filter(|byte| **byte == b'\n').count() as u64;
        let Some(last) = chunk.data.last() else { return };
        self.count += ends + u64::from(*last != b'\n') - u64::from(*within);
        *within = *last != b'\n';
    }

    /// How many lines come before the last `lines`.
    pub fn before_last(&self, lines: u64) -> u64 {
        self.count.saturating_sub(lines)
    }
}

/// Drops the first lines.
#[derive(Debug, Default)]
pub(crate) struct Skip {
    left: u64,
    /// By stream: whether the line it is in is dropped. A line that is kept is never left: all that follows is kept.
    within: [Option<bool>; 2],
}

impl Skip {
    pub fn new(lines: u64) -> Self {
        Self { left: lines, within: [None; 2] }
    }

    /// What is left of a chunk.
    pub fn keep(&mut self, mut chunk: LogChunk) -> LogChunk {
        let within = &mut self.within[usize::from(chunk.stderr)];
        while !chunk.data.is_empty() {
            let dropped = *within.get_or_insert_with(|| {
                let dropped = self.left > 0;
                self.left -= u64::from(dropped);
                dropped
            });
            if !dropped {
                break;
            }
            let end = chunk.data.iter().position(|byte| *byte == b'\n');
            chunk.data.advance(end.map_or(chunk.data.len(), |end| end + 1));
            if end.is_some() {
                *within = None;
            }
        }
        chunk
    }
}

/// Puts lines together: each is a chunk of its own, with the time of its first byte. A chunk without a time goes on with
/// a line that was too long to wait for.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    streams: [Line; 2],
}

#[derive(Debug, Default)]
struct Line {
    time: Option<DateTime<Utc>>,
    begun: Vec<u8>,
    /// Whether its beginning was passed on already.
    is_cut: bool,
}

impl Lines {
    pub fn add(&mut self, chunk: LogChunk) -> Vec<LogChunk> {
        let LogChunk { stderr, time, data } = chunk;
        let line = &mut self.streams[usize::from(stderr)];
        let mut lines = Vec::new();
        for piece in data.split_inclusive(|byte| *byte == b'\n') {
            if line.begun.is_empty() && !line.is_cut {
                line.time = time;
            }
            line.begun.extend_from_slice(piece);
            let is_whole = piece.ends_with(b"\n");
            if is_whole || line.is_cut || line.begun.len() >= MAX_LINE {
                lines.extend(line.take(stderr));
                line.is_cut = !is_whole;
            }
        }
        lines
    }

    /// What has begun and not ended.
    pub fn rest(&mut self) -> Vec<LogChunk> {
        let [stdout, stderr] = &mut self.streams;
        stdout.take(false).into_iter().chain(stderr.take(true)).collect()
    }
}

impl Line {
    fn take(&mut self, stderr: bool) -> Option<LogChunk> {
        let data = Bytes::from(std::mem::take(&mut self.begun));
        let time = self.time.take();
        (!data.is_empty()).then_some(LogChunk { stderr, time, data })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Option<DateTime<Utc>> {
        DateTime::from_timestamp(second, 0)
    }

    fn chunk((stderr, data): (bool, &str), second: i64) -> LogChunk {
        LogChunk { stderr, time: at(second), data: Bytes::copy_from_slice(data.as_bytes()) }
    }

    fn text(chunks: &[LogChunk], stderr: bool) -> String {
        let data = chunks.iter().filter(|chunk| chunk.stderr == stderr).flat_map(|chunk| chunk.data.to_vec());
        String::from_utf8(data.collect()).unwrap()
    }

    /// A line of standard output is cut by one of standard error; the last line has no end.
    const PRINTED: [(bool, &str); 5] =
        [(false, "one\ntw"), (true, "oops\nag"), (false, "o\n"), (true, "ain\n"), (false, "\nfour")];

    #[test]
    fn the_last_lines_are_counted_over_both_streams() {
        let chunks = PRINTED.map(|printed| chunk(printed, 0));
        let mut beginnings = Beginnings::default();
        chunks.iter().for_each(|chunk| beginnings.add(chunk));
        for (lines, stdout, stderr) in [
            (0, "", ""),
            (1, "four", ""),
            (2, "\nfour", ""),
            (3, "\nfour", "again\n"),
            (4, "\nfour", "oops\nagain\n"),
            (5, "two\n\nfour", "oops\nagain\n"),
            (6, "one\ntwo\n\nfour", "oops\nagain\n"),
            (u64::MAX, "one\ntwo\n\nfour", "oops\nagain\n"),
        ] {
            let mut skip = Skip::new(beginnings.before_last(lines));
            let kept: Vec<_> = chunks.iter().cloned().map(|chunk| skip.keep(chunk)).collect();
            assert_eq!((text(&kept, false), text(&kept, true)), (stdout.into(), stderr.into()), "{lines}");
        }
    }

    #[test]
    fn what_comes_after_the_last_lines_is_kept_also_where_none_was_asked_for() {
        let mut skip = Skip::new(2);
        let printed = [(false, "one\ntw"), (false, "o\nthree\n"), (true, "oops\n"), (false, "four")];
        let kept = printed.map(|printed| skip.keep(chunk(printed, 0)));
        assert_eq!((text(&kept, false), text(&kept, true)), ("three\nfour".into(), "oops\n".into()));
    }

    #[test]
    fn a_line_is_whole_and_has_the_time_of_its_beginning() {
        let mut lines = Lines::default();
        let mut all = Vec::new();
        for (second, printed) in (0..).zip(PRINTED) {
            all.extend(lines.add(chunk(printed, second)));
        }
        assert_eq!(all.len(), 5);
        all.extend(lines.rest());
        let of = |chunk: &LogChunk| (chunk.time, String::from_utf8(chunk.data.to_vec()).unwrap());
        let all: Vec<_> = all.iter().map(of).collect();
        let expected = [(0, "one\n"), (1, "oops\n"), (0, "two\n"), (1, "again\n"), (4, "\n"), (4, "four")];
        assert_eq!(all, expected.map(|(second, text)| (at(second), text.to_owned())));
        assert!(lines.rest().is_empty());
    }

    #[test]
    fn a_line_without_end_takes_no_memory_without_end() {
        let mut lines = Lines::default();
        let mut all = Vec::new();
        for second in 0..100 {
            all.extend(lines.add(chunk((false, &"x".repeat(1000)), second)));
            assert!(lines.streams[0].begun.len() < MAX_LINE);
        }
        all.extend(lines.add(chunk((false, "end\nnext\n"), 100)));
        assert_eq!(text(&all, false).len(), 100_000 + "end\nnext\n".len());
        let times: Vec<_> = all.iter().filter_map(|chunk| chunk.time).collect();
        assert_eq!(times, [at(0).unwrap(), at(100).unwrap()], "one for each line");
    }
}
