//! A copy of a sandbox's disk to go back to: one at most, whole or not at all.
//!
//! A running guest's file system is frozen by its agent while the copy is made: it is complete on the disk then, and its
//! copy mounts as clean. The agent lets go by itself at a deadline, so that a guest whose daemon dies does not hang.

use std::{io, time::Duration};

use heyvm_agent_protocol::v1::{FreezeDiskRequest, ThawDiskRequest};

use super::{QemuDriver, blocking, disk};
use crate::{AgentConnection, Error, VmId, agent::unreachable_agent};

/// A guest's writes wait no longer than this.
const STILL: Duration = Duration::from_secs(60);
/// What waits to be written is written in this time.
const FREEZING: Duration = Duration::from_secs(60);
/// An agent that answers at all lets go at once.
const THAWING: Duration = Duration::from_secs(10);

impl QemuDriver {
    pub(super) async fn checkpoint_now(&self, id: &VmId, running: Option<AgentConnection>) -> Result<(), Error> {
        let dir = self.dir(id);
        let (disk, half, kept) = (dir.disk(), dir.half_checkpoint(), dir.checkpoint());
        let copying = {
            let half = half.clone();
            blocking(move || disk::copy(&disk, &half))
        };
        let copied = match running {
            None => copying.await,
            Some(agent) => while_still(&agent, copying).await,
        };
        blocking(move || disk::keep(copied, &half, &kept)).await
    }

    pub(super) async fn restore_now(&self, id: &VmId) -> Result<(), Error> {
        let dir = self.dir(id);
        blocking(move || {
            let (kept, half, disk) = (dir.checkpoint(), dir.half_checkpoint(), dir.disk());
            match disk::copy(&kept, &half) {
                Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Err(Error::NoCheckpoint),
                copied => disk::keep(copied, &half, &disk),
            }
        })
        .await
    }
}

/// Has the guest hold its disk still for as long as `copying` takes.
async fn while_still(agent: &AgentConnection, copying: impl Future<Output = Result<(), Error>>) -> Result<(), Error> {
    let mut client = agent.client().await?;
    let deadline_ms = STILL.as_millis() as u64;
    let frozen = tokio::time::timeout(FREEZING, client.freeze_disk(FreezeDiskRequest { deadline_ms })).await;
    frozen
        .map_err(|_| Error::Unreachable("its disk could not be held still".into()))?
        .map_err(|s| unreachable_agent(&s))?;
    let copied = copying.await;
    let thawed = tokio::time::timeout(THAWING, client.thaw_disk(ThawDiskRequest {})).await;
    copied?;
    match thawed {
        Ok(Ok(reply)) if reply.get_ref().was_frozen => Ok(()),
        Ok(Ok(_)) => Err(Error::TooSlow(STILL.as_secs())),
        Ok(Err(status)) => Err(unreachable_agent(&status)),
        Err(_) => Err(Error::Unreachable("its disk is held still no longer than a minute".into())),
    }
}
