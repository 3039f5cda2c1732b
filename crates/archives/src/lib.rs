//! The cloud's archives: tar.gz (or tar.zst) files that accounts upload and deploy from.
//!
//! - [`check()`]: what an archive must be; the one place that decides it, for the daemon as for the cloud.
//! - [`tar_of`] (`compression`): the tar in it.
//! - [`lies_below`]: from where an archive names its files.
//! - [`Archives`] (`catalog`): whose archives there are, from the first word of an upload to the last use.
//! - [`Storage`] (`storage`): the bytes, in a directory or an S3-compatible store ([`Settings`]), checked while they
//!   stream in. An object has a name of its own and never changes.
//!
//! Knows no HTTP.
#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test may block its own thread"))]
#![forbid(unsafe_code)]

mod below;
mod catalog;
mod check;
mod compression;
mod content;
mod error;
mod settings;
mod storage;

pub use below::lies_below;
pub use catalog::{Archive, Archives, Body, Ticket};
pub use check::{Limits, check};
pub use compression::{Compression, tar_of};
pub use content::Content;
pub use error::Error;
pub use settings::{S3, Settings};
pub use storage::{Object, Storage, Stored};
