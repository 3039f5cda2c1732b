//! What a command has printed, kept until it is answered: once, both streams in the order of arrival, each readable by
//! itself.
//!
//! ```text
//! write ──▶ memory ──(256 KiB)──▶ a file without a name, as far as the Budget goes ──▶ finish ──▶ read, any number of times
//! ```
//! The file is a sequence of frames: one byte for the stream, four for the length, the bytes.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::{Buf, Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt, stream};

use crate::answer::{ByteStream, Characters};

/// Most output of one call that is kept.
pub const PER_CALL: u64 = 256 << 20;
/// Most output on disk for one account at a time.
const PER_ACCOUNT: u64 = 512 << 20;
/// Most output on disk for all of them.
const IN_ALL: u64 = 2 << 30;
/// Output up to this size never touches the disk; more is written in pieces of this size.
const IN_MEMORY: usize = 256 << 10;
/// Read at once.
const PIECE: usize = 64 << 10;
/// Stream and length, before the bytes of a frame.
const HEADER: usize = 5;

/// Which stream bytes came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// How much output may be on disk, and where.
pub struct Budget {
    dir: PathBuf,
    used: Mutex<HashMap<String, u64>>,
}

impl Budget {
    /// Nothing is used yet; the files are in `dir`.
    pub fn new(dir: PathBuf) -> Arc<Self> {
        Arc::new(Self { dir, used: Mutex::default() })
    }

    fn take(&self, account: &str, bytes: u64) -> bool {
        let mut used = self.lock();
        let in_all: u64 = used.values().sum();
        let own = used.get(account).copied().unwrap_or(0);
        let fits = own + bytes <= PER_ACCOUNT && in_all + bytes <= IN_ALL;
        if fits {
            used.insert(account.to_owned(), own + bytes);
        }
        fits
    }

    fn give_back(&self, account: &str, bytes: u64) {
        let mut used = self.lock();
        if let Some(own) = used.get_mut(account) {
            *own = own.saturating_sub(bytes);
            if *own == 0 {
                used.remove(account);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, u64>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is taken of a budget, given back when it is dropped.
struct Share {
    budget: Arc<Budget>,
    account: String,
    bytes: u64,
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.give_back(&self.account, self.bytes);
    }
}

/// Whether a stream is UTF-8 so far.
#[derive(Default)]
struct Text {
    characters: Characters,
    broken: bool,
}

/// Output that still comes.
pub struct Recording {
    share: Share,
    file: Option<Arc<File>>,
    memory: BytesMut,
    kept: u64,
    truncated: bool,
    texts: [Text; 2],
}

impl Recording {
    /// An empty one, for `account`.
    pub fn new(budget: &Arc<Budget>, account: &str) -> Self {
        let share = Share { budget: Arc::clone(budget), account: account.to_owned(), bytes: 0 };
        Self { share, file: None, memory: BytesMut::new(), kept: 0, truncated: false, texts: Default::default() }
    }

    /// Adds bytes. Beyond the budget they are dropped, and the output counts as truncated.
    pub async fn write(&mut self, source: Source, bytes: &[u8]) -> io::Result<()> {
        if self.truncated || bytes.is_empty() {
            return Ok(());
        }
        let room = usize::try_from(PER_CALL - self.kept).unwrap_or(usize::MAX);
        let kept = &bytes[..bytes.len().min(room)];
        self.truncated = kept.len() < bytes.len();
        let text = &mut self.texts[source as usize];
        text.broken = text.broken || std::str::from_utf8(&text.characters.whole(kept)).is_err();
        self.kept += kept.len() as u64;
        for frame in kept.chunks(u32::MAX as usize) {
            self.memory.extend_from_slice(&[source as u8]);
            self.memory.extend_from_slice(&(frame.len() as u32).to_be_bytes());
            self.memory.extend_from_slice(frame);
        }
        if self.memory.len() < IN_MEMORY {
            return Ok(());
        }
        self.write_out().await
    }

    async fn write_out(&mut self) -> io::Result<()> {
        let piece = self.memory.split().freeze();
        if !self.share.budget.take(&self.share.account, piece.len() as u64) {
            self.truncated = true;
            // What is in memory already stays there: a whole frame or more of it.
            self.memory = BytesMut::from(piece);
            return Ok(());
        }
        self.share.bytes += piece.len() as u64;
        let (file, dir) = (self.file.clone(), self.share.budget.dir.clone());
        let written = tokio::task::spawn_blocking(move || {
            let file = file.map_or_else(|| new_file(&dir), Ok)?;
            (&*file).write_all(&piece)?;
            Ok::<_, io::Error>(file)
        });
        self.file = Some(written.await.map_err(io::Error::other)??);
        Ok(())
    }

    /// Whether something was dropped.
    pub fn is_truncated(&self) -> bool {
        self.truncated
    }

    /// Whether a stream is UTF-8 from beginning to end, or to where it was cut.
    pub fn is_text(&self, source: Source) -> bool {
        let text = &self.texts[source as usize];
        !text.broken && (self.truncated || text.characters.is_between())
    }

    /// Ready to be read, any number of times.
    pub fn finish(self) -> Recorded {
        let Self { share, file, memory, .. } = self;
        Recorded(Arc::new(Kept { on_disk: share.bytes, _share: share, file, rest: memory.freeze() }))
    }
}

#[expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]
fn new_file(dir: &Path) -> io::Result<Arc<File>> {
    tempfile::tempfile_in(dir).map(Arc::new)
}

/// Output that is complete.
#[derive(Clone)]
pub struct Recorded(Arc<Kept>);

struct Kept {
    _share: Share,
    file: Option<Arc<File>>,
    on_disk: u64,
    /// What comes after the file.
    rest: Bytes,
}

impl Recorded {
    /// One stream, or both in the order of arrival.
    pub fn read(&self, source: Option<Source>) -> ByteStream {
        let mut frames = Frames { source, left: 0, wanted: false, header: BytesMut::new() };
        self.raw().map_ok(move |piece| frames.filter(piece)).boxed()
    }

    fn raw(&self) -> impl futures::Stream<Item = io::Result<Bytes>> + Send + use<> {
        stream::try_unfold((Arc::clone(&self.0), 0_u64), |(kept, position)| async move {
            if position > kept.on_disk || (position == kept.on_disk && kept.rest.is_empty()) {
                return Ok(None);
            }
            let Some(file) = kept.file.clone().filter(|_| position < kept.on_disk) else {
                let rest = kept.rest.clone();
                let end = kept.on_disk + 1;
                return Ok(Some((rest, (kept, end))));
            };
            let length = PIECE.min(usize::try_from(kept.on_disk - position).unwrap_or(PIECE));
            let piece = tokio::task::spawn_blocking(move || {
                let mut piece = vec![0; length];
                file.read_exact_at(&mut piece, position)?;
                Ok::<_, io::Error>(Bytes::from(piece))
            });
            let piece = piece.await.map_err(io::Error::other)??;
            Ok(Some((piece, (kept, position + length as u64))))
        })
    }
}

/// Takes the wanted stream's bytes out of pieces that begin and end anywhere in a frame.
struct Frames {
    source: Option<Source>,
    /// Bytes of the frame that are to come.
    left: usize,
    wanted: bool,
    /// The beginning of a frame's header.
    header: BytesMut,
}

impl Frames {
    fn filter(&mut self, mut piece: Bytes) -> Bytes {
        let mut found = BytesMut::new();
        while !piece.is_empty() {
            if self.left > 0 {
                let part = piece.split_to(self.left.min(piece.len()));
                self.left -= part.len();
                if self.wanted {
                    found.extend_from_slice(&part);
                }
                continue;
            }
            self.header.extend_from_slice(&piece.split_to((HEADER - self.header.len()).min(piece.len())));
            if self.header.len() == HEADER {
                let stream = self.header.get_u8();
                self.left = self.header.get_u32() as usize;
                self.wanted = self.source.is_none_or(|source| source as u8 == stream);
                self.header.clear();
            }
        }
        found.freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn all(stream: ByteStream) -> Vec<u8> {
        stream
            .try_fold(Vec::new(), async |mut all, piece| {
                all.extend_from_slice(&piece);
                Ok(all)
            })
            .await
            .unwrap()
    }

    fn on_disk(budget: &Budget) -> u64 {
        budget.lock().values().sum()
    }

    #[tokio::test]
    async fn each_stream_is_read_by_itself_and_both_in_order() {
        let budget = Budget::new("/tmp".into());
        // In memory, and long enough for the disk; pieces that end within a header among them.
        for rounds in [3, 30_000_u32] {
            let mut recording = Recording::new(&budget, "ada");
            let (mut stdout, mut stderr, mut both) = (Vec::new(), Vec::new(), Vec::new());
            for round in 0..rounds {
                let (source, own) =
                    if round % 3 == 0 { (Source::Stderr, &mut stderr) } else { (Source::Stdout, &mut stdout) };
                let text = format!("{round}{}", "x".repeat(round as usize % 29));
                own.extend_from_slice(text.as_bytes());
                both.extend_from_slice(text.as_bytes());
                recording.write(source, text.as_bytes()).await.unwrap();
            }
            assert!(recording.is_text(Source::Stdout) && !recording.is_truncated());
            let recorded = recording.finish();
            for _ in 0..2 {
                assert!(all(recorded.read(Some(Source::Stdout))).await == stdout);
                assert!(all(recorded.read(Some(Source::Stderr))).await == stderr);
                assert!(all(recorded.read(None)).await == both);
            }
            assert_eq!(on_disk(&budget) > 0, rounds > 3);
        }
        assert_eq!(on_disk(&budget), 0, "all is given back");
    }

    #[tokio::test]
    async fn text_is_told_from_bytes_per_stream() {
        let budget = Budget::new("/tmp".into());
        for (pieces, is_text) in
            [(&[&b"\xe2\x82"[..], b"\xac"][..], true), (&[b"\xe2\x82"], false), (&[b"\xff"], false), (&[], true)]
        {
            let mut recording = Recording::new(&budget, "ada");
            for piece in pieces {
                recording.write(Source::Stdout, piece).await.unwrap();
                recording.write(Source::Stderr, b"text").await.unwrap();
            }
            assert_eq!(recording.is_text(Source::Stdout), is_text, "{pieces:?}");
            assert!(recording.is_text(Source::Stderr));
        }
    }

    #[tokio::test]
    async fn output_beyond_the_accounts_budget_is_cut_and_other_accounts_have_theirs() {
        let budget = Budget::new("/tmp".into());
        assert!(budget.take("ada", PER_ACCOUNT - IN_MEMORY as u64));
        let write = async |account: &str| {
            let mut recording = Recording::new(&budget, account);
            for _ in 0..4 {
                recording.write(Source::Stdout, &vec![b'x'; IN_MEMORY - HEADER]).await.unwrap();
            }
            let truncated = recording.is_truncated();
            (truncated, all(recording.finish().read(None)).await.len())
        };
        assert_eq!(write("ada").await, (true, 2 * (IN_MEMORY - HEADER)));
        assert_eq!(write("bob").await, (false, 4 * (IN_MEMORY - HEADER)));
        for other in 0..3 {
            assert!(budget.take(&other.to_string(), PER_ACCOUNT));
        }
        assert!(write("bob").await.0, "and all together have a limit");
    }
}
