//! Requests in the protocol's own words, without a kernel in between that would refuse to send them.

use std::path::Path;

use heyvm_mounts::{Directory, HandleBudget, History, Server};
use tempfile::TempDir;

pub const ROOT: u64 = 1;
pub const LOOKUP: u32 = 1;
pub const FORGET: u32 = 2;
pub const GETATTR: u32 = 3;
pub const SETATTR: u32 = 4;
pub const READLINK: u32 = 5;
pub const SYMLINK: u32 = 6;
pub const MKNOD: u32 = 8;
pub const MKDIR: u32 = 9;
pub const UNLINK: u32 = 10;
pub const RMDIR: u32 = 11;
pub const LINK: u32 = 13;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const WRITE: u32 = 16;
pub const RELEASE: u32 = 18;
pub const OPENDIR: u32 = 27;
pub const CREATE: u32 = 35;
pub const READDIRPLUS: u32 = 44;
pub const RENAME2: u32 = 45;

/// A directory `shared`, what is beside it, and a server of the former.
pub struct Guest {
    pub dir: TempDir,
    pub server: Server,
}

/// What was asked: the body, or the error number.
pub type Answer = Result<Vec<u8>, i32>;

impl Guest {
    pub fn new() -> Self {
        Self::with(false)
    }

    pub fn read_only() -> Self {
        Self::with(true)
    }

    fn with(read_only: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("shared")).unwrap();
        std::fs::write(dir.path().join("secret"), "secret").unwrap();
        let server = open(dir.path(), read_only, &History::Fresh(dir.path().join("journal")));
        Self { dir, server }
    }

    /// Another daemon takes over.
    pub fn adopted(mut self) -> Self {
        self.server = open(self.dir.path(), false, &History::Kept(self.dir.path().join("journal")));
        self
    }

    pub fn shared(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join("shared").join(name)
    }

    pub fn ask(&self, operation: u32, node: u64, body: &[u8]) -> Answer {
        let answer = self.server.answer(&request(operation, node, body)).expect("an answer");
        let error = i32::from_ne_bytes(answer[4..8].try_into().unwrap());
        assert_eq!(answer.len(), u32::from_ne_bytes(answer[..4].try_into().unwrap()) as usize);
        if error == 0 { Ok(answer[16..].to_vec()) } else { Err(-error) }
    }

    /// The node of a path, step by step.
    pub fn find(&self, path: &str) -> Result<u64, i32> {
        let mut node = ROOT;
        for name in path.split('/') {
            node = match number(&self.ask(LOOKUP, node, &text(name))?, 0) {
                0 => return Err(nix::libc::ENOENT),
                node => node,
            };
        }
        Ok(node)
    }

    pub fn open(&self, node: u64, flags: i32) -> Result<u64, i32> {
        Ok(number(&self.ask(OPEN, node, &join(&[&flags.to_ne_bytes(), &[0; 4]]))?, 0))
    }

    /// The new file's node and handle.
    pub fn create(&self, parent: u64, name: &str, flags: i32, mode: u32) -> Result<(u64, u64), i32> {
        let body = join(&[&flags.to_ne_bytes(), &mode.to_ne_bytes(), &[0; 8], &text(name)]);
        let made = self.ask(CREATE, parent, &body)?;
        Ok((number(&made, 0), number(&made, 128)))
    }

    pub fn read(&self, node: u64, handle: u64, offset: u64, size: u32) -> Answer {
        self.ask(READ, node, &span(handle, offset, size, nix::libc::O_RDONLY))
    }

    pub fn write(&self, node: u64, handle: u64, offset: u64, data: &[u8]) -> Answer {
        let span = span(handle, offset, data.len() as u32, nix::libc::O_RDWR);
        self.ask(WRITE, node, &join(&[&span, data]))
    }

    pub fn mkdir(&self, parent: u64, name: &str) -> Result<u64, i32> {
        Ok(number(&self.ask(MKDIR, parent, &join(&[&0o755_u32.to_ne_bytes(), &[0; 4], &text(name)]))?, 0))
    }

    pub fn symlink(&self, parent: u64, name: &str, target: &str) -> Result<u64, i32> {
        Ok(number(&self.ask(SYMLINK, parent, &join(&[&text(name), &text(target)]))?, 0))
    }

    pub fn rename(&self, from: (u64, &str), to: (u64, &str), flags: u32) -> Answer {
        let body = join(&[&to.0.to_ne_bytes(), &flags.to_ne_bytes(), &[0; 4], &text(from.1), &text(to.1)]);
        self.ask(RENAME2, from.0, &body)
    }

    pub fn names(&self, node: u64) -> Result<Vec<String>, i32> {
        let handle = number(&self.ask(OPENDIR, node, &[0; 8])?, 0);
        let (mut names, mut position) = (Vec::new(), 0);
        loop {
            let entries = self.ask(READDIRPLUS, node, &span(handle, position, 4096, 0))?;
            if entries.is_empty() {
                names.sort();
                return Ok(names);
            }
            let mut at = 0;
            while at < entries.len() {
                position = number(&entries, at + 136);
                let length = u32::from_ne_bytes(entries[at + 144..at + 148].try_into().unwrap()) as usize;
                let name = String::from_utf8(entries[at + 152..at + 152 + length].to_vec()).unwrap();
                at += (152 + length).next_multiple_of(8);
                names.extend(Some(name).filter(|name| name != "." && name != ".."));
            }
        }
    }
}

fn open(dir: &Path, read_only: bool, history: &History) -> Server {
    let shared = std::fs::canonicalize(dir.join("shared")).unwrap();
    let budget = HandleBudget::new(heyvm_mounts::MAX_HANDLES * 64);
    Server::open(Directory::open(&shared).unwrap(), read_only, history, &budget)
}

pub fn request(operation: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let length = 40 + body.len() as u32;
    join(&[&length.to_ne_bytes(), &operation.to_ne_bytes(), &7_u64.to_ne_bytes(), &node.to_ne_bytes(), &[0; 16], body])
}

pub fn span(handle: u64, offset: u64, size: u32, flags: i32) -> Vec<u8> {
    let (handle, offset) = (handle.to_ne_bytes(), offset.to_ne_bytes());
    join(&[&handle, &offset, &size.to_ne_bytes(), &[0; 12], &flags.to_ne_bytes(), &[0; 4]])
}

pub fn text(name: &str) -> Vec<u8> {
    [name.as_bytes(), b"\0"].concat()
}

pub fn join(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

pub fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}
