//! Keeps the warm pool as [`super::pool`] decides: one task of the daemon makes and terminates its VMs, one at a time.

use std::{
    fs,
    panic::AssertUnwindSafe,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use futures::FutureExt;

use super::{
    QemuDriver,
    clone::Becoming,
    pool::{self, Kind, Memory, Next},
    rehearsal::rehearse,
    running::Watched,
};
use crate::{Driver, Error, Rehearsal, VmSpec};

/// A command and a program of the image, which is ended before this.
const WARM_UP_DEADLINE: Duration = Duration::from_secs(60);
/// Shares of the host's memory that are left free: for more pooled VMs to be made, and for any to be kept.
const PLENTY: u64 = 4;
const SCARCE: u64 = 10;

/// Runs for as long as the driver is there.
pub fn spawn(driver: Weak<QemuDriver>) {
    tokio::spawn(async move {
        while let Some(now) = driver.upgrade() {
            if AssertUnwindSafe(step(now)).catch_unwind().await.is_err() {
                tracing::error!("keeping the warm pool panicked");
                tokio::time::sleep(Duration::from_secs(10)).await;
            }
        }
    });
}

async fn step(driver: Arc<QemuDriver>) {
    let making = driver.making.lock().await;
    match driver.pool.next(Instant::now(), memory()) {
        Next::Make(kind, spec) => driver.make(&kind, &spec).await,
        Next::Evict(vm) => driver.discard(&vm).await,
        Next::Wait(duration) => {
            drop(making);
            // The driver may go while nothing is to be done.
            let pool = Arc::clone(&driver.pool);
            drop(driver);
            tokio::time::timeout(duration, pool.changed()).await.ok();
        }
    }
}

impl QemuDriver {
    async fn make(&self, kind: &Kind, spec: &VmSpec) {
        match self.make_pooled(spec, kind.rehearsal).await {
            Ok(vm) => {
                if let Err(vm) = self.pool.add(kind, vm) {
                    self.discard(&vm).await;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "no VM could be made for the warm pool");
                self.pool.back_off(kind, Instant::now());
            }
        }
    }

    /// A VM that has warmed up and is halted: it costs memory, and no processor time.
    async fn make_pooled(&self, spec: &VmSpec, rehearsal: Option<Rehearsal>) -> Result<Arc<Watched>, Error> {
        let id = pool::new_id();
        let made = async {
            self.make_disk(&id, spec).await?;
            let vm = self.begin(&id, spec, Becoming::Reserve).await?;
            tokio::time::timeout(WARM_UP_DEADLINE, rehearse(&vm, rehearsal))
                .await
                .unwrap_or_else(|_| Err(Error::Unreachable("its warm-up did not end in time".into())))?;
            vm.pause().await?;
            Ok(vm)
        };
        let made = made.await;
        if made.is_err() {
            self.destroy(&id).await.ok();
        }
        made
    }
}

/// What is made for the pool: nothing of the sandbox that was asked for, whose environment may hold secrets.
pub fn nobodys(spec: VmSpec) -> VmSpec {
    let env = spec.image.config.env.clone();
    VmSpec { env, hostname: "reserve".into(), working_dir: String::new(), user: String::new(), ..spec }
}

#[expect(clippy::disallowed_methods, reason = "a file in /proc: the kernel answers from memory")]
fn memory() -> Memory {
    judged(&fs::read_to_string("/proc/meminfo").unwrap_or_default())
}

/// A host that does not tell is treated as one that has enough for what there is.
fn judged(meminfo: &str) -> Memory {
    let kib = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_ascii_whitespace().next()?.parse::<u64>().ok()
    };
    match (kib("MemTotal:"), kib("MemAvailable:")) {
        (Some(total), Some(available)) if available >= total / PLENTY => Memory::Plenty,
        (Some(total), Some(available)) if available < total / SCARCE => Memory::Scarce,
        _ => Memory::Enough,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_judged_by_its_share() {
        let text = |available: u64| format!("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: {available} kB\n");
        assert_eq!([300, 200, 50].map(|kib| judged(&text(kib))), [Memory::Plenty, Memory::Enough, Memory::Scarce]);
        assert_eq!(judged(""), Memory::Enough);
    }
}
