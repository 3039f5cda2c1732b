//! A VM from a template: on a new disk, on a kept one, or out of the reserve.

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use heyvm_agent_protocol::v1::{EnvVar, Network, PersonalizeRequest};
use heyvm_jail::egress;
use rand::{Rng, RngCore};

use super::{
    QemuDriver,
    accel::Acceleration,
    blocking, disk,
    launch::{Launch, Launched, launch, tap},
    machine::fd,
    qmp::Qmp,
    record::{Place, Record},
    rehearsal::rehearse,
    reserve::{self, Kind},
    running::{Belongings, RunningVm, Watched},
    silent,
    template::{BOOT_DEADLINE, Recipe, agent_has_come_up},
};
use crate::{Error, Rehearsal, Vm, VmId, VmSpec, agent::unreachable_agent, clock};

/// Bytes of fresh entropy that a clone gets before its first command.
const ENTROPY: usize = 64;
/// Becoming one's own takes a tenth of a second; a guest that takes this long never will.
const PERSONALIZE_DEADLINE: Duration = Duration::from_secs(60);
/// A guest that has become a sandbox within this has the host's time, to within half of it.
const PROMPT: Duration = Duration::from_millis(60);
/// A clone is there within a tenth of a second; others wait for its turn to end.
const RESUME_DEADLINE: Duration = Duration::from_secs(60);
/// A command and a program of the image, which is ended before this.
const REHEARSAL_DEADLINE: Duration = Duration::from_secs(60);
/// The one who asked for the last sandbox wants the processor first.
const REFILL_DELAY: Duration = Duration::from_millis(400);

/// What a clone is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Becoming {
    /// Nobody's yet.
    Reserve,
    /// Somebody's; the file system on its disk grows to so many bytes, unless that is 0.
    Sandbox {
        /// Size of the disk.
        disk_bytes: u64,
    },
}

impl QemuDriver {
    pub(super) async fn recipe(&self, spec: &VmSpec) -> Result<Recipe, Error> {
        let acceleration = self.acceleration(&spec.kernel).await?.acceleration;
        Ok(Recipe::new(spec, acceleration, self.egress().await?.is_some()))
    }

    /// What a VM in reserve must be to become one like `spec`.
    pub(super) async fn kind_of(&self, spec: &VmSpec) -> Result<Kind, Error> {
        let (host, recipe) = (self.host().await?, self.recipe(spec).await?);
        // Where the processor itself runs the guest, nothing is worth rehearsing.
        let rehearsal = spec.rehearsal.filter(|_| recipe.acceleration() == Acceleration::Tcg);
        Ok(Kind { machine: format!("{} {} {}", recipe.key(&host), spec.disk_gib, spec.cpu_millis), rehearsal })
    }

    /// A new disk, and a clone on it.
    pub(super) async fn create_anew(&self, id: &VmId, spec: &VmSpec) -> Result<Arc<dyn Vm>, Error> {
        self.make_disk(id, spec).await?;
        let watched = self.begin(id, spec, Becoming::Sandbox { disk_bytes: 0 }).await?;
        Ok(RunningVm::new(id.clone(), watched))
    }

    async fn make_disk(&self, id: &VmId, spec: &VmSpec) -> Result<(), Error> {
        let (dir, seeds, gib) = (self.dir(id), self.home.join("templates"), spec.disk_gib);
        dir.make(false)?;
        blocking(move || disk::create(&seeds, &dir.disk(), gib)).await
    }

    /// A VM from the reserve under a sandbox's id.
    pub(super) async fn take_over(
        &self,
        reserved: Arc<Watched>,
        id: &VmId,
        spec: &VmSpec,
    ) -> Result<Arc<dyn Vm>, Error> {
        let moved = reserved.place.move_to(self.dir(id));
        let taken = match moved {
            Ok(()) => self.make_own(&reserved, spec, Becoming::Sandbox { disk_bytes: 0 }).await,
            Err(error) => Err(error),
        };
        if let Err(error) = taken {
            self.discard(&reserved).await;
            return Err(error);
        }
        Ok(RunningVm::new(id.clone(), reserved))
    }

    /// Ends a VM that is nobody's and removes its files.
    pub(super) async fn discard(&self, vm: &Watched) {
        let _ = vm.kill().await;
        let _ = heyvm_trees::remove(vm.place.dir().path());
    }

    /// A running VM on the disk in its directory, when it is its turn to start.
    pub(super) async fn begin(&self, id: &VmId, spec: &VmSpec, becoming: Becoming) -> Result<Arc<Watched>, Error> {
        let _room = self.starts.acquire().await.map_err(|_| Error::Unreachable("the daemon is ending".into()))?;
        let watched = self.resume(id, spec).await?;
        self.make_own(&watched, spec, becoming).await?;
        Ok(watched)
    }

    /// A running clone on the disk in the VM's directory, or a guest that has booted there. Nothing has been said to its agent.
    async fn resume(&self, id: &VmId, spec: &VmSpec) -> Result<Arc<Watched>, Error> {
        let (host, egress) = (self.host().await?, self.egress().await?);
        let recipe = self.recipe(spec).await?;
        let template = match self.settings.templates {
            true => Some(self.template(spec, silent()).await?),
            false => None,
        };
        let boots = template.is_none();
        let (slot, dir) = (self.slots.take(id), self.dir(id));
        let record = Record::new(slot, id, &host.cgroups);
        let start = {
            let (host, egress, dir, spec) = (Arc::clone(&host), egress.clone(), dir.clone(), spec.clone());
            let record = record.clone();
            move || -> Result<Launched, Error> {
                let (mut descriptors, machine) = match template {
                    Some(template) => (template.descriptors(&spec.image.rootfs)?, recipe.clone_machine()),
                    None => (recipe.boot_descriptors(&recipe.empty_memory()?)?, recipe.boot_machine()),
                };
                let disk = fs::File::options().read(true).write(true).open(dir.disk());
                descriptors.add(fd::DISK, disk.map_err(Error::io("opening the disk", dir.disk()))?);
                if let Some(tap) = tap(egress.as_deref(), slot)? {
                    descriptors.add(fd::TAP, tap);
                }
                launch(&host, Launch { dir: &dir, record, machine, cpu_millis: spec.cpu_millis, descriptors })
            }
        };
        let launched = blocking(start).await.inspect_err(|_| self.slots.give_back(slot, id))?;
        let resumed = async {
            let qmp = Qmp::connect(&dir.qmp_socket()).await?;
            match boots {
                true => drop(agent_has_come_up(&dir, &qmp).await?),
                false => qmp.resume(format!("fd:{}", fd::STATE)).await?,
            }
            Ok::<Qmp, Error>(qmp)
        };
        let deadline = if boots { BOOT_DEADLINE + RESUME_DEADLINE } else { RESUME_DEADLINE };
        let late = || Err(Error::Unreachable("it was not there in time".into()));
        match tokio::time::timeout(deadline, resumed).await.unwrap_or_else(|_| late()) {
            Ok(qmp) => {
                let belongings = Belongings { slots: Arc::clone(&self.slots), record };
                Ok(Watched::new(Place::new(dir), launched.process, qmp, belongings))
            }
            Err(error) => {
                let console_tail = launched.last_words();
                let (process, path) = (launched.process, dir.path().to_owned());
                blocking(move || process.kill().map_err(Error::io("ending QEMU in", path))).await?;
                self.slots.give_back(slot, id);
                Err(Error::Boot { what: format!("could not be resumed: {error}"), console_tail })
            }
        }
    }

    /// Has the agent make the clone its own; a clone that fails to is ended.
    async fn make_own(&self, vm: &Watched, spec: &VmSpec, becoming: Becoming) -> Result<(), Error> {
        let slot = vm.place.dir().record().map(|record| record.slot).unwrap_or_default();
        let mut request = personalize_request(spec, slot, self.egress().await?.is_some(), becoming);
        let personalized = async {
            let mut client = vm.agent.client().await?;
            request.unix_time_ns = clock::now_ns();
            let sent = Instant::now();
            client.personalize(request).await.map_err(|status| unreachable_agent(&status))?;
            if becoming != Becoming::Reserve && sent.elapsed() > PROMPT {
                // The connection had to be made first, or the host is busy: the time that was sent has come late. Where this
                // fails, the clock is kept from now on all the same.
                let _ = clock::correct(&vm.agent, 1).await;
            }
            Ok(())
        };
        let failed = tokio::select! {
            answer = personalized => answer.err(),
            exit = vm.exited() => {
                Some(Error::Boot { what: "ended as it was resumed".into(), console_tail: exit.console_tail })
            }
            () = tokio::time::sleep(PERSONALIZE_DEADLINE) => {
                Some(Error::Unreachable("it did not become a sandbox in time".into()))
            }
        };
        match failed {
            None => Ok(()),
            Some(error) => {
                vm.kill().await?;
                Err(error)
            }
        }
    }

    /// Makes up the reserve of a kind, in the background.
    pub(super) fn refill(&self, kind: Kind, spec: VmSpec) {
        let (Some(driver), wanted) = (self.me.upgrade(), self.settings.reserve) else { return };
        if wanted == 0 || !self.settings.templates {
            return;
        }
        let spec = nobodys(spec);
        tokio::spawn(async move {
            tokio::time::sleep(REFILL_DELAY).await;
            let _one_at_a_time = driver.reserve.making.lock().await;
            while driver.reserve.has_room(&kind, wanted) {
                match driver.make_reserve(&spec, kind.rehearsal).await {
                    Ok(vm) => driver.reserve.add(kind.clone(), vm),
                    Err(error) => {
                        tracing::warn!(%error, "no VM could be made in reserve");
                        return;
                    }
                }
            }
            drop(_one_at_a_time);
            tokio::time::sleep(reserve::SHELF_LIFE).await;
            for old in driver.reserve.older_than(reserve::SHELF_LIFE) {
                driver.discard(&old).await;
            }
        });
    }

    async fn make_reserve(&self, spec: &VmSpec, rehearsal: Option<Rehearsal>) -> Result<Arc<Watched>, Error> {
        let id = format!("{}{:016x}", reserve::PREFIX, rand::random::<u64>());
        let made = async {
            self.make_disk(&id, spec).await?;
            let vm = self.begin(&id, spec, Becoming::Reserve).await?;
            tokio::time::timeout(REHEARSAL_DEADLINE, rehearse(&vm, rehearsal))
                .await
                .unwrap_or_else(|_| Err(Error::Unreachable("its rehearsal did not end in time".into())))?;
            Ok(vm)
        };
        let made = made.await;
        if made.is_err() {
            let _ = crate::Driver::destroy(self, &id).await;
        }
        made
    }
}

/// What a VM in reserve is made from: nothing of the sandbox that was asked for last, whose environment may hold secrets.
fn nobodys(spec: VmSpec) -> VmSpec {
    let env = spec.image.config.env.clone();
    VmSpec { env, hostname: "reserve".into(), working_dir: String::new(), user: String::new(), ..spec }
}

fn personalize_request(spec: &VmSpec, slot: u32, network: bool, becoming: Becoming) -> PersonalizeRequest {
    let mut random = rand::rng();
    let mut entropy = vec![0; ENTROPY];
    random.fill_bytes(&mut entropy);
    let addresses = egress::addresses(slot);
    PersonalizeRequest {
        entropy,
        unix_time_ns: 0,
        hostname: spec.hostname.clone(),
        machine_id: format!("{:032x}", random.random::<u128>()),
        network: network.then(|| Network {
            address: addresses.guest.to_string(),
            prefix: u32::from(addresses.prefix),
            gateway: addresses.gateway.to_string(),
            nameservers: vec![egress::RESOLVER.to_string()],
            mtu: egress::MTU,
        }),
        env: spec.env.iter().map(|(name, value)| EnvVar { name: name.clone(), value: value.clone() }).collect(),
        working_dir: spec.working_dir.clone(),
        user: spec.user.clone(),
        certificates: spec.certificates.clone(),
        reserve: becoming == Becoming::Reserve,
        disk_bytes: match becoming {
            Becoming::Sandbox { disk_bytes } => disk_bytes,
            Becoming::Reserve => 0,
        },
    }
}
