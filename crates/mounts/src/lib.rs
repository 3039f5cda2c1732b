//! A directory of this host, served to a guest in the words of the guest kernel's own file system in user space (FUSE).
//! Knows neither HTTP nor gRPC: requests come in and answers go out as bytes, as /dev/fuse gives and takes them.
//!
//! ```text
//! guest's kernel ─/dev/fuse─ agent ═══ bytes ═══ Server ──▶ files below one directory
//!                                                 ├ wire      the protocol's structures
//!                                                 ├ nodes     which number the guest knows a name by; kept in a journal
//!                                                 ├ handles   files and directories that are open
//!                                                 ├ tree      every way to a file, none of which leaves the directory
//!                                                 ├ directory what may be served, recognised again later
//!                                                 └ worker    who does the work, with whose rights
//! ```
//! The guest is hostile: whatever it asks for, nothing outside the directory is reached. Every path is walked by the
//! kernel below the directory's descriptor without following links and without entering other file systems; numbers of
//! nodes and handles are looked up, never trusted; names, sizes, nodes and handles have bounds; set-user-id bits,
//! devices, pipes and sockets cannot be made.
#![forbid(unsafe_code)]

mod directories;
mod directory;
mod entries;
mod files;
mod handles;
mod nodes;
mod server;
mod tree;
mod wire;
mod worker;

use std::{io, path::PathBuf};

pub use directory::{Directory, DirectoryIdentity};
pub use handles::HandleBudget;
pub use server::{History, Server};
pub use wire::MAX_WRITE;

/// Nodes of one mount that the guest may remember at a time: beyond it look-ups fail with ENFILE.
pub const MAX_NODES: usize = 512 << 10;
/// Files and directories of all mounts of one sandbox that may be open at a time: beyond it opening fails with ENFILE.
pub const MAX_HANDLES: usize = 2048;

/// Why a directory cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory cannot be opened.
    #[error("{path} cannot be opened", path = path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A symbolic link stands where the directory was.
    #[error("{path} leads through a symbolic link", path = path.display())]
    Link {
        /// The path.
        path: PathBuf,
    },
    /// The path means another directory than before.
    #[error("{path} is another directory than the one that was mounted", path = path.display())]
    Replaced {
        /// The path.
        path: PathBuf,
    },
    /// The thread that does the work could not be set up.
    #[error("no thread with the rights of the directory's owner")]
    Worker(#[source] io::Error),
}
