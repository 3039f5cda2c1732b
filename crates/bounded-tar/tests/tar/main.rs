//! Trees that go through a tar, and tars that no honest packer makes.
#![allow(missing_docs, clippy::unwrap_used)]

mod hostile;
mod round_trip;
