//! Whether a sandbox's disk is full. Its agent is asked at each start and when one sandbox is looked at, never for a list:
//! a full disk shows in errors of everything else, and only here is said what to do.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use heyvm_agent_protocol::v1::{MetricsReply, MetricsRequest};
use heyvm_api::ApiError;
use heyvm_vm::AgentConnection;

use crate::{ControlPlane, Sandbox, supervised};

/// An agent answers within milliseconds. One that does not is not waited for: what was seen last stands.
const DEADLINE: Duration = Duration::from_millis(500);
/// Callers that poll do not wake a guest that rests more often than this.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// A disk with less than this free is full, or with less than a 256th of it.
const BYTES: u64 = 16 << 20;
const INODES: u64 = 64;

/// What was seen of one sandbox's disk.
#[derive(Debug, Default)]
pub(crate) struct DiskSpace(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    at: Option<Instant>,
    shortage: Option<Shortage>,
}

/// What there is too little of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shortage {
    Bytes { free: u64, total: u64 },
    Inodes { free: u64, total: u64 },
}

impl Shortage {
    fn of(metrics: &MetricsReply) -> Option<Self> {
        let is_short = |free: u64, total: u64, least: u64| total > 0 && free < least.min(total / 256);
        let (total, inodes) = (metrics.disk_total, metrics.inodes_total);
        let free = total.saturating_sub(metrics.disk_used);
        if is_short(free, total, BYTES) {
            return Some(Self::Bytes { free, total });
        }
        let free = metrics.inodes_free;
        // Agents of earlier versions say nothing of inodes.
        is_short(free, inodes, INODES).then_some(Self::Inodes { free, total: inodes })
    }

    /// A sentence, and what to do about it.
    fn note(self, sandbox: &str) -> String {
        let what = match self {
            Self::Bytes { free, total } => format!("its disk is full: {} of {} MiB are free", free >> 20, total >> 20),
            Self::Inodes { free, total } => {
                format!("its disk holds too many files: {free} of {total} inodes are free")
            }
        };
        format!(
            "{what}; remove files (`heyvm exec {sandbox} -- rm -r PATH`), or give it a larger disk \
             (`heyvm resize {sandbox} --disk-size-gb N`)"
        )
    }
}

impl DiskSpace {
    /// What to know of a disk that was full when it was last looked at.
    pub fn note(&self, sandbox: &str) -> Option<String> {
        self.seen().shortage.map(|shortage| shortage.note(sandbox))
    }

    /// A failure of a sandbox whose disk is full is most likely due to that.
    pub fn explain(&self, sandbox: &str, error: ApiError) -> ApiError {
        match self.note(sandbox) {
            Some(note) => error.hint(note),
            None => error,
        }
    }

    /// It is larger now.
    pub fn forget(&self) {
        *self.seen() = Seen::default();
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl ControlPlane {
    /// Asks the agent anew.
    pub(crate) async fn look_at_disk(&self, sandbox: &Sandbox, agent: &AgentConnection) {
        sandbox.disk.seen().at = Some(Instant::now());
        let asked = async { agent.client().await.ok()?.metrics(MetricsRequest {}).await.ok() };
        // A guest may have replaced its agent: neither its silence nor a panic over its answer is the caller's.
        let asked = supervised::run("looking at a disk", tokio::time::timeout(DEADLINE, asked)).await;
        if let Ok(Ok(Some(metrics))) = asked {
            sandbox.disk.seen().shortage = Shortage::of(metrics.get_ref());
        }
    }

    /// The same, where that was not done just now and can be done.
    pub(crate) async fn look_at_disk_again(&self, sandbox: &Arc<Sandbox>) {
        let is_fresh = sandbox.disk.seen().at.is_some_and(|at| at.elapsed() < LOOK_AGAIN);
        if let Some(vm) = sandbox.vm().filter(|_| !is_fresh && sandbox.is_reachable()) {
            self.look_at_disk(sandbox, &vm.agent()).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(disk: (u64, u64), inodes: (u64, u64)) -> MetricsReply {
        let (disk_total, disk_used, inodes_total, inodes_free) = (disk.1, disk.1 - disk.0, inodes.1, inodes.0);
        MetricsReply { disk_total, disk_used, inodes_total, inodes_free, ..MetricsReply::default() }
    }

    #[test]
    fn disk_is_full_without_bytes_or_without_inodes() {
        const GIB: u64 = 1 << 30;
        for (disk, inodes, expected) in [
            ((0, GIB), (9000, 65_536), Some("0 of 1024 MiB")),
            ((3 << 20, GIB), (9000, 65_536), Some("3 of 1024 MiB")),
            ((5 << 20, GIB), (9000, 65_536), None),
            ((15 << 20, 100 * GIB), (9000, 65_536), Some("15 of 102400 MiB")),
            ((GIB / 2, GIB), (7, 65_536), Some("7 of 65536 inodes")),
            ((GIB / 2, GIB), (64, 65_536), None),
            // Of an agent that knows nothing of them, or could not look.
            ((GIB / 2, GIB), (0, 0), None),
            ((0, 0), (0, 0), None),
        ] {
            let note = Shortage::of(&metrics(disk, inodes)).map(|shortage| shortage.note("web"));
            assert_eq!(note.is_some(), expected.is_some(), "{disk:?} {inodes:?}: {note:?}");
            if let (Some(note), Some(part)) = (note, expected) {
                assert!(
                    note.contains(part) && note.contains("heyvm resize web") && note.contains("exec web"),
                    "{note}"
                );
            }
        }
    }

    #[test]
    fn failure_of_a_sandbox_with_a_full_disk_says_what_to_do() {
        let error = || ApiError::new(heyvm_api::ErrorCode::StartCommandFailed, "it ended").hint("look at its log");
        let disk = DiskSpace::default();
        assert_eq!(disk.explain("web", error()).hint.as_deref(), Some("look at its log"));
        disk.seen().shortage = Shortage::of(&metrics((0, 1 << 30), (0, 0)));
        assert!(disk.explain("web", error()).hint.unwrap().contains("heyvm resize web"));
    }
}
