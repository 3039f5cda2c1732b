//! The control plane's own logic, with a driver that has processes for machines: states, names, time, crashes.

mod daemon;
mod machines;

mod adoption;
mod creating;
mod ending;
mod names;
mod ports;
mod replacing;
