//! What the agent must understand of a request: whether it is answered, and whether it may be made a second time.
//! Source: Linux's `include/uapi/linux/fuse.h`.

use bytes::Bytes;
use nix::{
    errno::Errno,
    libc::{O_APPEND, O_EXCL},
};

const HEADER: usize = 40;
const FORGET: u32 = 2;
const WRITE: u32 = 16;
const INIT: u32 = 26;
const CREATE: u32 = 35;
const BATCH_FORGET: u32 = 42;
/// Look-ups, attributes, links' targets, opening, reading, statistics, closing, syncing, interrupting, seeking: a second
/// time does what the first did. Making, removing and renaming are not among them; writing and opening with leave to
/// make depend on their flags.
const REPEATABLE: [u32; 17] = [1, 3, 4, 5, 14, 15, 17, 18, 20, INIT, 27, 28, 29, 30, 36, 44, 46];
/// Where `fuse_write_in` has the flags the file was opened with, and `fuse_create_in` those it is to be opened with.
const WRITE_FLAGS: usize = HEADER + 32;
const CREATE_FLAGS: usize = HEADER;

/// One request of the kernel's.
#[derive(Debug, Clone)]
pub struct Request {
    /// As it came.
    pub bytes: Bytes,
    /// Its own number.
    pub unique: u64,
    operation: u32,
}

impl Request {
    /// `None` for what is shorter than a request's head.
    pub fn of(bytes: Bytes) -> Option<Self> {
        let word = |at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
        let operation = word(4)?;
        let unique = u64::from_ne_bytes(bytes.get(8..16)?.try_into().ok()?);
        Some(Self { bytes, unique, operation })
    }

    /// Whether the kernel waits for an answer.
    pub fn is_answered(&self) -> bool {
        ![FORGET, BATCH_FORGET].contains(&self.operation)
    }

    /// Whether nothing comes of it when it is made twice.
    pub fn may_be_repeated(&self) -> bool {
        match self.operation {
            WRITE => self.lacks(WRITE_FLAGS, O_APPEND),
            CREATE => self.lacks(CREATE_FLAGS, O_EXCL),
            other => REPEATABLE.contains(&other),
        }
    }

    fn lacks(&self, at: usize, flag: i32) -> bool {
        let flags = self.bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        flags.is_some_and(|flags| u32::from_ne_bytes(flags) & flag as u32 == 0)
    }

    /// Whether the mount is of no use without its answer.
    pub fn is_the_first(&self) -> bool {
        self.operation == INIT
    }

    /// An answer that says no.
    pub fn refusal(&self, errno: Errno) -> Vec<u8> {
        [&16_u32.to_ne_bytes()[..], &(-(errno as i32)).to_ne_bytes(), &self.unique.to_ne_bytes()].concat()
    }
}

/// The number of the request that an answer belongs to.
pub fn answered(answer: &[u8]) -> Option<u64> {
    Some(u64::from_ne_bytes(answer.get(8..16)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(operation: u32, flags: i32) -> Request {
        let mut bytes = vec![0; HEADER + 40];
        bytes[4..8].copy_from_slice(&operation.to_ne_bytes());
        bytes[8..16].copy_from_slice(&9_u64.to_ne_bytes());
        let at = if operation == CREATE { CREATE_FLAGS } else { WRITE_FLAGS };
        bytes[at..at + 4].copy_from_slice(&flags.to_ne_bytes());
        Request::of(bytes.into()).unwrap()
    }

    #[test]
    fn what_is_made_only_once() {
        assert!(request(15, 0).may_be_repeated() && request(WRITE, 1).may_be_repeated());
        assert!(!request(WRITE, 1 | O_APPEND).may_be_repeated());
        assert!(request(CREATE, 2).may_be_repeated() && !request(CREATE, 2 | O_EXCL).may_be_repeated());
        for making in [6, 8, 9, 10, 11, 12, 13, 43, 45, 47] {
            assert!(!request(making, 0).may_be_repeated(), "{making}");
        }
        assert!(!request(FORGET, 0).is_answered());
        assert_eq!(answered(&request(15, 0).refusal(Errno::EIO)), Some(9));
        assert!(Request::of(Bytes::from_static(b"short")).is_none());
    }
}
