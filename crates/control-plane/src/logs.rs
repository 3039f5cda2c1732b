//! What start commands print, kept on the host: `logs/<id>`, in records of a kind byte, a length, an offset and the bytes.
//! Kept apart from the sandbox's own directory, since it outlives the sandbox by a day.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
};

use bytes::Bytes;
use futures::stream::BoxStream;
use heyvm_api::ApiError;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use self::file::Reader;
pub(crate) use self::file::prepare;
use crate::{ControlPlane, Sandbox, Who, blocking::blocking, errors};

mod file;

/// A piece of what a start command printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogChunk {
    /// Whether it came on standard error.
    pub stderr: bool,
    /// The bytes.
    pub data: Bytes,
}

impl ControlPlane {
    fn log_path(&self, id: &str) -> PathBuf {
        self.config.home.join("logs").join(id)
    }

    /// From here on the log tells of another run of the start command.
    pub(crate) async fn begin_log(&self, sandbox: &Sandbox) {
        self.append_log(sandbox, false, 0, Vec::new()).await;
    }

    /// Adds what came on at `offset` of all that this run has printed. A log that cannot be written harms nothing but
    /// itself.
    pub(crate) async fn append_log(&self, sandbox: &Sandbox, stderr: bool, offset: u64, data: Vec<u8>) {
        let id = sandbox.record().id.clone();
        let (path, end) = (self.log_path(&id), offset.saturating_add(data.len() as u64));
        let turn = Arc::clone(&sandbox.log_turn).lock_owned().await;
        let appended = blocking(move || {
            let _turn = turn;
            file::append(&path, (stderr, offset), &data).map_err(|error| errors::io("writing the log", &error))
        });
        if let Err(error) = appended.await.flatten() {
            tracing::warn!(%error, id, "a log could not be written");
        }
        sandbox.log_offset.store(end, Ordering::Relaxed);
        sandbox.changed.send_replace(());
    }

    pub(crate) async fn remove_log(&self, id: &str) {
        let path = self.log_path(id);
        if let Err(error) = blocking(move || file::remove(&path)).await {
            tracing::warn!(%error, id, "a log could not be removed");
        }
    }

    /// The last lines of a sandbox's log.
    pub(crate) async fn log_tail(&self, id: &str) -> Vec<String> {
        let path = self.log_path(id);
        blocking(move || file::tail(path)).await.unwrap_or_default()
    }

    /// After a restart of the daemon the log says itself how far it goes.
    pub(crate) async fn resume_log(&self, sandbox: &Sandbox) {
        let path = self.log_path(&sandbox.record().id.clone());
        if let Ok(Some(reach)) = blocking(move || file::reach(path)).await {
            sandbox.log_offset.store(reach, Ordering::Relaxed);
        }
    }

    /// What the start command printed, kept until a day after the end of the sandbox; with `follow` until it ends.
    pub async fn logs(&self, who: &Who, follow: bool) -> Result<BoxStream<'static, io::Result<LogChunk>>, ApiError> {
        let sandbox = self.find(who)?;
        let reader = Reader::new(self.log_path(&sandbox.record().id.clone()));
        let mut changed = sandbox.changed.subscribe();
        let (sender, receiver) = mpsc::channel(16);
        let (mut reader, mut records) = read_on(reader).await.map_err(|error| errors::io("reading the log", &error))?;
        tokio::spawn(async move {
            loop {
                for (_, chunk) in records.drain(..) {
                    if sender.send(Ok(chunk)).await.is_err() {
                        return;
                    }
                }
                let living = sandbox.record().is_living();
                (reader, records) = match read_on(reader).await {
                    Ok(read) => read,
                    Err(error) => return drop(sender.send(Err(error)).await),
                };
                if !records.is_empty() {
                    continue;
                }
                if !follow || !living {
                    return;
                }
                tokio::select! {
                    ended = changed.changed() => if ended.is_err() { return },
                    () = sender.closed() => return,
                }
            }
        });
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }
}

async fn read_on(mut reader: Reader) -> io::Result<(Reader, Vec<(u64, LogChunk)>)> {
    let read = tokio::task::spawn_blocking(move || reader.read().map(|records| (reader, records)));
    read.await.map_err(io::Error::other)?
}
