//! Templates: a guest booted up to its agent once, whose memory and device state every later VM starts from.
//!
//! ```text
//! templates/<key>/memory   guest memory, sparse
//! templates/<key>/state    device state, as QEMU's migration stream
//! ```
//! The guest is halted with its agent waiting for a host, no disk mounted and no command run, so that nothing of one
//! sandbox is in it and every clone begins with a fresh connection.

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use heyvm_agent_protocol::v1::{MetricsRequest, WarmUpRequest};
use heyvm_jail::egress::Egress;
use nix::sys::stat::fstat;
use sha2::{Digest, Sha256};
use tokio::io::AsyncReadExt;
use tonic::Code;

use self::files::Started;
use super::{
    accel::Acceleration,
    blocking, console,
    launch::{Descriptors, Host},
    machine::{MACHINE_VERSION, Machine, Start, fd},
    memory,
    qmp::{Ended, Qmp},
    record::{Place, VmDir},
};
use crate::{AgentConnection, Error, VmSpec, agent::unreachable_agent};

mod files;
mod host;

/// Between a template's key and its maker's process id and start time, in the name of one in the making.
pub const MAKING: &str = ".making-";
/// Booting takes some six seconds under translation on an idle machine.
pub const BOOT_DEADLINE: Duration = Duration::from_secs(180);
/// What of the image runs in the warm-up takes a second or two.
const WARM_UP_DEADLINE: Duration = Duration::from_secs(90);
/// Longest that a whole build takes.
pub const BUILD_DEADLINE: Duration =
    Duration::from_secs(BOOT_DEADLINE.as_secs() + WARM_UP_DEADLINE.as_secs() + SAVE_DEADLINE.as_secs());
/// A state is some hundred kilobytes, written to the disk.
const SAVE_DEADLINE: Duration = Duration::from_secs(60);
/// What a guest's kernel may count time with; others (`refined-jiffies`) lose time whenever the host is busy.
const GOOD_CLOCKS: [&str; 2] = ["tsc", "kvm-clock"];
/// Boots that are tried for one with a good clock.
const CLOCK_TRIES: u32 = 3;
/// The agent has noticed the host's leave, and is waiting again, after this.
const SETTLE: Duration = Duration::from_millis(300);
/// Largest device state we take from a guest's QEMU, in bytes.
const MAX_STATE: u64 = 64 << 20;

/// What a template depends on, beside the host's own parts.
#[derive(Debug, Clone)]
pub struct Recipe {
    machine: Machine,
    kernel: heyvm_images::Kernel,
    image: heyvm_images::Image,
}

impl Recipe {
    /// The recipe for VMs like `spec`.
    pub fn new(spec: &VmSpec, acceleration: Acceleration, network: bool) -> Self {
        let machine = Machine {
            acceleration,
            memory_mib: spec.memory_mib,
            processors: spec.cpu_millis.div_ceil(1000).max(1),
            network,
            start: Start::Boot,
        };
        Self { machine, kernel: spec.kernel.clone(), image: spec.image.clone() }
    }

    /// What runs the guest's code.
    pub fn acceleration(&self) -> Acceleration {
        self.machine.acceleration
    }

    /// The machine of a clone.
    pub fn clone_machine(&self) -> Machine {
        Machine { start: Start::Resume, ..self.machine.clone() }
    }

    /// The machine of a VM that boots its kernel.
    pub fn boot_machine(&self) -> Machine {
        self.machine.clone()
    }

    /// Memory for a VM that boots its kernel.
    pub fn empty_memory(&self) -> Result<File, Error> {
        let bytes = u64::from(self.machine.memory_mib) << 20;
        memory::create(bytes).map_err(Error::io("making guest memory for", &self.kernel.vmlinuz))
    }

    /// The descriptors of a VM that boots its kernel, without disk and network.
    pub fn boot_descriptors(&self, guest_memory: &File) -> Result<Descriptors, Error> {
        let mut descriptors = files::image_descriptors(&self.image.rootfs)?;
        let memory = guest_memory.try_clone().map_err(Error::io("passing guest memory to", &self.kernel.vmlinuz))?;
        descriptors.add(fd::MEMORY, memory);
        descriptors.add(fd::KERNEL, files::open(&self.kernel.vmlinuz)?);
        descriptors.add(fd::INITRAMFS, files::open(&self.kernel.initramfs)?);
        Ok(descriptors)
    }

    /// The same for the same inputs alone.
    pub fn key(&self, host: &Host) -> String {
        let machine = format!("{:?} {MACHINE_VERSION} {}", self.machine, host::processor_model());
        let mut hash = Sha256::new();
        // The same manifest may have been made into another root file by another version of ours.
        let root = self.image.root_digest.as_deref().unwrap_or_default();
        for part in [&machine, &self.kernel.digest, &self.image.digest, root, &host.root.digest] {
            hash.update(part);
            hash.update([0]);
        }
        hex::encode(hash.finalize())[..24].to_owned()
    }
}

/// A template that is ready to be cloned. It stays whole for as long as a copy of this is kept, whatever is evicted.
#[derive(Clone)]
pub struct Template {
    /// What it is known by.
    pub key: String,
    memory: Arc<OwnedFd>,
    state: Arc<File>,
}

impl Template {
    /// Brings a template's memory from disk into sealed memory. Blocks while it is read.
    pub fn load(key: &str, home: &Path) -> Result<Self, Error> {
        let path = home.join("memory");
        let file = files::open(&path)?;
        let loaded = || {
            let bytes = file.metadata()?.len();
            let memory = memory::create(bytes)?;
            memory::copy_sparse(&file, &memory)?;
            memory::seal(&memory)?;
            Ok(memory)
        };
        let memory = loaded().map_err(Error::io("loading the template's memory", &path))?;
        let state = files::open(&home.join("state"))?;
        Ok(Self { key: key.to_owned(), memory: Arc::new(memory.into()), state: Arc::new(state) })
    }

    /// Whether any other copy of this is kept: a VM runs on its memory, or one is about to.
    pub fn is_in_use(&self) -> bool {
        Arc::strong_count(&self.memory) > 1
    }

    /// Whether both are copies of one.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.memory, &other.memory)
    }

    /// Bytes of memory it takes, as far as that is known.
    pub fn bytes(&self) -> u64 {
        fstat(&self.memory).map_or(0, |stat| u64::try_from(stat.st_blocks).unwrap_or(0) * 512)
    }

    /// The descriptors of a clone, without disk and network.
    pub fn descriptors(&self, rootfs: &Path) -> Result<Descriptors, Error> {
        let mut descriptors = files::image_descriptors(rootfs)?;
        let memory = self.memory.as_fd().try_clone_to_owned().map_err(Error::io("passing", "the template's memory"))?;
        descriptors.add(fd::MEMORY, memory);
        // Opened again: each clone reads it from its beginning, also where the file has been removed since.
        descriptors.add(fd::STATE, files::open(Path::new(&format!("/proc/self/fd/{}", self.state.as_raw_fd())))?);
        Ok(descriptors)
    }
}

/// Builds again when the guest's kernel does not count time with a good clock: all clones would have that one.
pub async fn build_with_a_good_clock<'a>(build: impl Fn() -> Build<'a>) -> Result<(), Error> {
    for _ in 1..CLOCK_TRIES {
        match build().run().await {
            Err(Error::GuestClock(source)) => tracing::warn!(source, "a template's clock is bad: it is built again"),
            done => return done,
        }
    }
    build().run().await
}

/// One template to be made.
pub struct Build<'a> {
    /// Where QEMU runs.
    pub host: &'a Arc<Host>,
    /// Its way out, where it has one.
    pub egress: Option<&'a Arc<Egress>>,
    /// What it is made from.
    pub recipe: &'a Recipe,
    /// Directory that is there once it is whole.
    pub home: &'a Path,
    /// Network slot meanwhile.
    pub slot: u32,
}

impl Build<'_> {
    /// Boots it and keeps it; on an error nothing of it is left.
    pub async fn run(self) -> Result<(), Error> {
        let name = blocking({
            let home = self.home.to_owned();
            move || files::prepare(&home)
        })
        .await?;
        let dir = VmDir::new(self.home.parent().unwrap_or(Path::new("/")), &name);
        let built = self.boot_and_keep(&dir, &name).await;
        let home = self.home.to_owned();
        blocking(move || files::finish(built, &dir, &home)).await
    }

    async fn boot_and_keep(&self, dir: &VmDir, name: &str) -> Result<(), Error> {
        let start = {
            let (host, egress, recipe) = (Arc::clone(self.host), self.egress.map(Arc::clone), self.recipe.clone());
            let (dir, name, slot) = (dir.clone(), name.to_owned(), self.slot);
            move || files::start(&host, egress.as_deref(), &recipe, &dir, &name, slot)
        };
        let Started { launched, guest_memory, listener } = blocking(start).await?;
        let qmp = Qmp::connect(&dir.qmp_socket()).await.map_err(|error| Error::Boot {
            what: format!("could not be started: {error}"),
            console_tail: launched.last_words(),
        })?;
        // The image's own programs run meanwhile: what they do to the guest must not hold up others for good.
        unless_ended(&qmp, boot(dir, &qmp)).await?;
        qmp.stop().await?;
        let half = dir.path().join("half");
        let saved = save_state(&qmp, listener, &half);
        tokio::time::timeout(SAVE_DEADLINE, saved)
            .await
            .unwrap_or_else(|_| Err(Error::Unreachable("the template's state was not saved in time".into())))?;
        let kept = dir.path().to_owned();
        blocking(move || files::save_memory(&guest_memory, &half, &kept)).await?;
        // It is killed in any case.
        qmp.quit().await.ok();
        Ok(())
    }
}

/// Waits for the agent, has it warm up, and leaves it waiting.
async fn boot(dir: &VmDir, qmp: &Qmp) -> Result<(), Error> {
    let agent = agent_of_booting(dir, qmp).await?;
    let late = |_| Error::Unreachable("the image's programs did not end in time".into());
    let mut client = agent.client().await?;
    let warm_up = tokio::time::timeout(WARM_UP_DEADLINE, client.warm_up(WarmUpRequest {})).await.map_err(late)?;
    let warm = warm_up.map_err(|status| unreachable_agent(&status))?;
    drop(client);
    drop(agent);
    let source = warm.into_inner().clock_source;
    if !GOOD_CLOCKS.contains(&source.as_str()) {
        return Err(Error::GuestClock(source.chars().filter(|c| !c.is_control()).take(40).collect()));
    }
    tokio::time::sleep(SETTLE).await;
    Ok(())
}

/// Waits until the agent of a guest that boots answers, or the guest has ended.
pub async fn agent_has_come_up(dir: &VmDir, qmp: &Qmp) -> Result<AgentConnection, Error> {
    unless_ended(qmp, agent_of_booting(dir, qmp)).await
}

/// Does something with a guest that boots; its end is the error that is worth telling. The console is read after
/// `work` is dropped, never beside it.
async fn unless_ended<T>(qmp: &Qmp, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let ended = tokio::select! {
        done = work => return done,
        ended = qmp.guest_ended() => ended,
    };
    let what = match ended {
        None => "ended while it booted: QEMU went away",
        Some(Ended::Unrunnable) => "ended while it booted: KVM could not run it",
        Some(Ended::Shutdown | Ended::Panicked | Ended::Halted) => "ended while it booted",
    };
    Err(Error::Boot { what: what.into(), console_tail: console::tail(qmp).await })
}

async fn agent_of_booting(dir: &VmDir, qmp: &Qmp) -> Result<AgentConnection, Error> {
    let give_up = Instant::now() + BOOT_DEADLINE;
    loop {
        let agent = AgentConnection::new(Place::new(dir.clone()));
        let answer = async {
            match agent.client().await?.metrics(MetricsRequest {}).await {
                // It answers that it has not become a sandbox yet: that is an answer.
                Err(status) if status.code() == Code::FailedPrecondition => Ok(()),
                other => other.map(drop).map_err(|status| unreachable_agent(&status)),
            }
        };
        match answer.await {
            Ok(()) => return Ok(agent),
            Err(_) if Instant::now() < give_up => tokio::time::sleep(Duration::from_millis(100)).await,
            Err(error) => {
                let what = format!("did not get as far as its agent ({error})");
                return Err(Error::Boot { what, console_tail: console::tail(qmp).await });
            }
        }
    }
}

/// QEMU sends its state to a socket of ours; it may neither open files nor start programs.
async fn save_state(qmp: &Qmp, listener: std::os::unix::net::UnixListener, path: &Path) -> Result<(), Error> {
    let io = |source| Error::Io { doing: "saving the template's state", path: path.to_owned(), source };
    listener.set_nonblocking(true).map_err(io)?;
    let listener = tokio::net::UnixListener::from_std(listener).map_err(io)?;
    let receive = async {
        let (stream, _) = listener.accept().await?;
        let mut state = Vec::new();
        stream.take(MAX_STATE).read_to_end(&mut state).await?;
        let path = path.to_owned();
        tokio::task::spawn_blocking(move || files::save_state(&path, &state)).await.map_err(std::io::Error::other)?
    };
    let uri = format!("unix:{}/{}", heyvm_jail::launcher::DESCRIPTORS_DIR, fd::STATE);
    tokio::try_join!(async { receive.await.map_err(io) }, qmp.save(uri)).map(drop)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use heyvm_images::{Image, Kernel};
    use heyvm_jail::{cgroup::Cgroups, root::QemuRoot};

    use super::*;
    use crate::qemu::launch::Uids;

    #[test]
    fn a_template_belongs_to_the_root_files_bytes() {
        let (empty, program) = (PathBuf::new(), PathBuf::from("/usr/bin/qemu"));
        let root =
            QemuRoot { dir: empty.clone(), program, firmware: empty.clone(), version: "7".into(), digest: "q".into() };
        let uids = Uids::new(Path::new("/"));
        let host = Host { launcher: empty.clone(), root, uids, cgroups: Cgroups::default() };
        let key = |root_digest: Option<&str>| {
            let image = Image {
                name: "box".into(),
                digest: "sha256:m".into(),
                root_digest: root_digest.map(str::to_owned),
                rootfs: "/root.erofs".into(),
                size_bytes: 1,
                config: Default::default(),
                created_at: 0,
                source: "registry".into(),
                private: false,
                recipe: None,
            };
            let kernel =
                Kernel { version: "6".into(), vmlinuz: empty.clone(), initramfs: empty.clone(), digest: "k".into() };
            let spec = VmSpec {
                kernel,
                image,
                memory_mib: 512,
                cpu_millis: 250,
                disk_gib: 5,
                hostname: "box".into(),
                env: Vec::new(),
                working_dir: String::new(),
                user: String::new(),
                certificates: String::new(),
                rehearsal: None,
            };
            Recipe::new(&spec, Acceleration::Tcg, true).key(&host)
        };
        assert_eq!(key(Some("sha256:a")), key(Some("sha256:a")));
        assert_ne!(key(Some("sha256:a")), key(Some("sha256:b")));
        assert_ne!(key(Some("sha256:a")), key(None));
    }
}
