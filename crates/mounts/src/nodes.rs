//! Which number the guest knows a name by. A number stands for one file under one name: another file that comes to have
//! the name gets another number, and the old one is stale.
//!
//! The guest goes on with its numbers when a daemon ends and another one comes, so each is written to a journal before
//! it is given out: 34 bytes (number, directory's number, device, inode, length of the name; little end first) and the
//! name; a later entry counts; a directory of 0 means that the name is gone. Nothing in it can lead out of the
//! directory: it holds names that the guest may ask for anyway. When most of it is of the past it is written anew.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufReader, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::Arc,
};

use rustix::io::Errno;

use crate::{MAX_NODES, tree::Identity, wire::ROOT};

/// Longest path that the kernel walks, in bytes.
const MAX_PATH: usize = 4095;
const ENTRY: usize = 34;
/// So many entries more than twice those that count, and the journal is written anew: a guest could make it grow for ever.
const MAX_PAST: usize = 64 << 10;

type Name = Arc<[u8]>;

#[derive(Debug)]
struct Node {
    /// 0: its name is gone.
    directory: u64,
    name: Name,
    identity: Identity,
    /// How often the guest has been given it since this daemon serves it.
    given: u64,
}

/// All that the guest remembers.
#[derive(Debug)]
pub struct Nodes {
    known: HashMap<u64, Node>,
    names: HashMap<(u64, Name), u64>,
    next: u64,
    journal: Option<File>,
    /// Entries in it.
    written: usize,
}

impl Nodes {
    /// None yet, and no journal. Numbers begin anywhere, so that those of an earlier daemon mean nothing here.
    pub fn new() -> Self {
        let next = (rand::random::<u64>() >> 2) + 2;
        Self { known: HashMap::new(), names: HashMap::new(), next, journal: None, written: 0 }
    }

    /// None yet; writes a new journal.
    pub fn with_journal(path: &Path) -> io::Result<Self> {
        let mut nodes = Self::new();
        let journal = open(path)?;
        journal.set_len(0)?;
        nodes.journal = Some(journal);
        Ok(nodes)
    }

    /// Those of the last daemon's journal, as far as it goes; it is written anew without what is gone.
    pub fn from_journal(path: &Path) -> io::Result<Self> {
        let mut nodes = Self::new();
        match File::open(path) {
            Ok(journal) => nodes.replay(BufReader::new(journal)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let half = path.with_extension("half");
        let mut journal = open(&half)?;
        nodes.written = nodes.write_all_down(&mut journal)?;
        std::fs::rename(&half, path)?;
        nodes.journal = Some(journal);
        Ok(nodes)
    }

    fn replay(&mut self, mut journal: impl Read) {
        // What is not whole was never given out.
        while let Ok((number, node)) = read(&mut journal) {
            self.detach(number);
            if node.directory == 0 || self.known.len() >= MAX_NODES {
                continue;
            }
            self.names.insert((node.directory, Arc::clone(&node.name)), number);
            self.known.insert(number, node);
        }
        // A detached node that nobody can ask for by name is of no use to another daemon.
        self.known.retain(|_, node| node.directory != 0);
    }

    /// Its path below the directory.
    pub fn path(&self, number: u64) -> Result<Vec<u8>, Errno> {
        let mut parts: Vec<&[u8]> = Vec::new();
        let (mut at, mut length) = (number, 0);
        while at != ROOT {
            let node = self.known.get(&at).ok_or(Errno::STALE)?;
            length += node.name.len() + 1;
            // Also the end of a circle, which two renames at once may leave here for a moment.
            if length > MAX_PATH {
                return Err(Errno::NAMETOOLONG);
            }
            parts.push(&node.name);
            at = node.directory;
        }
        parts.reverse();
        Ok(parts.join(&b'/'))
    }

    /// What the number was given out for; `None` for the directory itself.
    pub fn identity(&self, number: u64) -> Result<Option<Identity>, Errno> {
        if number == ROOT {
            return Ok(None);
        }
        self.known.get(&number).map(|node| Some(node.identity)).ok_or(Errno::STALE)
    }

    /// The number for this name and file, which the guest is given once more.
    pub fn give(&mut self, directory: u64, name: &[u8], identity: Identity) -> Result<u64, Errno> {
        let name: Name = name.into();
        if let Some(&number) = self.names.get(&(directory, Arc::clone(&name))) {
            match self.known.get_mut(&number) {
                Some(node) if node.identity == identity => {
                    node.given += 1;
                    return Ok(number);
                }
                _ => self.detach(number),
            }
        }
        if self.known.len() >= MAX_NODES {
            return Err(Errno::NFILE);
        }
        self.next += 1;
        let node = Node { directory, name: Arc::clone(&name), identity, given: 1 };
        self.known.insert(self.next, node);
        self.names.insert((directory, name), self.next);
        self.write_down(self.next);
        Ok(self.next)
    }

    /// The name is gone.
    pub fn remove(&mut self, directory: u64, name: &[u8]) {
        if let Some(&number) = self.names.get(&(directory, Name::from(name))) {
            self.detach(number);
        }
    }

    /// The name is another one now, and what had that is gone.
    pub fn rename(&mut self, from: (u64, &[u8]), to: (u64, &[u8])) {
        if from == to {
            return;
        }
        let number = self.names.remove(&(from.0, Name::from(from.1)));
        self.remove(to.0, to.1);
        if let Some(number) = number {
            self.attach(number, to);
        }
    }

    /// The two have each other's name now.
    pub fn exchange(&mut self, one: (u64, &[u8]), other: (u64, &[u8])) {
        let first = self.names.remove(&(one.0, Name::from(one.1)));
        let second = self.names.remove(&(other.0, Name::from(other.1)));
        for (number, place) in [(first, other), (second, one)] {
            if let Some(number) = number {
                self.attach(number, place);
            }
        }
    }

    /// The guest has forgotten it so many times. A node of an earlier daemon was given more often than is known here;
    /// the guest forgets such a one all at once.
    pub fn forget(&mut self, number: u64, times: u64) {
        let Some(node) = self.known.get_mut(&number) else { return };
        node.given = node.given.saturating_sub(times);
        if node.given == 0 {
            self.detach(number);
            self.known.remove(&number);
        }
    }

    fn attach(&mut self, number: u64, (directory, name): (u64, &[u8])) {
        let Some(node) = self.known.get_mut(&number) else { return };
        node.directory = directory;
        node.name = name.into();
        self.names.insert((directory, Arc::clone(&node.name)), number);
        self.write_down(number);
    }

    fn detach(&mut self, number: u64) {
        let Some(node) = self.known.get_mut(&number).filter(|node| node.directory != 0) else { return };
        let key = (node.directory, Arc::clone(&node.name));
        node.directory = 0;
        if self.names.get(&key) == Some(&number) {
            self.names.remove(&key);
        }
        self.write_down(number);
    }

    fn write_down(&mut self, number: u64) {
        let (Some(journal), Some(node)) = (&mut self.journal, self.known.get(&number)) else { return };
        let mut entry = Vec::with_capacity(ENTRY + node.name.len());
        append(&mut entry, number, node);
        let mut done = journal.write_all(&entry);
        self.written += 1;
        if done.is_ok() && self.written > 2 * self.known.len() + MAX_PAST {
            done = self.write_anew();
        }
        if let Err(error) = done {
            tracing::warn!(%error, "the next daemon will not know the files that a guest has open in a mount");
            self.journal = None;
        }
    }

    /// In place, for this thread may have no right to open another file there. A daemon that is killed in these moments
    /// leaves its guests with stale files, which they look up again.
    fn write_anew(&mut self) -> io::Result<()> {
        let Some(mut journal) = self.journal.take() else { return Ok(()) };
        self.written = self.write_all_down(&mut journal)?;
        self.journal = Some(journal);
        Ok(())
    }

    fn write_all_down(&self, journal: &mut File) -> io::Result<usize> {
        let mut entries = Vec::new();
        let named = self.known.iter().filter(|(_, node)| node.directory != 0);
        let count = named.map(|(&number, node)| append(&mut entries, number, node)).count();
        journal.set_len(0)?;
        journal.write_all(&entries)?;
        Ok(count)
    }
}

fn open(path: &Path) -> io::Result<File> {
    File::options().create(true).append(true).mode(0o600).open(path)
}

fn append(entries: &mut Vec<u8>, number: u64, node: &Node) {
    for value in [number, node.directory, node.identity.0, node.identity.1] {
        entries.extend(value.to_le_bytes());
    }
    entries.extend((node.name.len() as u16).to_le_bytes());
    entries.extend(&*node.name);
}

fn read(journal: &mut impl Read) -> io::Result<(u64, Node)> {
    let mut numbers = [0; 4];
    for number in &mut numbers {
        let mut bytes = [0; 8];
        journal.read_exact(&mut bytes)?;
        *number = u64::from_le_bytes(bytes);
    }
    let mut length = [0; 2];
    journal.read_exact(&mut length)?;
    let mut name = vec![0; usize::from(u16::from_le_bytes(length))];
    journal.read_exact(&mut name)?;
    let [number, directory, device, inode] = numbers;
    Ok((number, Node { directory, name: name.into(), identity: (device, inode), given: 0 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_one_file_under_one_name() {
        let mut nodes = Nodes::new();
        let dir = nodes.give(ROOT, b"dir", (1, 10)).unwrap();
        let file = nodes.give(dir, b"file", (1, 11)).unwrap();
        assert_eq!(nodes.give(dir, b"file", (1, 11)), Ok(file));
        assert_eq!(nodes.path(file).unwrap(), b"dir/file");
        let another = nodes.give(dir, b"file", (1, 12)).unwrap();
        assert_ne!(another, file);
        assert_eq!(nodes.path(file), Err(Errno::STALE));

        nodes.rename((ROOT, b"dir"), (ROOT, b"moved"));
        assert_eq!(nodes.path(another).unwrap(), b"moved/file");
        let other = nodes.give(ROOT, b"other", (1, 13)).unwrap();
        nodes.exchange((ROOT, b"other"), (dir, b"file"));
        assert_eq!((nodes.path(other).unwrap(), nodes.path(another).unwrap()), (b"moved/file".into(), b"other".into()));
        nodes.remove(dir, b"file");
        assert_eq!(nodes.path(other), Err(Errno::STALE));
    }

    #[test]
    fn what_the_guest_forgets_is_forgotten() {
        let mut nodes = Nodes::new();
        let file = nodes.give(ROOT, b"file", (1, 1)).unwrap();
        nodes.give(ROOT, b"file", (1, 1)).unwrap();
        nodes.forget(file, 1);
        assert!(nodes.path(file).is_ok());
        nodes.forget(file, 1);
        assert!(nodes.known.is_empty() && nodes.names.is_empty());
        nodes.forget(12345, u64::MAX);
    }

    #[test]
    fn a_circle_has_an_end() {
        let mut nodes = Nodes::new();
        let one = nodes.give(ROOT, b"one", (1, 1)).unwrap();
        let two = nodes.give(one, b"two", (1, 2)).unwrap();
        nodes.rename((ROOT, b"one"), (two, b"one"));
        assert_eq!(nodes.path(one), Err(Errno::NAMETOOLONG));
    }

    #[test]
    fn a_journal_does_not_grow_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nodes");
        let mut nodes = Nodes::with_journal(&path).unwrap();
        let kept = nodes.give(ROOT, b"kept", (1, 0)).unwrap();
        for inode in 1..200_000 {
            let passing = nodes.give(ROOT, b"passing", (1, inode)).unwrap();
            nodes.forget(passing, 1);
        }
        assert!(std::fs::metadata(&path).unwrap().len() < 2 * (MAX_PAST * (ENTRY + 7)) as u64);
        assert_eq!(Nodes::from_journal(&path).unwrap().path(kept).unwrap(), b"kept");
    }

    #[test]
    fn another_daemon_knows_them_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nodes");
        let mut nodes = Nodes::with_journal(&path).unwrap();
        let [a, b, c] = [b"a", b"b", b"c"].map(|name| nodes.give(ROOT, name, (1, u64::from(name[0]))).unwrap());
        nodes.rename((ROOT, b"a"), (b, b"a"));
        nodes.remove(ROOT, b"c");
        drop(nodes);
        for _ in 0..2 {
            let nodes = Nodes::from_journal(&path).unwrap();
            assert_eq!(nodes.path(a).unwrap(), b"b/a");
            assert_eq!((nodes.path(c), nodes.identity(b)), (Err(Errno::STALE), Ok(Some((1, u64::from(b'b'))))));
        }
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert_eq!(Nodes::from_journal(&path).unwrap().known.len(), 1, "half an entry is none");
        let mut nodes = Nodes::from_journal(&path).unwrap();
        let fresh = nodes.give(ROOT, b"d", (1, 1)).unwrap();
        assert!(![a, b, c].contains(&fresh));
    }
}
