//! A VM from a template: on a new disk, on a kept one, or out of the warm pool.

use std::{
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
    launch::{Launch, Launched, end, launch, tap},
    machine::fd,
    pool::Kind,
    qmp::{LATE, Qmp},
    record::{Place, Record},
    running::{Belongings, RunningVm, Watched},
    silent,
    template::{BOOT_DEADLINE, Recipe, Template, agent_has_come_up},
};
use crate::{Error, Vm, VmId, VmSpec, agent::unreachable_agent, clock};

/// Bytes of fresh entropy that a clone gets before its first command.
const ENTROPY: usize = 64;
/// Becoming one's own takes a tenth of a second; a guest that takes this long never will.
const PERSONALIZE_DEADLINE: Duration = Duration::from_secs(60);
/// A guest that has become a sandbox within this has the host's time, to within half of it.
const PROMPT: Duration = Duration::from_millis(60);
/// A clone is there within a tenth of a second; others wait for its turn to end.
const RESUME_DEADLINE: Duration = Duration::from_secs(60);

/// A start that takes longer lets the next one begin.
const LONGEST_TURN: Duration = Duration::from_secs(15);

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

    /// What a pooled VM must be to become one like `spec`.
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
        Ok(RunningVm::started(id.clone(), watched))
    }

    pub(super) async fn make_disk(&self, id: &VmId, spec: &VmSpec) -> Result<(), Error> {
        let (dir, seeds, gib) = (self.dir(id), self.home.join("templates"), spec.disk_gib);
        blocking(move || {
            dir.make(false)?;
            disk::create(&seeds, &dir.disk(), gib)
        })
        .await
    }

    /// Claims a VM from the warm pool for a sandbox; `None` where none fits, or the one that did has failed.
    pub(super) async fn claim(&self, kind: &Kind, id: &VmId, spec: &VmSpec) -> Option<Arc<dyn Vm>> {
        // One that has warmed up with nothing is better than none.
        let plain = Kind { rehearsal: None, ..kind.clone() };
        while let Some(pooled) = self.pool.take(kind).or_else(|| self.pool.take(&plain)) {
            if !pooled.is_alive() {
                self.discard(&pooled).await;
                continue;
            }
            return match self.personalize_pooled(pooled, id, spec).await {
                Ok(vm) => Some(vm),
                Err(error) => {
                    tracing::warn!(%error, "a VM of the warm pool could not be claimed");
                    None
                }
            };
        }
        None
    }

    async fn personalize_pooled(&self, pooled: Arc<Watched>, id: &VmId, spec: &VmSpec) -> Result<Arc<dyn Vm>, Error> {
        let claimed = async {
            pooled.unpause().await?;
            let (place, to) = (pooled.place.clone(), self.dir(id));
            blocking(move || place.move_to(to)).await?;
            self.make_own(&pooled, spec, Becoming::Sandbox { disk_bytes: 0 }).await
        };
        if let Err(error) = claimed.await {
            self.discard(&pooled).await;
            return Err(error);
        }
        Ok(RunningVm::started(id.clone(), pooled))
    }

    /// Ends a VM that is nobody's and removes its files.
    pub(super) async fn discard(&self, vm: &Watched) {
        let dir = vm.place.dir();
        let gone = async {
            vm.kill().await?;
            blocking(move || dir.remove()).await
        };
        if let Err(error) = gone.await {
            tracing::warn!(%error, "the files of a VM that was terminated are left");
        }
    }

    /// A running VM on the disk in its directory, when it is its turn to start. A template that QEMU does not resume (written
    /// by another host kernel, or damaged) is made again, once.
    pub(super) async fn begin(&self, id: &VmId, spec: &VmSpec, becoming: Becoming) -> Result<Arc<Watched>, Error> {
        if !self.settings.templates {
            return self.begin_from(None, id, spec, becoming).await;
        }
        // Others' turns do not wait for this: making a template may take minutes.
        let template = self.template(spec, silent()).await?;
        let begun = self.begin_from(Some(template.clone()), id, spec, becoming).await;
        let Err(Error::NotResumed { .. }) = &begun else { return begun };
        if !self.templates.discard(&template).await? {
            return begun;
        }
        tracing::warn!(key = template.key, "a template does not resume; it is made again");
        drop(template);
        let template = self.template(spec, silent()).await?;
        self.begin_from(Some(template), id, spec, becoming).await
    }

    async fn begin_from(
        &self,
        template: Option<Template>,
        id: &VmId,
        spec: &VmSpec,
        becoming: Becoming,
    ) -> Result<Arc<Watched>, Error> {
        let turn = self.starts.acquire().await.map_err(|_| Error::Unreachable("the daemon is ending".into()))?;
        let begun = async {
            let watched = self.resume(template, id, spec).await?;
            self.make_own(&watched, spec, becoming).await?;
            Ok(watched)
        };
        tokio::pin!(begun);
        // A guest that hangs keeps its turn no longer than one that is slow would.
        match tokio::time::timeout(LONGEST_TURN, &mut begun).await {
            Ok(done) => done,
            Err(_) => {
                drop(turn);
                begun.await
            }
        }
    }

    /// A running clone on the disk in the VM's directory, or a guest that has booted there. Nothing has been said to its
    /// agent.
    async fn resume(&self, template: Option<Template>, id: &VmId, spec: &VmSpec) -> Result<Arc<Watched>, Error> {
        let (host, egress) = (self.host().await?, self.egress().await?);
        let recipe = self.recipe(spec).await?;
        let boots = template.is_none();
        let (slot, dir) = (self.slots.take(id), self.dir(id));
        let record =
            Record::new(slot, id, &host.cgroups, spec.cpu_millis).inspect_err(|_| self.slots.give_back(slot, id))?;
        let start = {
            let (host, egress, dir, spec) = (Arc::clone(&host), egress.clone(), dir.clone(), spec.clone());
            let (record, template) = (record.clone(), template.clone());
            move || -> Result<Launched, Error> {
                let (mut descriptors, machine) = match template {
                    Some(template) => (template.descriptors(&spec.image.rootfs)?, recipe.clone_machine()),
                    None => (recipe.boot_descriptors(&recipe.empty_memory()?)?, recipe.boot_machine()),
                };
                descriptors.add(fd::DISK, disk::open(&dir.disk())?);
                if let Some(tap) = tap(egress.as_deref(), slot)? {
                    descriptors.add(fd::TAP, tap);
                }
                launch(&host, Launch { dir: &dir, record, machine, descriptors })
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
                let belongings = Belongings { slots: Arc::clone(&self.slots), record, template };
                Ok(Watched::new(Place::new(dir), launched.process, qmp, belongings))
            }
            Err(error) => {
                let console_tail = launched.last_words();
                blocking(move || end(launched.process, &dir)).await?;
                self.slots.give_back(slot, id);
                Err(match error {
                    Error::Qmp { message, .. } if !boots && message != LATE => {
                        Error::NotResumed { message, console_tail }
                    }
                    error => Error::Boot { what: format!("could not be resumed: {error}"), console_tail },
                })
            }
        }
    }

    /// Has the agent make the clone its own; a clone that fails to is ended.
    async fn make_own(&self, vm: &Watched, spec: &VmSpec, becoming: Becoming) -> Result<(), Error> {
        let mut request = personalize_request(spec, vm.slot(), self.egress().await?.is_some(), becoming);
        let personalized = async {
            let mut client = vm.agent.client().await?;
            request.unix_time_ns = clock::now_ns();
            let sent = Instant::now();
            client.personalize(request).await.map_err(|status| unreachable_agent(&status))?;
            if becoming != Becoming::Reserve && sent.elapsed() > PROMPT {
                // The connection had to be made first, or the host is busy: the time that was sent has come late. Where this
                // fails, the clock is kept from now on all the same.
                clock::correct(&vm.agent, 1).await.ok();
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
