//! Directories of the host in the sandbox.
//!
//! ```text
//! programs ─▶ kernel ─/dev/fuse─▶ keeper ══ Mount call ══▶ host
//!                      [device]     │ one per mount, for as long as the guest lives; hosts come and go
//! ```
//! The agent passes requests on and understands no more of them than it takes to keep them while the host is away. The
//! keepers run on the agent's one thread, which therefore never touches a path of the sandbox itself.

mod device;
mod keeper;
mod request;

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use heyvm_agent_protocol::v1::{MountInput, MountOutput, MountStart};
use tokio::{sync::mpsc, task::JoinHandle};
use tonic::{Status, Streaming};

use crate::files::{absolute, blocking, failed};
use device::Device;

/// Requests that may wait for the host.
const QUEUE: usize = 16;

/// One host that serves a mount, for as long as its call lasts.
struct Host {
    requests: mpsc::Sender<Result<MountOutput, Status>>,
    answers: Streaming<MountInput>,
}

struct Mount {
    hosts: mpsc::Sender<Host>,
    keeping: JoinHandle<()>,
}

/// Every mount of the sandbox.
#[derive(Default)]
pub struct Mounts {
    all: Mutex<HashMap<PathBuf, Mount>>,
    making: tokio::sync::Mutex<()>,
}

impl Mounts {
    /// Mounts what the first message names, or goes on with it where it is mounted already; the host serves it from then
    /// on.
    pub async fn attach(
        &self,
        mut answers: Streaming<MountInput>,
    ) -> Result<mpsc::Receiver<Result<MountOutput, Status>>, Status> {
        let first = answers.message().await?.and_then(|first| first.start);
        let start = first.ok_or_else(|| Status::invalid_argument("the first message must say what to mount"))?;
        let path = absolute(&start.path)?;
        let (requests, receiver) = mpsc::channel(QUEUE);
        // An empty first message says that it is mounted.
        requests.try_send(Ok(MountOutput { request: Bytes::new() })).ok();
        let host = Host { requests, answers };
        let _one_at_a_time = self.making.lock().await;
        let Err(host) = self.pass_on(&path, host).await else { return Ok(receiver) };
        let device = blocking({
            let path = path.clone();
            move || mount(&path, &start)
        })
        .await?;
        let device = Device::watch(device).map_err(|error| Status::internal(format!("/dev/fuse: {error}")))?;
        let (hosts, coming) = mpsc::channel(1);
        hosts.try_send(host).ok();
        let keeping = tokio::spawn(keeper::keep(path.clone(), device, coming));
        self.lock().insert(path, Mount { hosts, keeping });
        Ok(receiver)
    }

    /// To the keeper of a mount that is there; gives the host back where there is none any more.
    async fn pass_on(&self, path: &Path, host: Host) -> Result<(), Host> {
        let known = self.lock().get(path).map(|mount| mount.hosts.clone());
        match known {
            Some(hosts) => hosts.send(host).await.map_err(|refused| refused.0),
            None => Err(host),
        }
    }

    /// Whether a path of the sandbox may be one of the host's: to touch it is to wait for this very thread.
    pub fn any(&self) -> bool {
        !self.lock().is_empty()
    }

    /// Lets go of all of them: whoever uses one gets errors.
    pub async fn close(&self) {
        let all: Vec<Mount> = self.lock().drain().map(|(_, mount)| mount).collect();
        for mount in all {
            mount.keeping.abort();
            mount.keeping.await.ok();
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PathBuf, Mount>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn mount(path: &Path, start: &MountStart) -> Result<std::os::fd::OwnedFd, Status> {
    if path == Path::new("/") {
        return Err(Status::invalid_argument("the root cannot be covered"));
    }
    fs::create_dir_all(path).map_err(|error| failed("cannot make", path, &error))?;
    device::mount(path, start.read_only).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Status::failed_precondition("the guest's kernel has no FUSE"),
        _ => failed("cannot mount on", path, &error),
    })
}
