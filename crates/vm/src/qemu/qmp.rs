//! QEMU's control protocol: the few commands the driver needs, and the news that a guest has ended.
//! Protocol: QEMU Machine Protocol, as the `qapi` crate speaks it.

use std::{
    io,
    path::Path,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::StreamExt;
use qapi::{
    Command,
    futures::{QapiService, QmpStreamTokio},
    qmp,
};
use tokio::{
    io::{AsyncRead, ReadBuf, WriteHalf, split},
    net::UnixStream,
    sync::watch,
    task::JoinHandle,
};

use crate::{Error, agent};

/// A QEMU that does not answer a command for this long is stuck.
const COMMAND_DEADLINE: Duration = Duration::from_secs(20);
/// Longest line of QEMU's, in bytes; what is asked for here is some kilobytes, the console 32 of them.
const MAX_LINE: usize = 1 << 20;
/// Pause between two looks at a running migration.
const MIGRATION_POLL: Duration = Duration::from_millis(1);

/// What is known of the guest's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestState {
    /// It runs, or is about to.
    Alive,
    /// It powered off, reset itself or panicked; QEMU waits for us.
    Ended,
    /// QEMU closed the connection.
    Disconnected,
}

/// A connection to one QEMU; there is room for one at a time.
pub struct Qmp {
    service: QapiService<QmpStreamTokio<WriteHalf<UnixStream>>>,
    guest: watch::Receiver<GuestState>,
    listening: JoinHandle<()>,
}

impl Drop for Qmp {
    fn drop(&mut self) {
        // It holds one half of the connection: without this QEMU would have no room for the next one.
        self.listening.abort();
    }
}

impl Qmp {
    /// Connects to the control socket.
    pub async fn connect(socket: &Path) -> Result<Self, Error> {
        let io = |source| Error::Io { doing: "connecting to QEMU's control socket", path: socket.to_owned(), source };
        let (read, write) = split(agent::connect(socket).await.map_err(io)?);
        let stream = deadline("qmp_capabilities", async {
            QmpStreamTokio::open_split(Lines::new(read), write).await.map_err(io)?.negotiate().await.map_err(io)
        })
        .await?;
        let (service, mut events) = stream.into_parts();
        let (say, guest) = watch::channel(GuestState::Alive);
        let listening = tokio::spawn(async move {
            while let Some(Ok(event)) = events.next().await {
                if matches!(event, qmp::Event::SHUTDOWN { .. } | qmp::Event::GUEST_PANICKED { .. }) {
                    say.send_replace(GuestState::Ended);
                }
            }
            say.send_if_modified(|state| std::mem::replace(state, GuestState::Disconnected) == GuestState::Alive);
        });
        Ok(Self { service, guest, listening })
    }

    /// Resolves when the guest has ended or QEMU has gone.
    pub async fn guest_ended(&self) -> GuestState {
        let mut guest = self.guest.clone();
        match guest.wait_for(|state| *state != GuestState::Alive).await {
            Ok(state) => *state,
            Err(_) => GuestState::Disconnected,
        }
    }

    /// Whether the guest has ended before we connected.
    pub async fn has_ended(&self) -> Result<bool, Error> {
        use qmp::RunState;
        let status = self.run("query-status", qmp::query_status {}).await?.status;
        Ok(matches!(status, RunState::shutdown | RunState::guest_panicked | RunState::internal_error))
    }

    /// The last output of the guest's console.
    pub async fn console(&self, bytes: u32) -> Result<String, Error> {
        let command = qmp::ringbuf_read { device: "console".into(), size: i64::from(bytes), format: None };
        self.run("ringbuf-read", command).await
    }

    /// Halts the processors.
    pub async fn stop(&self) -> Result<(), Error> {
        self.run("stop", qmp::stop {}).await.map(drop)
    }

    /// Sends the device state to where `uri` says and waits until it is there. Memory is left out: it is in its file.
    pub async fn save(&self, uri: String) -> Result<(), Error> {
        self.ignore_shared_memory().await?;
        let command = qmp::migrate { uri: Some(uri), channels: None, detach: None, resume: None };
        self.run("migrate", command).await?;
        self.migrated().await
    }

    /// Takes the device state from where `uri` says and waits until the guest runs.
    pub async fn resume(&self, uri: String) -> Result<(), Error> {
        self.ignore_shared_memory().await?;
        let command = qmp::migrate_incoming { uri: Some(uri), channels: None, exit_on_error: None };
        self.run("migrate-incoming", command).await?;
        self.migrated().await?;
        // The template was halted when its state was saved, so the clone is.
        self.run("cont", qmp::cont {}).await.map(drop)
    }

    async fn ignore_shared_memory(&self) -> Result<(), Error> {
        let ignore =
            qmp::MigrationCapabilityStatus { capability: qmp::MigrationCapability::x_ignore_shared, state: true };
        let command = qmp::migrate_set_capabilities { capabilities: vec![ignore] };
        self.run("migrate-set-capabilities", command).await.map(drop)
    }

    async fn migrated(&self) -> Result<(), Error> {
        loop {
            use qmp::MigrationStatus;
            let info = self.run("query-migrate", qmp::query_migrate {}).await?;
            match info.status {
                Some(MigrationStatus::completed) => return Ok(()),
                Some(MigrationStatus::failed | MigrationStatus::cancelled) => {
                    let message = info.error_desc.unwrap_or_else(|| "the machine's state did not come through".into());
                    return Err(Error::Qmp { command: "migrate", message });
                }
                _ => tokio::time::sleep(MIGRATION_POLL).await,
            }
        }
    }

    /// Makes the disk larger; the guest sees it at once.
    pub async fn grow_disk(&self, bytes: u64) -> Result<(), Error> {
        let size = i64::try_from(bytes).unwrap_or(i64::MAX);
        let command = qmp::block_resize { device: None, node_name: Some("disk".into()), size };
        self.run("block_resize", command).await.map(drop)
    }

    /// Ends QEMU.
    pub async fn quit(&self) -> Result<(), Error> {
        self.run("quit", qmp::quit {}).await.map(drop)
    }

    async fn run<C: qmp::QmpCommand>(&self, name: &'static str, command: C) -> Result<<C as Command>::Ok, Error> {
        deadline(name, async {
            self.service
                .execute(command)
                .await
                .map_err(|error| Error::Qmp { command: name, message: error.to_string() })
        })
        .await
    }
}

/// What QEMU says, which is lines, and read into memory line by line: a QEMU that a guest has taken over must not fill it.
struct Lines<R> {
    from: R,
    since_last_line: usize,
}

impl<R> Lines<R> {
    fn new(from: R) -> Self {
        Self { from, since_last_line: 0 }
    }
}

impl<R: AsyncRead + Unpin> AsyncRead for Lines<R> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.from).poll_read(cx, buffer))?;
        let new = &buffer.filled()[before..];
        self.since_last_line = match new.iter().rposition(|byte| *byte == b'\n') {
            Some(end) => new.len() - end - 1,
            None => self.since_last_line + new.len(),
        };
        if self.since_last_line > MAX_LINE {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "QEMU says more than a line may hold")));
        }
        Poll::Ready(Ok(()))
    }
}

async fn deadline<T>(command: &'static str, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    tokio::time::timeout(COMMAND_DEADLINE, work)
        .await
        .unwrap_or_else(|_| Err(Error::Qmp { command, message: "no answer in time".into() }))
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn one_that_is_dropped_makes_room_for_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let mut qemu = tokio::process::Command::new("qemu-system-x86_64");
        qemu.args(["-M", "none", "-nodefaults", "-nographic", "-qmp"]);
        qemu.arg(format!("unix:{},server=on,wait=off", socket.display())).kill_on_drop(true);
        let mut qemu = qemu.spawn().unwrap();
        let first = loop {
            match Qmp::connect(&socket).await {
                Ok(qmp) => break qmp,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        assert!(!first.has_ended().await.unwrap());
        drop(first);
        let second = Qmp::connect(&socket).await.unwrap();
        second.quit().await.unwrap();
        assert!(qemu.wait().await.unwrap().success());
    }

    #[tokio::test]
    async fn a_line_has_an_end() {
        let mut good = Vec::new();
        let lines = [b"x".repeat(MAX_LINE / 2), b"\n".to_vec()].concat().repeat(4);
        Lines::new(&lines[..]).read_to_end(&mut good).await.unwrap();
        assert_eq!(good.len(), lines.len());
        let endless = b"x".repeat(MAX_LINE + 1);
        assert!(Lines::new(&endless[..]).read_to_end(&mut Vec::new()).await.is_err());
    }
}
