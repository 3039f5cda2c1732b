//! The sandbox's ports as the host reaches them.

pub mod dial;
pub mod listening;
