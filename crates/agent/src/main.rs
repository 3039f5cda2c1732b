//! heyvm-agent: process 1 of every guest.
fn main() {}
