//! The sandbox's ports as the host reaches them.

pub mod listening;
pub mod streams;
