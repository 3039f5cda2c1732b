//! Real servers that tests need, started by the tests themselves: [`postgres`].
//!
//! Each lives as long as the test binary that asked for it, whichever way that ends, and leaves nothing behind.
#![forbid(unsafe_code)]

pub mod postgres;
