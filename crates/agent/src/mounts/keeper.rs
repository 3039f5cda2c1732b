//! Keeps one mount: passes requests to whichever host is there, and knows what to do when none is.
//!
//! ```text
//!            a host comes                      its call ends
//!   away ───────────────────▶ there ────────────────────────────▶ away
//!    │  what waits is passed on        what was passed on and may be repeated waits, the rest is EIO
//!    └── PATIENCE later: ENOTCONN for all that waits and comes, until a host is there
//! ```

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use heyvm_agent_protocol::v1::{MountInput, MountOutput};
use nix::errno::Errno;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tonic::{Status, Streaming};

use super::{
    Host,
    device::{self, Device},
    request::{self, Request},
};
use crate::console;

/// A host that has gone is waited for this long: another daemon comes within seconds.
const PATIENCE: Duration = Duration::from_secs(30);
/// Requests that wait for an answer, and their bytes; the others wait in the kernel.
const MAX_WAITING: usize = 64;
const MAX_BYTES: usize = 16 << 20;

type Outbox = mpsc::Sender<Result<MountOutput, Status>>;

/// What waits for an answer, in the order of its coming.
#[derive(Default)]
struct Waiting {
    all: BTreeMap<u64, Request>,
    bytes: usize,
}

impl Waiting {
    fn has_room(&self) -> bool {
        self.all.len() < MAX_WAITING && self.bytes < MAX_BYTES
    }

    fn add(&mut self, request: Request) {
        self.bytes += request.bytes.len();
        self.all.insert(request.unique, request);
    }

    fn remove(&mut self, unique: u64) -> Option<Request> {
        let request = self.all.remove(&unique)?;
        self.bytes -= request.bytes.len();
        Some(request)
    }

    /// Answers those that are meant with an error.
    fn refuse(&mut self, device: &Device, errno: Errno, meant: impl Fn(&Request) -> bool) {
        let refused: Vec<u64> = self.all.values().filter(|request| meant(request)).map(|r| r.unique).collect();
        for unique in refused {
            if let Some(request) = self.remove(unique) {
                device.answer(&request.refusal(errno));
            }
        }
    }
}

/// Until what is mounted at `path` is unmounted, or nobody sends hosts any more.
pub async fn keep(path: PathBuf, mut device: Device, mut hosts: mpsc::Receiver<Host>) {
    let mut waiting = Waiting::default();
    let (mut outbox, mut inbox): (Option<Outbox>, Option<Streaming<MountInput>>) = (None, None);
    let mut gives_up_at = Instant::now() + PATIENCE;
    let mut has_given_up = false;
    loop {
        tokio::select! {
            host = hosts.recv() => {
                let Some(Host { requests, answers }) = host else { return };
                if outbox.is_some() {
                    waiting.refuse(&device, Errno::EIO, |request| !request.may_be_repeated());
                }
                has_given_up = false;
                // All of them may be made again; the host takes them at its own pace, and its answers meanwhile.
                tokio::spawn(pass_on_all(requests.clone(), waiting.all.values().cloned().collect()));
                (outbox, inbox) = (Some(requests), Some(answers));
            }
            answer = next_answer(&mut inbox) => match answer {
                Some(answer) => {
                    if let Some(unique) = request::answered(&answer.answer) {
                        device.answer(&answer.answer);
                        if waiting.remove(unique).is_some_and(|request| request.is_the_first()) {
                            device::read_ahead(&path);
                        }
                    }
                }
                None => {
                    (outbox, inbox) = (None, None);
                    gives_up_at = Instant::now() + PATIENCE;
                    waiting.refuse(&device, Errno::EIO, |request| !request.may_be_repeated());
                }
            },
            request = next_request(&mut device, outbox.as_ref()), if waiting.has_room() => match request {
                Ok(Some(request)) if !request.is_answered() => {}
                Ok(Some(request)) if has_given_up && !request.is_the_first() => {
                    device.answer(&request.refusal(Errno::ENOTCONN));
                }
                Ok(Some(request)) => waiting.add(request),
                Ok(None) => return,
                Err(error) => {
                    console::say(format_args!("a mount has ended: {error}"));
                    return;
                }
            },
            () = sleep_until(gives_up_at), if outbox.is_none() && !has_given_up => {
                has_given_up = true;
                waiting.refuse(&device, Errno::ENOTCONN, |request| !request.is_the_first());
            }
        }
    }
}

async fn pass_on_all(outbox: Outbox, requests: Vec<Request>) {
    for request in requests {
        if outbox.send(Ok(MountOutput { request: request.bytes })).await.is_err() {
            return;
        }
    }
}

/// The next request, already on its way to the host where there is one.
async fn next_request(device: &mut Device, outbox: Option<&Outbox>) -> std::io::Result<Option<Request>> {
    loop {
        let room = match outbox {
            Some(outbox) => match outbox.reserve().await {
                Ok(room) => Some(room),
                // The host has gone, which its answers tell, too.
                Err(_) => std::future::pending().await,
            },
            None => None,
        };
        let Some(bytes) = device.next().await? else { return Ok(None) };
        let Some(request) = Request::of(bytes) else { continue };
        if let Some(room) = room {
            room.send(Ok(MountOutput { request: request.bytes.clone() }));
        }
        return Ok(Some(request));
    }
}

/// `None` when the host's call has ended; never without a host.
async fn next_answer(inbox: &mut Option<Streaming<MountInput>>) -> Option<MountInput> {
    match inbox {
        Some(answers) => answers.message().await.ok().flatten(),
        None => std::future::pending().await,
    }
}
