//! The QEMU driver: every VM is a clone of a template, in a jail.
//!
//! - [`machine`]: QEMU's command line.  [`launch`]: one confined QEMU.  [`qmp`]: its control protocol.
//! - [`template`]: booted once, cloned ever after.  [`memory`]: sealed guest memory.  [`disk`]: sparse ext4 disks.
//! - [`clone`]: a VM from a template.  [`checkpoint`]: a copy of its disk to go back to.  [`pool`]: clones made ahead, [`pool_keeper`] makes
//!   them.  [`templates`]: made once, kept within a budget.  [`vitals`]: guests that stand still.
//! - [`accel`]: KVM or translation.  [`kvm_device`]: why there is no KVM.  [`record`]: what stands in a VM's directory.  [`running`]: a VM that runs.
//! - [`turns`]: one thing at a time with each VM.  [`doctor`]: whether this host can do it.

pub mod accel;
mod checkpoint;
mod clone;
mod console;
mod disk;
mod doctor;
mod guest_kernel;
mod kvm_device;
mod launch;
mod machine;
mod memory;
mod pool;
mod pool_keeper;
mod qmp;
mod record;
mod rehearsal;
mod running;
mod template;
mod templates;
mod turns;
mod vitals;

use std::{
    num::NonZero,
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread::available_parallelism,
    time::Instant,
};

use async_trait::async_trait;
pub use heyvm_jail::egress::EgressSettings;
use heyvm_jail::{egress::Egress, process::ProcessId};
use tokio::sync::{OnceCell, Semaphore};

pub(crate) use self::record::Place;
pub use self::templates::Budgets;
use self::{
    accel::Verdict,
    clone::Becoming,
    launch::Host,
    pool::WarmPool,
    qmp::Qmp,
    record::{Record, Slots, VmDir},
    running::{Belongings, RunningVm, Watched},
    template::Template,
    templates::Templates,
    turns::Turns,
};
use crate::{AgentConnection, Driver, Error, Exit, HostCheck, Progress, Remains, Vm, VmId, VmSpec};

/// What the user may decide.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The `heyvm` program, which is also the jail's launcher and the egress holder.
    pub launcher: PathBuf,
    /// Whether guests have a network at all.
    pub network: bool,
    /// What guests may reach beyond the internet.
    pub egress: EgressSettings,
    /// Whether VMs are clones of a template; without, each boots its kernel.
    pub templates: bool,
    /// How many VMs of one kind the warm pool holds at most; 0: there is none.
    pub reserve: usize,
    /// What templates may take.
    pub template_budgets: Budgets,
}

/// VMs that may be starting at a time. Each takes a second of a processor without KVM; more of them would only make each
/// other late, until none is there by its deadline.
const STARTS_PER_PROCESSOR: usize = 2;
/// Ten sandboxes in a row come from the warm pool: that many are made in a minute of quiet, where there is no KVM.
const DEFAULT_RESERVE: usize = 10;

impl Default for Settings {
    fn default() -> Self {
        let launcher = std::env::current_exe().unwrap_or_else(|_| "heyvm".into());
        Self {
            launcher,
            network: true,
            egress: EgressSettings::default(),
            templates: true,
            reserve: DEFAULT_RESERVE,
            template_budgets: Budgets::of_this_host(),
        }
    }
}

/// VMs on this machine.
pub struct QemuDriver {
    home: PathBuf,
    settings: Settings,
    host: OnceCell<Arc<Host>>,
    egress: tokio::sync::Mutex<Option<Arc<Egress>>>,
    verdict: tokio::sync::Mutex<Option<Verdict>>,
    trying_again: AtomicBool,
    templates: Templates,
    slots: Arc<Slots>,
    pool: Arc<WarmPool<Arc<Watched>>>,
    /// Held while the warm pool is changed.
    making: tokio::sync::Mutex<()>,
    turns: Turns,
    starts: Semaphore,
    me: Weak<Self>,
}

impl QemuDriver {
    /// A driver with its files below `home`. What the host lacks shows at the first VM, or in `doctor`.
    pub async fn open(home: &Path, settings: Settings) -> Result<Arc<Self>, Error> {
        let sandboxes = home.join("sandboxes");
        blocking(move || make_dir(&sandboxes)).await?;
        let driver = Arc::new_cyclic(|me| Self {
            me: me.clone(),
            pool: Arc::new(WarmPool::new(settings.reserve)),
            making: tokio::sync::Mutex::default(),
            turns: Turns::default(),
            starts: Semaphore::new(STARTS_PER_PROCESSOR * available_parallelism().map_or(1, NonZero::get)),
            templates: Templates::new(home.join("templates"), settings.template_budgets),
            home: home.to_owned(),
            settings,
            host: OnceCell::new(),
            egress: tokio::sync::Mutex::default(),
            verdict: tokio::sync::Mutex::default(),
            trying_again: AtomicBool::new(false),
            slots: Arc::default(),
        });
        let found = Arc::clone(&driver);
        blocking(move || {
            found.mark_slots()?;
            found.templates.clean_up();
            Ok(())
        })
        .await?;
        if driver.settings.templates {
            pool_keeper::spawn(Arc::downgrade(&driver));
        }
        Ok(driver)
    }

    /// Marks the slots of VMs that run. Blocks.
    fn mark_slots(&self) -> Result<(), Error> {
        for id in VmDir::list(&self.home.join("sandboxes"))? {
            let dir = self.dir(&id);
            match (dir.record(), dir.living_process()) {
                (Ok(Some(record)), Ok(Some(_))) => self.slots.mark(record.slot, &record.cgroup),
                (Err(error), _) | (_, Err(error)) => tracing::error!(%error, id, "a VM's files cannot be read now"),
                _ => {}
            }
        }
        Ok(())
    }

    /// How guests run here, found out at the first call. What may have changed since is tried again beside this.
    pub async fn acceleration(&self, kernel: &heyvm_images::Kernel) -> Result<Verdict, Error> {
        let mut known = self.verdict.lock().await;
        if let Some(verdict) = known.clone() {
            if verdict.is_stale() && !self.trying_again.swap(true, Ordering::Relaxed) {
                self.try_acceleration_again(kernel.clone());
            }
            return Ok(verdict);
        }
        let verdict = self.try_acceleration(kernel, false).await?;
        *known = Some(verdict.clone());
        Ok(verdict)
    }

    /// The same for whoever has just changed something about it: what may have changed is tried again first.
    pub async fn acceleration_now(&self, kernel: &heyvm_images::Kernel) -> Result<Verdict, Error> {
        let known = self.verdict.lock().await.clone();
        let may_have_changed = known.is_some_and(|verdict| verdict.is_stale());
        // One trial at a time: both would use the same file for the id of their guest.
        if may_have_changed && !self.trying_again.swap(true, Ordering::Relaxed) {
            let tried = self.try_acceleration(kernel, true).await;
            self.trying_again.store(false, Ordering::Relaxed);
            *self.verdict.lock().await = Some(tried?);
        }
        self.acceleration(kernel).await
    }

    async fn try_acceleration(&self, kernel: &heyvm_images::Kernel, again: bool) -> Result<Verdict, Error> {
        let host = self.host().await?;
        let (file, kernel) = (self.home.join("templates/acceleration.json"), kernel.clone());
        blocking(move || {
            make_dir(file.parent().unwrap_or(&file))?;
            accel::verdict(&file, &host.launcher, &host.root, &kernel, again)
        })
        .await
    }

    fn try_acceleration_again(&self, kernel: heyvm_images::Kernel) {
        let Some(driver) = self.me.upgrade() else { return };
        tokio::spawn(async move {
            match driver.try_acceleration(&kernel, true).await {
                Ok(verdict) => *driver.verdict.lock().await = Some(verdict),
                Err(error) => tracing::warn!(%error, "KVM could not be tried again"),
            }
            driver.trying_again.store(false, Ordering::Relaxed);
        });
    }

    async fn host(&self) -> Result<Arc<Host>, Error> {
        let make = || async {
            let (home, launcher) = (self.home.clone(), self.settings.launcher.clone());
            blocking(move || launch::host(&home, launcher).map(Arc::new)).await
        };
        self.host.get_or_try_init(make).await.cloned()
    }

    /// The way out, where guests have one; made anew when its processes have ended.
    async fn egress(&self) -> Result<Option<Arc<Egress>>, Error> {
        if !self.settings.network {
            return Ok(None);
        }
        let mut egress = self.egress.lock().await;
        if let Some(living) = egress.as_ref().filter(|egress| egress.is_alive()) {
            return Ok(Some(Arc::clone(living)));
        }
        let (home, settings) = (self.home.clone(), self.settings.clone());
        let made = blocking(move || launch::way_out(&home, &settings.launcher, &settings.egress).map(Arc::new));
        *egress = Some(made.await?);
        Ok(egress.clone())
    }

    /// The template of such VMs, made when there is none, to the end even where its caller leaves meanwhile.
    async fn template(&self, spec: &VmSpec, progress: Progress) -> Result<Template, Error> {
        let driver = self.me.upgrade().ok_or_else(|| Error::Unreachable("the daemon is ending".into()))?;
        let recipe = self.recipe(spec).await?;
        let made = tokio::spawn(async move {
            let (host, egress) = (driver.host().await?, driver.egress().await?);
            driver.templates.get(&host, egress.as_ref(), &driver.slots, &recipe, &progress).await
        });
        made.await.map_err(Error::task)?
    }

    /// Does something with a VM in a task of its own and in its turn: it comes to its end although its caller may leave, and
    /// a `destroy` that comes after it finds all of it.
    async fn in_turn<T, F>(&self, id: &VmId, work: impl FnOnce(Arc<Self>, VmId) -> F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let driver = self.me.upgrade().ok_or_else(|| Error::Unreachable("the daemon is ending".into()))?;
        let work = work(Arc::clone(&driver), id.clone());
        let id = id.clone();
        let done = tokio::spawn(async move {
            let _turn = driver.turns.wait_for(&id).await;
            work.await
        });
        done.await.map_err(Error::task)?
    }

    async fn create_now(&self, id: &VmId, spec: VmSpec) -> Result<Arc<dyn Vm>, Error> {
        let kind = self.kind_of(&spec).await?;
        let created = match self.claim(&kind, id, &spec).await {
            Some(vm) => Ok(vm),
            None => self.create_anew(id, &spec).await,
        };
        if self.settings.templates {
            self.pool.ask(&kind, pool_keeper::nobodys(spec), Instant::now());
        }
        match created {
            Ok(vm) => Ok(vm),
            Err(error) => {
                self.destroy_now(id).await?;
                Err(error)
            }
        }
    }

    async fn start_now(&self, id: &VmId, spec: &VmSpec) -> Result<Arc<dyn Vm>, Error> {
        if let Some(running) = self.adopt(id).await? {
            return Ok(running);
        }
        let (disk, gib) = (self.dir(id).disk(), spec.disk_gib);
        let disk_bytes = blocking(move || disk::grow(&disk, gib)).await?;
        let watched = self.begin(id, spec, Becoming::Sandbox { disk_bytes }).await?;
        Ok(RunningVm::started(id.clone(), watched))
    }

    async fn destroy_now(&self, id: &VmId) -> Result<(), Error> {
        let (dir, slots) = (self.dir(id), Arc::clone(&self.slots));
        blocking(move || {
            kill(&dir, &slots)?;
            dir.remove()
        })
        .await
    }

    fn dir(&self, id: &VmId) -> VmDir {
        VmDir::new(&self.home.join("sandboxes"), id)
    }
}

#[async_trait]
impl Driver for QemuDriver {
    async fn prepare(&self, spec: &VmSpec, progress: Progress) -> Result<(), Error> {
        if !self.settings.templates {
            return Ok(());
        }
        self.template(spec, progress).await.map(drop)
    }

    async fn create(&self, id: &VmId, spec: &VmSpec) -> Result<Arc<dyn Vm>, Error> {
        let spec = spec.clone();
        self.in_turn(id, |driver, id| async move { driver.create_now(&id, spec).await }).await
    }

    async fn start(&self, id: &VmId, spec: &VmSpec) -> Result<Arc<dyn Vm>, Error> {
        let spec = spec.clone();
        self.in_turn(id, |driver, id| async move { driver.start_now(&id, &spec).await }).await
    }

    async fn adopt(&self, id: &VmId) -> Result<Option<Arc<dyn Vm>>, Error> {
        let dir = self.dir(id);
        let looked_at = dir.clone();
        let Some((process, record)) = blocking(move || found(&looked_at)).await? else { return Ok(None) };
        let qmp = match Qmp::connect(&dir.qmp_socket()).await {
            Ok(qmp) => qmp,
            Err(_) if blocking(move || dir.living_process()).await?.is_none() => return Ok(None),
            // Its process lives: it may be slow, or this daemon out of descriptors. The caller looks again.
            Err(error) => return Err(error),
        };
        if let Some(ended) = qmp.ended().await? {
            return put_down(dir, console::judge(&qmp, ended).await).await.map(|()| None);
        }
        self.slots.mark(record.slot, &record.cgroup);
        // Existing taps keep their namespace alive; the daemon's own connection keeps its holder there.
        if let Err(error) = self.egress().await {
            tracing::warn!(%error, id, "the network of a running sandbox cannot be looked after");
        }
        let belongings = Belongings { slots: Arc::clone(&self.slots), record, template: None };
        let watched = Watched::new(Place::new(dir), process, qmp, belongings);
        Ok(Some(RunningVm::adopted(id.clone(), watched)))
    }

    async fn kill(&self, id: &VmId) -> Result<(), Error> {
        self.in_turn(id, |driver, id| async move {
            let (dir, slots) = (driver.dir(&id), Arc::clone(&driver.slots));
            blocking(move || kill(&dir, &slots)).await
        })
        .await
    }

    async fn post_mortem(&self, id: &VmId) -> Exit {
        let dir = self.dir(id);
        blocking(move || Ok(dir.post_mortem())).await.unwrap_or_else(|_| Exit::lost())
    }

    async fn checkpoint(&self, id: &VmId, running: Option<AgentConnection>) -> Result<(), Error> {
        self.in_turn(id, |driver, id| async move { driver.checkpoint_now(&id, running).await }).await
    }

    async fn restore(&self, id: &VmId) -> Result<(), Error> {
        self.in_turn(id, |driver, id| async move { driver.restore_now(&id).await }).await
    }

    async fn destroy(&self, id: &VmId) -> Result<(), Error> {
        self.in_turn(id, |driver, id| async move { driver.destroy_now(&id).await }).await
    }

    async fn list(&self) -> Result<Vec<VmId>, Error> {
        let sandboxes = self.home.join("sandboxes");
        blocking(move || VmDir::list(&sandboxes)).await
    }

    fn is_of_the_pool(&self, id: &str) -> bool {
        pool::is_of_the_pool(id)
    }

    async fn keep_note(&self, id: &VmId, note: Vec<u8>) -> Result<(), Error> {
        let dir = self.dir(id);
        blocking(move || dir.write_note(&note)).await
    }

    async fn remains(&self, id: &VmId) -> Result<Option<Remains>, Error> {
        let dir = self.dir(id);
        blocking(move || dir.remains()).await
    }

    async fn empty_pool(&self) {
        for vm in self.pool.close() {
            self.discard(&vm).await;
        }
        // One that is being made finds no place afterwards.
        drop(self.making.lock().await);
    }

    async fn doctor(&self, kernel: Option<&heyvm_images::Kernel>) -> Vec<HostCheck> {
        doctor::examine(self, kernel).await
    }
}

/// A VM's process, if it runs, and what was written at its start. Blocks.
fn found(dir: &VmDir) -> Result<Option<(ProcessId, Record)>, Error> {
    let Some(process) = dir.living_process()? else { return Ok(None) };
    let record = dir.record()?.ok_or_else(|| Error::Unreachable(format!("{} has no vm.json", dir.path().display())))?;
    Ok(record.is_of_this_boot()?.then_some((process, record)))
}

/// Ends a VM's QEMU, if it runs; its files stay. Blocks.
fn kill(dir: &VmDir, slots: &Slots) -> Result<(), Error> {
    dir.put_down()?;
    if let Ok(Some(record)) = dir.record() {
        slots.give_back(record.slot, &record.cgroup);
    }
    Ok(())
}

/// Ends the QEMU of a guest that has ended, and records why.
async fn put_down(dir: VmDir, exit: Exit) -> Result<(), Error> {
    blocking(move || {
        dir.write_exit(&exit)?;
        dir.put_down()
    })
    .await
}

#[expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]
fn make_dir(path: &Path) -> Result<(), Error> {
    std::fs::create_dir_all(path).map_err(Error::io("making", path))
}

fn silent() -> Progress {
    Arc::new(|_, _, _| {})
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.map_err(Error::task)?
}
