//! A driver without machines: each sandbox is the real agent, served in this process, with a directory for a disk.
//! What it runs are processes of this host. It is there for the control plane's own logic; what QEMU does is tested with QEMU.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use heyvm_agent::{Reaper, Sandbox, connection, net::streams, service::Service};
use heyvm_test_services::hostile_agent::{self, Misbehaviour};
use heyvm_vm::{
    AgentConnection, Driver, Error, Exit, ExitCause, HostCheck, Progress, Remains, Usage, Vm, VmId, VmSpec,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{net::UnixListener, runtime::Runtime, sync::watch, task::JoinSet};

/// Marks the processes of a machine.
const MARK: &str = "HEYVM_TEST_MACHINE";

/// Machines outlive the control plane that has made them, as VMs outlive a daemon.
pub struct Machines {
    dir: PathBuf,
    runtime: Runtime,
    running: Mutex<HashMap<VmId, Arc<Machine>>>,
    ended: Mutex<HashMap<VmId, Exit>>,
    /// Whether the next `create` finds no space.
    pub full: AtomicBool,
    /// How long `create` takes.
    pub slowness: Mutex<Duration>,
    /// How long `stop` takes.
    pub tenacity: Arc<Mutex<Duration>>,
    /// Memory in MiB and disk in GiB of the last one that was booted.
    pub sizes: Mutex<(u32, u32)>,
    /// Digest of the image that the last one was booted from.
    pub booted: Mutex<String>,
    /// What becomes of `adopt`.
    pub finding: Mutex<Finding>,
}

/// How finding a machine again goes.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub enum Finding {
    #[default]
    Works,
    Fails,
    NeverAnswers,
}

impl Machines {
    pub fn new(dir: &Path) -> Arc<Self> {
        fs::create_dir_all(dir).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        Arc::new(Self {
            dir: dir.to_owned(),
            runtime,
            running: Mutex::default(),
            ended: Mutex::default(),
            full: AtomicBool::new(false),
            slowness: Mutex::default(),
            tenacity: Arc::default(),
            sizes: Mutex::default(),
            booted: Mutex::default(),
            finding: Mutex::default(),
        })
    }

    /// Disks that are there.
    pub fn disks(&self) -> Vec<VmId> {
        fs::read_dir(&self.dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Machines that run.
    pub fn running(&self) -> Vec<VmId> {
        let machines = self.running.lock().unwrap();
        machines.values().filter(|machine| machine.exit.borrow().is_none()).map(|machine| machine.id.clone()).collect()
    }

    /// The machine ends by itself.
    pub fn end(&self, id: &str, cause: ExitCause, console: &str) {
        let machine = self.running.lock().unwrap().remove(id).unwrap();
        let exit = Exit { cause, console_tail: vec![console.to_owned()] };
        self.ended.lock().unwrap().insert(id.to_owned(), exit.clone());
        machine.end(exit);
    }

    /// The agent answers no one until [`Self::answer_again`].
    pub fn fall_silent(&self, id: &str) {
        let disk = self.dir.join(id);
        fs::rename(disk.join("agent.sock"), disk.join("silent.sock")).unwrap();
    }

    pub fn answer_again(&self, id: &str) {
        let disk = self.dir.join(id);
        fs::rename(disk.join("silent.sock"), disk.join("agent.sock")).unwrap();
    }

    /// From now on the machine's agent is another one.
    pub fn possess(&self, id: &str, how: Misbehaviour) {
        let machine = Arc::clone(&self.running.lock().unwrap()[id]);
        let mut serving = machine.serving.lock().unwrap();
        serving.abort();
        let socket = self.dir.join(id).join("agent.sock");
        fs::remove_file(&socket).unwrap();
        *serving = self.runtime.spawn(async move {
            let Err(error) = hostile_agent::serve(&socket, how).await;
            panic!("{error}");
        });
    }

    /// A disk that no record knows of.
    pub fn stray(&self, id: &str) {
        fs::create_dir(self.dir.join(id)).unwrap();
    }

    fn kept(&self, id: &str) -> PathBuf {
        self.dir.with_file_name("kept").join(id)
    }

    fn copy_disk(&self, from: &Path, to: &Path) {
        heyvm_trees::remove(to).ok();
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap().flatten() {
            if entry.file_type().unwrap().is_file() {
                fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
            }
        }
    }

    /// Where a sandbox's disk is.
    pub fn disk(&self, id: &str) -> PathBuf {
        self.dir.join(id)
    }

    fn boot(&self, id: &VmId, spec: &VmSpec) -> Arc<dyn Vm> {
        self.booted.lock().unwrap().clone_from(&spec.image.digest);
        *self.sizes.lock().unwrap() = (spec.memory_mib, spec.disk_gib);
        let socket = self.dir.join(id).join("agent.sock");
        let ports = self.dir.join(id).join("ports.sock");
        for stale in [&socket, &ports] {
            fs::remove_file(stale).ok();
        }
        let mut env = spec.env.clone();
        env.push((MARK.into(), id.clone()));
        fs::create_dir_all(&spec.working_dir).unwrap();
        let sandbox = Sandbox {
            env,
            working_dir: spec.working_dir.clone(),
            hostname: spec.hostname.clone(),
            ..Sandbox::default()
        };
        let _inside = self.runtime.enter();
        let listener = UnixListener::bind(&socket).unwrap();
        let ports_listener = UnixListener::bind(&ports).unwrap();
        let serving = self.runtime.spawn(async move {
            let reaper = Reaper::new(false);
            tokio::spawn(Arc::clone(&reaper).run());
            let service = Arc::new(Service::personalized(reaper, None, sandbox));
            // They end with the machine.
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    Ok((stream, _)) = listener.accept() => {
                        connections.spawn(connection::serve(stream, Arc::clone(&service)));
                    }
                    Ok((stream, _)) = ports_listener.accept() => {
                        connections.spawn(streams::serve(stream, || true));
                    }
                    else => return,
                }
            }
        });
        let machine = Arc::new(Machine {
            id: id.clone(),
            agent: AgentConnection::at(move || socket.clone(), move || ports.clone()),
            exit: watch::channel(None).0,
            tenacity: Arc::clone(&self.tenacity),
            serving: Mutex::new(serving),
        });
        self.running.lock().unwrap().insert(id.clone(), Arc::clone(&machine));
        machine
    }
}

#[async_trait]
impl Driver for Machines {
    async fn prepare(&self, _: &VmSpec, _: Progress) -> Result<(), Error> {
        Ok(())
    }

    async fn create(&self, id: &VmId, spec: &VmSpec) -> Result<Arc<dyn Vm>, Error> {
        if self.full.load(Ordering::Relaxed) {
            return Err(Error::OutOfResources { what: "disk space".into() });
        }
        fs::create_dir(self.dir.join(id)).unwrap();
        let slowness = *self.slowness.lock().unwrap();
        tokio::time::sleep(slowness).await;
        Ok(self.boot(id, spec))
    }

    async fn start(&self, id: &VmId, spec: &VmSpec) -> Result<Arc<dyn Vm>, Error> {
        assert!(self.dir.join(id).is_dir(), "the disk is kept");
        Ok(self.boot(id, spec))
    }

    async fn adopt(&self, id: &VmId) -> Result<Option<Arc<dyn Vm>>, Error> {
        let finding = *self.finding.lock().unwrap();
        match finding {
            Finding::Works => {}
            Finding::Fails => return Err(Error::HostNotReady { what: "no egress".into(), hint: String::new() }),
            Finding::NeverAnswers => std::future::pending().await,
        }
        let running = self.running.lock().unwrap();
        Ok(running.get(id).filter(|machine| machine.exit.borrow().is_none()).map(|m| Arc::clone(m) as Arc<dyn Vm>))
    }

    async fn post_mortem(&self, id: &VmId) -> Exit {
        let lost = Exit { cause: ExitCause::Lost, console_tail: Vec::new() };
        self.ended.lock().unwrap().get(id).cloned().unwrap_or(lost)
    }

    async fn checkpoint(&self, id: &VmId, running: Option<AgentConnection>) -> Result<(), Error> {
        assert_eq!(running.is_some(), self.running().contains(id));
        self.copy_disk(&self.dir.join(id), &self.kept(id));
        Ok(())
    }

    async fn restore(&self, id: &VmId) -> Result<(), Error> {
        assert!(!self.running().contains(id), "a disk in use is not exchanged");
        self.copy_disk(&self.kept(id), &self.dir.join(id));
        Ok(())
    }

    async fn destroy(&self, id: &VmId) -> Result<(), Error> {
        if let Some(machine) = self.running.lock().unwrap().remove(id) {
            machine.end(Exit { cause: ExitCause::Lost, console_tail: Vec::new() });
        }
        heyvm_trees::remove(&self.dir.join(id)).ok();
        Ok(())
    }

    async fn list(&self) -> Result<Vec<VmId>, Error> {
        Ok(self.disks())
    }

    async fn kill(&self, id: &VmId) -> Result<(), Error> {
        if let Some(machine) = self.running.lock().unwrap().remove(id) {
            machine.end(Exit { cause: ExitCause::Lost, console_tail: Vec::new() });
        }
        Ok(())
    }

    fn is_of_the_pool(&self, id: &str) -> bool {
        id.starts_with("reserve-")
    }

    async fn keep_note(&self, id: &VmId, note: Vec<u8>) -> Result<(), Error> {
        let disk = self.dir.join(id);
        if disk.is_dir() {
            fs::write(disk.join("note"), note).unwrap();
        }
        Ok(())
    }

    async fn remains(&self, id: &VmId) -> Result<Option<Remains>, Error> {
        let disk = self.dir.join(id);
        let Ok(meta) = fs::metadata(&disk) else { return Ok(None) };
        Ok(Some(Remains {
            running: self.running().contains(id),
            size_bytes: 5 << 20,
            disk_gib: 10,
            changed_at: meta.modified().unwrap(),
            note: fs::read(disk.join("note")).ok(),
        }))
    }

    async fn doctor(&self, _: Option<&heyvm_images::Kernel>) -> Vec<HostCheck> {
        Vec::new()
    }
}

struct Machine {
    id: VmId,
    agent: AgentConnection,
    exit: watch::Sender<Option<Exit>>,
    tenacity: Arc<Mutex<Duration>>,
    serving: Mutex<tokio::task::JoinHandle<()>>,
}

impl Machine {
    fn end(&self, exit: Exit) {
        self.exit.send_replace(Some(exit));
        self.serving.lock().unwrap().abort();
        let mark = format!("{MARK}={}\0", self.id);
        for process in fs::read_dir("/proc").unwrap().flatten() {
            let environment = fs::read(process.path().join("environ")).unwrap_or_default();
            let marked = environment.windows(mark.len()).any(|window| window == mark.as_bytes());
            if let (true, Some(Ok(pid))) = (marked, process.file_name().to_str().map(str::parse)) {
                kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
            }
        }
    }
}

#[async_trait]
impl Vm for Machine {
    fn id(&self) -> &VmId {
        &self.id
    }

    fn agent(&self) -> AgentConnection {
        self.agent.clone()
    }

    async fn exited(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        exit.wait_for(Option::is_some).await.unwrap().clone().unwrap()
    }

    async fn stop(&self, _: Duration) -> Result<(), Error> {
        let tenacity = *self.tenacity.lock().unwrap();
        tokio::time::sleep(tenacity).await;
        if self.exit.borrow().is_none() {
            self.end(Exit { cause: ExitCause::GuestShutdown, console_tail: Vec::new() });
        }
        Ok(())
    }

    async fn grow_disk(&self, _: u32) -> Result<(), Error> {
        Ok(())
    }

    async fn usage(&self) -> Result<Usage, Error> {
        Ok(Usage::default())
    }
}
