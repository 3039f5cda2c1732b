//! heyvm-jail
