//! heyvm-edge
