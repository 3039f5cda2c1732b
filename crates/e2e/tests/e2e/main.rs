//! Every promise of SPECIFICATION.md that takes a real VM to check, one module per subject.

mod api;
mod archives;
mod cloud;
mod crash;
mod deploy;
mod disks;
mod doctor;
mod exec;
mod files;
mod first_app;
mod guest;
mod images;
mod input;
mod isolation;
mod lifecycle;
mod mounts;
mod network;
mod ports;
mod proxy;
mod reasons;
mod regions;
mod replace;
mod schema;
mod sdk;
mod seed;
mod tenancy;
