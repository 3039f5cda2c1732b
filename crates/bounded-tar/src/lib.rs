//! Tar archives of unknown origin, read in bounded memory and unpacked within one directory; and trees packed whole.
//!
//! - [`entries()`]: the entries of a stream, one after another. Headers are bounded, whatever size they announce.
//! - [`unpack()`]: files below a directory, opened by descriptor with `openat2(RESOLVE_BENEATH)`: neither a name nor a link
//!   leads out of it, whoever changes the directory meanwhile.
//! - [`Packer`] (`pack`): modes, times, hard links and holes are kept; sockets, FIFOs and devices are left out and counted.
//! - [`inside`] (`path`): what a name or a link may be.
//!
//! Knows nothing of compression, and of no error but its own.
#![forbid(unsafe_code)]

mod entries;
mod holes;
mod pack;
mod path;
mod unpack;

pub use entries::{Metered, entries};
pub use pack::{Kind, Packer, Problem, Rules, Shrunk};
pub use path::{inside, leads_inside, stays_inside};
pub use tar::{Entry, EntryType};
pub use unpack::{Done, Error, LeftOut, Links, MAX_HOLES, Options, unpack};

/// Bytes that a header, with a long name or extended attributes before it, may take. It is held in memory.
pub const MAX_HEADER: u64 = 1 << 20;
