//! heyvm-server
