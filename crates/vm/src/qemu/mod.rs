//! The QEMU driver: every VM is a clone of a template, in a jail.
//!
//! - [`machine`]: QEMU's command line.  [`launch`]: one confined QEMU.  [`qmp`]: its control protocol.
//! - [`template`]: booted once, cloned ever after.  [`memory`]: sealed guest memory.  [`disk`]: sparse ext4 disks.
//! - [`accel`]: KVM or translation.  [`record`]: what stands in a VM's directory.  [`running`]: a VM that runs.
//! - [`doctor`]: whether this host can do it.

pub mod accel;
mod console;
mod disk;
mod doctor;
mod launch;
mod machine;
mod memory;
mod qmp;
mod record;
mod running;
mod template;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use heyvm_agent_protocol::v1::{EnvVar, Network, PersonalizeRequest};
use heyvm_jail::{
    cgroup::Cgroups,
    egress::{self, Egress, EgressSettings},
    process::host_boot_id,
    root,
};
use rand::{Rng, RngCore};
use tokio::sync::OnceCell;

use self::{
    accel::Verdict,
    launch::{Host, Launch, Launched, launch, tap},
    machine::fd,
    qmp::Qmp,
    record::{Record, Slots, VmDir},
    running::{Belongings, RunningVm},
    template::{Recipe, Templates},
};
use crate::{Driver, Error, Exit, ExitCause, HostCheck, Progress, Vm, VmId, VmSpec, agent::unreachable_agent};

/// Bytes of fresh entropy that a clone gets before its first command.
const ENTROPY: usize = 64;

/// What the user may decide.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The `heyvm` program, which is also the jail's launcher and the egress holder.
    pub launcher: PathBuf,
    /// Whether guests have a network at all.
    pub network: bool,
    /// What guests may reach beyond the internet.
    pub egress: EgressSettings,
}

impl Default for Settings {
    fn default() -> Self {
        let launcher = std::env::current_exe().unwrap_or_else(|_| "heyvm".into());
        Self { launcher, network: true, egress: EgressSettings::default() }
    }
}

/// VMs on this machine.
pub struct QemuDriver {
    home: PathBuf,
    settings: Settings,
    host: OnceCell<Arc<Host>>,
    egress: OnceCell<Option<Arc<Egress>>>,
    verdict: OnceCell<Verdict>,
    templates: Templates,
    slots: Arc<Slots>,
}

impl QemuDriver {
    /// A driver with its files below `home`. What the host lacks shows at the first VM, or in `doctor`.
    pub async fn open(home: &Path, settings: Settings) -> Result<Arc<Self>, Error> {
        let sandboxes = home.join("sandboxes");
        fs::create_dir_all(&sandboxes).map_err(Error::io("making", &sandboxes))?;
        let driver = Self {
            templates: Templates::new(home.join("templates")),
            home: home.to_owned(),
            settings,
            host: OnceCell::new(),
            egress: OnceCell::new(),
            verdict: OnceCell::new(),
            slots: Arc::default(),
        };
        for id in driver.list().await? {
            let dir = driver.dir(&id);
            if let (Some(record), Some(process)) = (dir.record(), dir.process())
                && process.is_alive()
            {
                driver.slots.mark(record.slot);
            }
        }
        Ok(Arc::new(driver))
    }

    /// How guests run here, found out at the first call.
    pub async fn acceleration(&self, kernel: &heyvm_images::Kernel) -> Result<&Verdict, Error> {
        let host = self.host().await?;
        self.verdict
            .get_or_try_init(|| async {
                let (file, kernel) = (self.home.join("templates/acceleration.json"), kernel.clone());
                blocking(move || {
                    fs::create_dir_all(file.parent().unwrap_or(&file)).map_err(Error::io("making", &file))?;
                    accel::verdict(&file, &host.launcher, &host.root, &kernel)
                })
                .await
            })
            .await
    }

    async fn host(&self) -> Result<Arc<Host>, Error> {
        let make = || async {
            let (jails, launcher) = (self.home.join("jail"), self.settings.launcher.clone());
            blocking(move || Ok(Arc::new(Host { launcher, root: root::prepare(&jails)?, cgroups: Cgroups::detect() })))
                .await
        };
        self.host.get_or_try_init(make).await.cloned()
    }

    async fn egress(&self) -> Result<Option<Arc<Egress>>, Error> {
        let make = || async {
            if !self.settings.network {
                return Ok(None);
            }
            let (run, settings) = (self.home.join("run"), self.settings.clone());
            blocking(move || {
                fs::create_dir_all(&run).map_err(Error::io("making", &run))?;
                Ok(Some(Arc::new(Egress::ensure(&run, &settings.launcher, &settings.egress)?)))
            })
            .await
        };
        self.egress.get_or_try_init(make).await.cloned()
    }

    fn dir(&self, id: &VmId) -> VmDir {
        VmDir::new(&self.home.join("sandboxes"), id)
    }

    /// A clone of the right template on the disk that is there already.
    async fn clone_onto(&self, id: &VmId, spec: &VmSpec, progress: &Progress) -> Result<Arc<dyn Vm>, Error> {
        let (host, egress) = (self.host().await?, self.egress().await?);
        let acceleration = self.acceleration(&spec.kernel).await?.acceleration;
        let recipe = Recipe::new(spec, acceleration, egress.is_some());
        let template = self.templates.get(&host, egress.as_ref(), &self.slots, &recipe, progress).await?;
        let (slot, dir) = (self.slots.take(), self.dir(id));
        let start = {
            let (host, egress, dir, id, spec) =
                (Arc::clone(&host), egress.clone(), dir.clone(), id.clone(), spec.clone());
            move || -> Result<Launched, Error> {
                let mut descriptors = template.descriptors(&spec.image.rootfs)?;
                let disk = fs::File::options().read(true).write(true).open(dir.disk());
                descriptors.add(fd::DISK, disk.map_err(Error::io("opening the disk", dir.disk()))?);
                if let Some(tap) = tap(egress.as_deref(), slot)? {
                    descriptors.add(fd::TAP, tap);
                }
                let record = Record { slot, host_boot_id: host_boot_id() };
                let machine = recipe.clone_machine();
                launch(
                    &host,
                    Launch { name: &id, dir: &dir, record, machine, cpu_millis: spec.cpu_millis, descriptors },
                )
            }
        };
        let launched = blocking(start).await.inspect_err(|_| self.slots.give_back(slot))?;
        let process = launched.process;
        let belongings = Belongings { host: Arc::clone(&host), slots: Arc::clone(&self.slots), slot };
        let resumed = async {
            let qmp = Qmp::connect(&dir.qmp_socket()).await?;
            qmp.resume(format!("fd:{}", fd::STATE)).await?;
            Ok::<Qmp, Error>(qmp)
        };
        let vm = match resumed.await {
            Ok(qmp) => RunningVm::watch(id.clone(), dir, process, qmp, belongings),
            Err(error) => {
                process.kill().map_err(Error::io("ending QEMU of", id))?;
                self.slots.give_back(slot);
                let console_tail = launched.last_words();
                return Err(Error::Boot { what: format!("could not be resumed: {error}"), console_tail });
            }
        };
        let agent = vm.agent();
        let request = personalize_request(spec, slot, egress.is_some());
        let personalized =
            async { agent.client().await?.personalize(request).await.map_err(|s| unreachable_agent(&s)) };
        let failed = tokio::select! {
            answer = personalized => answer.err(),
            exit = vm.exited() => {
                let console_tail = [launched.last_words(), exit.console_tail].concat();
                Some(Error::Boot { what: "ended as it was resumed".into(), console_tail })
            }
        };
        match failed {
            None => Ok(vm),
            Some(error) => {
                process.kill().map_err(Error::io("ending QEMU of", id))?;
                vm.exited().await;
                Err(error)
            }
        }
    }
}

#[async_trait]
impl Driver for QemuDriver {
    async fn prepare(&self, spec: &VmSpec, progress: Progress) -> Result<(), Error> {
        let (host, egress) = (self.host().await?, self.egress().await?);
        let recipe = Recipe::new(spec, self.acceleration(&spec.kernel).await?.acceleration, egress.is_some());
        self.templates.get(&host, egress.as_ref(), &self.slots, &recipe, &progress).await.map(drop)
    }

    async fn create(&self, id: &VmId, spec: &VmSpec) -> Result<Arc<dyn Vm>, Error> {
        let (dir, seeds, gib) = (self.dir(id), self.home.join("templates"), spec.disk_gib);
        dir.make(false)?;
        let made = {
            let dir = dir.clone();
            blocking(move || disk::create(&seeds, &dir.disk(), gib)).await
        };
        let started = match made {
            Ok(()) => self.clone_onto(id, spec, &silent()).await,
            Err(error) => Err(error),
        };
        if started.is_err() {
            self.destroy(id).await?;
        }
        started
    }

    async fn start(&self, id: &VmId, spec: &VmSpec) -> Result<Arc<dyn Vm>, Error> {
        if let Some(running) = self.adopt(id).await? {
            return Ok(running);
        }
        self.clone_onto(id, spec, &silent()).await
    }

    async fn adopt(&self, id: &VmId) -> Result<Option<Arc<dyn Vm>>, Error> {
        let dir = self.dir(id);
        let (Some(record), Some(process)) = (dir.record(), dir.process()) else { return Ok(None) };
        if !process.is_alive() {
            return Ok(None);
        }
        let qmp = Qmp::connect(&dir.qmp_socket()).await;
        let ended = match &qmp {
            Ok(qmp) if !qmp.has_ended().await? => None,
            Ok(qmp) => Some(console::judge(qmp).await),
            Err(_) => Some(Exit { cause: ExitCause::Lost, console_tail: Vec::new() }),
        };
        let (Ok(qmp), None) = (qmp, &ended) else {
            dir.write_exit(&ended.unwrap_or(Exit { cause: ExitCause::Lost, console_tail: Vec::new() }))?;
            process.kill().map_err(Error::io("ending QEMU of", id))?;
            return Ok(None);
        };
        self.slots.mark(record.slot);
        // Existing taps keep their namespace alive; the daemon's own connection keeps its holder there.
        self.egress().await?;
        let belongings = Belongings { host: self.host().await?, slots: Arc::clone(&self.slots), slot: record.slot };
        let vm = RunningVm::watch(id.clone(), dir, process, qmp, belongings);
        if !vm.answers().await {
            process.kill().map_err(Error::io("ending QEMU of", id))?;
            vm.exited().await;
            return Ok(None);
        }
        Ok(Some(vm))
    }

    async fn post_mortem(&self, id: &VmId) -> Exit {
        let dir = self.dir(id);
        if let Some(exit) = dir.exit() {
            return exit;
        }
        let rebooted = dir.record().is_some_and(|record| record.host_boot_id != host_boot_id());
        Exit { cause: if rebooted { ExitCause::HostRestarted } else { ExitCause::Lost }, console_tail: Vec::new() }
    }

    async fn destroy(&self, id: &VmId) -> Result<(), Error> {
        let (dir, host, id) = (self.dir(id), self.host().await?, id.clone());
        let slots = Arc::clone(&self.slots);
        blocking(move || {
            if let Some(process) = dir.process() {
                process.kill().map_err(Error::io("ending QEMU of", &id))?;
                if let Some(record) = dir.record() {
                    slots.give_back(record.slot);
                }
            }
            host.cgroups.remove(&id)?;
            match fs::remove_dir_all(dir.path()) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("removing", dir.path())(error)),
                _ => Ok(()),
            }
        })
        .await
    }

    async fn list(&self) -> Result<Vec<VmId>, Error> {
        let sandboxes = self.home.join("sandboxes");
        let entries = fs::read_dir(&sandboxes).map_err(Error::io("listing", &sandboxes))?;
        Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
    }

    async fn doctor(&self) -> Vec<HostCheck> {
        doctor::examine(self).await
    }
}

fn personalize_request(spec: &VmSpec, slot: u32, network: bool) -> PersonalizeRequest {
    let mut random = rand::rng();
    let mut entropy = vec![0; ENTROPY];
    random.fill_bytes(&mut entropy);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let addresses = egress::addresses(slot);
    PersonalizeRequest {
        entropy,
        unix_time_ns: i64::try_from(now.as_nanos()).unwrap_or_default(),
        hostname: spec.hostname.clone(),
        machine_id: format!("{:032x}", random.random::<u128>()),
        boot_id: uuid_from(random.random()),
        network: network.then(|| Network {
            address: addresses.guest.to_string(),
            prefix: u32::from(addresses.prefix),
            gateway: addresses.gateway.to_string(),
            nameservers: vec![egress::RESOLVER.to_string()],
            mtu: egress::MTU,
        }),
        env: spec.env.iter().map(|(name, value)| EnvVar { name: name.clone(), value: value.clone() }).collect(),
        working_dir: spec.working_dir.clone(),
    }
}

/// A random (version 4) UUID, as the kernel's own boot id is one.
fn uuid_from(bits: u128) -> String {
    let bits = bits & !(0xf << 76) & !(0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let hex = format!("{bits:032x}");
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

fn silent() -> Progress {
    Arc::new(|_, _, _| {})
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.map_err(Error::task)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_ids_are_uuids() {
        assert_eq!(uuid_from(u128::MAX), "ffffffff-ffff-4fff-bfff-ffffffffffff");
        assert_eq!(uuid_from(0), "00000000-0000-4000-8000-000000000000");
    }
}
