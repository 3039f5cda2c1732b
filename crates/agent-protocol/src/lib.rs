//! The wire between host and guest: messages generated from `proto/agent.proto`, the hello that makes a stale
//! virtio-serial byte stream fit for HTTP/2, and the limits both ends keep.
#![forbid(unsafe_code)]

pub mod hello;
pub mod ports;

/// Messages, client and server generated from `proto/agent.proto`.
#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
pub mod v1 {
    tonic::include_proto!("heyvm.agent.v1");
}

/// Largest gRPC message either end accepts, in bytes.
pub const MAX_MESSAGE: usize = 4 << 20;
/// Size in which byte streams are cut into messages, in bytes.
pub const CHUNK: usize = 64 << 10;
/// Name of the virtio-serial port, as in `/sys/class/virtio-ports/*/name`.
pub const PORT_NAME: &str = "heyvm.agent";
/// How the agent names a disk that is full, in messages of status RESOURCE_EXHAUSTED: the host has a hint for that.
pub const DISK_FULL: &str = "the sandbox's disk is full";
