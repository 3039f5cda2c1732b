//! A copy of a sandbox's disk to go back to: one at most, whole or not at all.
//!
//! A running guest's file system is frozen by its agent while the copy is made: it is complete on the disk then, and its
//! copy mounts as clean. The agent lets go by itself at a deadline, so that a guest whose daemon dies does not hang.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::Path,
    time::Duration,
};

use heyvm_agent_protocol::v1::{FreezeDiskRequest, ThawDiskRequest};

use super::{QemuDriver, blocking, memory::copy_sparse};
use crate::{AgentConnection, Error, VmId, agent::unreachable_agent};

/// A guest's writes wait no longer than this.
const STILL: Duration = Duration::from_secs(60);
/// What waits to be written is written in this time.
const FREEZING: Duration = Duration::from_secs(60);
/// An agent that answers at all lets go at once.
const THAWING: Duration = Duration::from_secs(10);

// linux/fs.h: the two files share their blocks until one of them is written to.
nix::ioctl_write_int!(clone_blocks, 0x94, 9);

impl QemuDriver {
    pub(super) async fn checkpoint_now(&self, id: &VmId, running: Option<AgentConnection>) -> Result<(), Error> {
        let dir = self.dir(id);
        let (disk, half, kept) = (dir.disk(), dir.half_checkpoint(), dir.checkpoint());
        let copying = {
            let half = half.clone();
            blocking(move || copy(&disk, &half))
        };
        let copied = match running {
            None => copying.await,
            Some(agent) => while_still(&agent, copying).await,
        };
        let done = match copied {
            Ok(()) => fs::rename(&half, &kept).map_err(Error::io("keeping the copy of the disk", &kept)),
            Err(error) => Err(error),
        };
        if done.is_err() {
            let _ = fs::remove_file(&half);
        }
        done
    }

    pub(super) async fn restore_now(&self, id: &VmId) -> Result<(), Error> {
        let dir = self.dir(id);
        blocking(move || {
            let (kept, half, disk) = (dir.checkpoint(), dir.half_checkpoint(), dir.disk());
            if !kept.exists() {
                return Err(Error::NoCheckpoint);
            }
            let done = copy(&kept, &half)
                .and_then(|()| fs::rename(&half, &disk).map_err(Error::io("putting the disk back", &disk)));
            if done.is_err() {
                let _ = fs::remove_file(&half);
            }
            done
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

/// A file with the same content, on the disk when this returns. What was left half-made there before is gone.
fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    let source = File::open(from).map_err(Error::io("opening", from))?;
    match fs::remove_file(to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::io("removing", to)(error)),
        _ => {}
    }
    // Read, too: it becomes a disk.
    let target = File::options().read(true).write(true).create_new(true).mode(0o600).open(to);
    let target = target.map_err(Error::io("making", to))?;
    // SAFETY: both are descriptors that we hold; no memory is touched.
    let shared = unsafe { clone_blocks(target.as_raw_fd(), source.as_raw_fd() as u64) };
    if shared.is_err() {
        copy_sparse(&source, &target).map_err(Error::io("copying the disk to", to))?;
    }
    target.sync_all().map_err(Error::io("writing", to))
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::fs::MetadataExt};

    use super::*;

    #[test]
    fn a_copy_has_the_same_content_and_size_and_costs_what_is_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, half) = (dir.path().join("disk"), dir.path().join("half"));
        let mut file = File::create(&disk).unwrap();
        file.write_all(&[7; 10_000]).unwrap();
        file.set_len(1 << 30).unwrap();
        fs::write(&half, "left by one that was killed").unwrap();
        copy(&disk, &half).unwrap();
        let meta = fs::metadata(&half).unwrap();
        assert_eq!((meta.len(), meta.mode() & 0o777), (1 << 30, 0o600));
        assert!(meta.blocks() * 512 < 1 << 20, "{}", meta.blocks());
        let mut begin = vec![0; 10_001];
        io::Read::read_exact(&mut File::open(&half).unwrap(), &mut begin).unwrap();
        assert!(begin[..10_000].iter().all(|byte| *byte == 7) && begin[10_000] == 0);
        assert!(copy(&dir.path().join("none"), &half).is_err());
    }
}
