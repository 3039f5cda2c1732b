//! The file server, asked as a guest's kernel asks, and as one asks that has been taken over.
#![allow(missing_docs, clippy::unwrap_used)]

mod confinement;
mod files;
mod guest;
mod nonsense;
mod rights;
