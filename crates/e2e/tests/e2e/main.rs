//! Every promise of SPECIFICATION.md that takes a real VM to check, one module per subject.

mod api;
mod crash;
mod deploy;
mod doctor;
mod exec;
mod files;
mod images;
mod input;
mod isolation;
mod lifecycle;
mod network;
mod ports;
mod proxy;
mod reasons;
mod replace;
mod seed;
