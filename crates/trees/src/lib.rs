//! Removes and replaces directory trees without ever leaving them: no mount is crossed and no link is followed.
//!
//! - [`remove`]: a file, link or directory with all it holds. The only way to remove a tree in this workspace:
//!   `std::fs::remove_dir_all` crosses mounts, and what lies behind one belongs to someone else.
//! - [`Replacement`] (`replacement`): new content for a directory, built aside and swapped in by renames that are undone
//!   when one of them fails.
//! - `walk`: one open directory at a time, whatever the depth.
#![forbid(unsafe_code)]

mod error;
mod removal;
mod replacement;
mod walk;

pub use error::Error;
pub use removal::{check, remove};
pub use replacement::{Leftover, Replacement};
