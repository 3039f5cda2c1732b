//! Directories of this host in a sandbox: which may be mounted where, and who serves them for as long as its VM runs.
//!
//! ```text
//!  create, start ──▶ mounted ──▶ served ◀─┐  the connection broke, or another daemon has adopted the VM
//!  mount-add    ──▶    │           └──────┘
//!                      └── error: nothing of it stays
//! ```
//! The file server is `heyvm-mounts`; what the guest does with it is the agent's affair.

use std::{
    path::{Component, Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use heyvm_agent_protocol::v1::{MountInput, MountOutput, MountStart};
use heyvm_api::{
    ApiError, ErrorCode,
    sandbox::{Mount, SandboxInfo, Status},
};
use heyvm_mounts::{DirectoryIdentity, HandleBudget, History, Server};
use heyvm_vm::{AgentConnection, Vm};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

use crate::{
    ControlPlane, Sandbox, Who, blocking::blocking, errors, not_running, record::Record, spawn_detached, supervised,
};

mod on_host;

/// Mounts of one sandbox, at most.
const MAX_MOUNTS: usize = heyvm_api::limits::MOUNTS.most;
/// Never covered in a sandbox, nor mounted from here.
const SYSTEM: [&str; 3] = ["/proc", "/sys", "/dev"];
/// Requests and answers that may wait.
const QUEUE: usize = 16;
/// A guest mounts within a moment, or never.
const MOUNTING: Duration = Duration::from_secs(60);
/// A directory on this host is found within it, or its file system does not answer.
const LOOKING: Duration = Duration::from_secs(30);
/// First and longest pause before what could not be served is tried again.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Where it is written down what guests know of their mounts, below the home.
const DIRECTORY: &str = "mounts";

/// Checks what a request says of mounts, without a look at this host's files; the sandbox paths of the answer are plain.
pub(crate) fn check(mounts: &[Mount]) -> Result<Vec<Mount>, ApiError> {
    if mounts.len() > MAX_MOUNTS {
        let message = format!("{} mounts are more than a sandbox can have", mounts.len());
        return Err(invalid(message, &format!("use up to {MAX_MOUNTS}: mount a directory that holds several")));
    }
    let mut checked: Vec<Mount> = Vec::new();
    for mount in mounts {
        let Mount { host_path, read_only, .. } = mount.clone();
        if !host_path.starts_with('/') {
            return Err(invalid(format!("host_path {host_path:?} is not an absolute path"), "begin it with /"));
        }
        let sandbox_path = sandbox_path(&mount.sandbox_path)?;
        if checked.iter().any(|other| other.sandbox_path == sandbox_path) {
            return Err(taken(&sandbox_path));
        }
        checked.push(Mount { host_path, sandbox_path, read_only });
    }
    Ok(checked)
}

/// Runs file system calls that may stall (NFS, FUSE) where they stall nobody else, and not indefinitely.
async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::time::timeout(LOOKING, tokio::task::spawn_blocking(work)).await;
    done.map_err(|_| {
        ApiError::new(ErrorCode::InvalidDirectory, "the file system of the directory to mount does not answer")
            .hint("look at it with ls; a network file system may be out of reach")
    })?
    .map_err(|error| errors::internal(&error))?
}

fn taken(sandbox_path: &str) -> ApiError {
    invalid(format!("there is a mount at {sandbox_path} already"), "every mount needs a sandbox_path of its own")
}

fn sandbox_path(asked: &str) -> Result<String, ApiError> {
    let bad = |why: &str| {
        Err(invalid(format!("sandbox_path {asked:?} {why}"), "use an absolute path of its own, for example /data"))
    };
    let path = Path::new(asked);
    if !path.is_absolute() {
        return bad("is not an absolute path");
    }
    if asked.contains(['\0', '\n']) || path.components().any(|part| part == Component::ParentDir) {
        return bad("holds \"..\", a newline or a zero byte");
    }
    let plain: PathBuf = path.components().collect();
    if plain == Path::new("/") || SYSTEM.iter().any(|system| plain.starts_with(system)) {
        return bad("is not to be covered");
    }
    Ok(plain.to_string_lossy().into_owned())
}

fn invalid(message: String, hint: &str) -> ApiError {
    ApiError::new(ErrorCode::InvalidArgument, message).hint(hint)
}

impl ControlPlane {
    /// Mounts a directory of this host into a sandbox: at once where it runs, else when it starts. Repeating it changes
    /// nothing while the sandbox runs; on a stopped one it takes the directory that is at the path now.
    pub async fn add_mount(self: &Arc<Self>, who: &Who, mount: Mount) -> Result<SandboxInfo, ApiError> {
        who.account.must_be_owner("mounting a directory of the host")?;
        let (plane, sandbox) = (Arc::clone(self), self.find(who)?);
        spawn_detached(async move {
            let _one_transition = sandbox.transition.lock().await;
            let before = sandbox.snapshot();
            if before.removing || !matches!(before.status, Status::Running | Status::Stopped | Status::Failed) {
                return Err(not_running(&before));
            }
            let (mount, directory) = plane.resolve_mount(mount).await?;
            if let Some(same) = before.mounts.iter().find(|other| other.sandbox_path == mount.sandbox_path) {
                if *same != mount {
                    return Err(taken(&mount.sandbox_path));
                }
                if sandbox.vm().is_some() {
                    return Ok(plane.info(&before));
                }
                let change = |record: &mut Record| drop(record.directories.insert(mount.sandbox_path, directory));
                return Ok(plane.info(&plane.save(&sandbox, change).await?));
            }
            let mounts = check(&[before.mounts.as_slice(), std::slice::from_ref(&mount)].concat())?;
            plane.room_for_mounts(&before.id)?;
            let change = |record: &mut Record| {
                record.mounts = mounts;
                record.directories.insert(mount.sandbox_path.clone(), directory);
            };
            let record = plane.save(&sandbox, change).await?;
            if let Some(vm) = sandbox.vm()
                && let Err(error) = plane.mount(&sandbox, &vm, &mount).await
            {
                let undo = |record: &mut Record| {
                    (record.mounts, record.directories) = (before.mounts, before.directories);
                };
                plane.save(&sandbox, undo).await?;
                return Err(error.sandbox(record.id));
            }
            Ok(plane.info(&record))
        })
        .await
    }

    /// Resolves the mounts of a sandbox that is to be made.
    pub(crate) async fn resolve_mounts(&self, record: &mut Record) -> Result<(), ApiError> {
        if record.mounts.is_empty() {
            return Ok(());
        }
        self.room_for_mounts(&record.id)?;
        for mount in &mut record.mounts {
            let (resolved, directory) = self.resolve_mount(mount.clone()).await?;
            record.directories.insert(resolved.sandbox_path.clone(), directory);
            *mount = resolved;
        }
        Ok(())
    }

    async fn resolve_mount(&self, mount: Mount) -> Result<(Mount, DirectoryIdentity), ApiError> {
        let mut mount = check(&[mount])?.remove(0);
        let home = self.config.home.clone();
        on_disk(move || {
            let directory = on_host::resolve(&mut mount, &home)?;
            Ok((mount, directory))
        })
        .await
    }

    /// Refuses more sandboxes with mounts than leave descriptors for everything else.
    fn room_for_mounts(&self, id: &str) -> Result<(), ApiError> {
        let others = self.all().into_iter().filter(|sandbox| {
            let record = sandbox.record();
            record.id != id && record.is_living() && !record.mounts.is_empty()
        });
        let (others, most) = (others.count(), HandleBudget::sandboxes());
        if others < most {
            return Ok(());
        }
        let message = format!("{others} sandboxes with mounts run; this host's limit of open files allows no more");
        Err(ApiError::new(ErrorCode::OutOfResources, message)
            .hint("stop one of them, or raise the limit (ulimit -n, LimitNOFILE=) and run `heyvm daemon restart`"))
    }

    /// Mounts everything in a VM that has just been started.
    pub(crate) async fn mount_all(&self, sandbox: &Arc<Sandbox>, vm: &Arc<dyn Vm>) -> Result<(), ApiError> {
        let record = sandbox.snapshot();
        if !record.mounts.is_empty() {
            self.room_for_mounts(&record.id)?;
        }
        for mount in &record.mounts {
            if !record.directories.contains_key(&mount.sandbox_path) {
                self.identify(sandbox, mount).await?;
            }
            self.mount(sandbox, vm, mount).await?;
        }
        Ok(())
    }

    /// Identifies the directory of a mount that an earlier version recorded by its path alone.
    async fn identify(&self, sandbox: &Arc<Sandbox>, mount: &Mount) -> Result<(), ApiError> {
        let path = PathBuf::from(&mount.host_path);
        let identity = on_disk(move || on_host::identify(&path)).await?;
        let sandbox_path = mount.sandbox_path.clone();
        self.save(sandbox, |record| drop(record.directories.insert(sandbox_path, identity))).await?;
        Ok(())
    }

    /// Goes on with the mounts of a VM that another daemon has started.
    pub(crate) fn resume_mounts(&self, sandbox: &Arc<Sandbox>, vm: &Arc<dyn Vm>) {
        for mount in sandbox.snapshot().mounts {
            let history = History::Kept(self.journal(sandbox, &mount));
            tokio::spawn(Serving::new(self, sandbox, vm, mount, history).serve(None));
        }
    }

    async fn mount(&self, sandbox: &Arc<Sandbox>, vm: &Arc<dyn Vm>, mount: &Mount) -> Result<(), ApiError> {
        let history = History::Fresh(self.journal(sandbox, mount));
        let (mounted, is_mounted) = oneshot::channel();
        tokio::spawn(Serving::new(self, sandbox, vm, mount.clone(), history).serve(Some(mounted)));
        is_mounted.await.map_err(|error| errors::internal(&error))?
    }

    /// One file per mount; the name is made of what the sandbox and the mount are.
    fn journal(&self, sandbox: &Sandbox, mount: &Mount) -> PathBuf {
        use sha2::{Digest, Sha256};
        let dir = journals(&self.config.home, &sandbox.record().id);
        dir.join(hex::encode(&Sha256::digest(&mount.sandbox_path)[..8]))
    }

    /// Forgets what a guest knew of its mounts. The host's directories are not touched.
    pub(crate) async fn forget_mounts(&self, id: &str) {
        let journals = journals(&self.config.home, id);
        if let Err(error) = blocking(move || on_host::forget(&journals)).await {
            tracing::warn!(%error, id, "the journals of a sandbox's mounts are left");
        }
    }
}

fn journals(home: &Path, id: &str) -> PathBuf {
    home.join(DIRECTORY).join(id)
}

/// One mount of one VM.
struct Serving {
    sandbox: Arc<Sandbox>,
    vm: Arc<dyn Vm>,
    mount: Mount,
    /// The directory that was checked; `None` where an earlier version recorded its path alone.
    directory: Option<DirectoryIdentity>,
    history: History,
    home: PathBuf,
}

type Mounted = oneshot::Sender<Result<(), ApiError>>;

impl Serving {
    fn new(plane: &ControlPlane, sandbox: &Arc<Sandbox>, vm: &Arc<dyn Vm>, mount: Mount, history: History) -> Self {
        let directory = sandbox.record().directories.get(&mount.sandbox_path).cloned();
        let home = plane.config.home.clone();
        Self { sandbox: Arc::clone(sandbox), vm: Arc::clone(vm), mount, directory, history, home }
    }

    /// Serves it until its VM is the sandbox's no more or somebody in the guest has unmounted it. With `mounted` somebody
    /// waits for it: the first failure is told there, and is the end.
    async fn serve(self, mut mounted: Option<Mounted>) {
        let (mut server, mut pause) = (None, FIRST_PAUSE);
        while self.is_wanted() || mounted.is_some() {
            let began = Instant::now();
            let served = supervised::run("serving a mount", self.serve_once(&mut server, &mut mounted)).await;
            match served.map_err(|panicked| errors::internal(&panicked)).flatten() {
                Ok(()) => return,
                Err(error) => match mounted.take() {
                    Some(mounted) => return drop(mounted.send(Err(error))),
                    None => tracing::warn!(%error, path = self.mount.host_path, "a mount is not served for a moment"),
                },
            }
            // What was served for a while begins anew.
            pause = if began.elapsed() > LONGEST_PAUSE { FIRST_PAUSE } else { pause };
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn is_wanted(&self) -> bool {
        self.sandbox.vm().is_some_and(|now| Arc::ptr_eq(&now, &self.vm))
    }

    /// One call to the agent, to its end.
    async fn serve_once(
        &self,
        server: &mut Option<Arc<Server>>,
        mounted: &mut Option<Mounted>,
    ) -> Result<(), ApiError> {
        let server = match server {
            Some(server) => Arc::clone(server),
            None => Arc::clone(server.insert(self.open().await?)),
        };
        let called = tokio::time::timeout(MOUNTING, self.call()).await;
        let (input, mut requests) = called.map_err(|_| not_mounted()).flatten()?;
        if let Some(mounted) = mounted.take() {
            mounted.send(Ok(())).ok();
        }
        let (to_server, for_server) = mpsc::channel(QUEUE);
        let (from_server, mut answers) = mpsc::channel(QUEUE);
        tokio::task::spawn_blocking(move || server.serve(for_server, from_server))
            .await
            .map_err(|error| errors::internal(&error))?
            .map_err(|error| errors::internal(&error))?;
        let passing_back = async {
            while let Some(answer) = answers.recv().await {
                if input.send(MountInput { start: None, answer }).await.is_err() {
                    return;
                }
            }
        };
        let passing_on = async {
            loop {
                match requests.message().await {
                    Ok(Some(MountOutput { request })) => {
                        if to_server.send(request).await.is_err() {
                            return Ok(());
                        }
                    }
                    Ok(None) => return Ok(()),
                    Err(status) => return Err(errors::agent(&status)),
                }
            }
        };
        tokio::select! {
            ended = passing_on => ended,
            () = passing_back => Ok(()),
            _ = self.vm.exited() => Ok(()),
        }
    }

    async fn open(&self) -> Result<Arc<Server>, ApiError> {
        let (path, read_only, home) = (PathBuf::from(&self.mount.host_path), self.mount.read_only, self.home.clone());
        let (known, history) = (self.directory.clone(), self.history.clone());
        let budget = Arc::clone(&self.sandbox.mount_handles);
        on_disk(move || {
            let directory = on_host::open(&path, known.as_ref(), &home)?;
            let (History::Fresh(journal) | History::Kept(journal)) = &history;
            on_host::prepare(journal);
            Ok(Arc::new(Server::open(directory, read_only, &history, &budget)))
        })
        .await
    }

    /// Returns when it is mounted.
    async fn call(&self) -> Result<(mpsc::Sender<MountInput>, Streaming<MountOutput>), ApiError> {
        let (input, receiver) = mpsc::channel(QUEUE);
        let Mount { sandbox_path, read_only, .. } = &self.mount;
        let start = MountStart { path: sandbox_path.clone(), read_only: *read_only };
        let first = MountInput { start: Some(start), ..MountInput::default() };
        input.try_send(first).map_err(|error| errors::internal(&error))?;
        let mut client = AgentConnection::client(&self.vm.agent()).await.map_err(errors::vm)?;
        let refused = |status: tonic::Status| match status.code() {
            Code::Unimplemented | Code::FailedPrecondition => ApiError::new(
                ErrorCode::Unsupported,
                format!("mounts are too new for this sandbox's guest: {}", errors::agent(&status).message),
            )
            .hint("run ./quickstart again, or heyvm images import-kernel DIR, and make the sandbox anew"),
            _ => errors::agent(&status),
        };
        let mut requests = client.mount(ReceiverStream::new(receiver)).await.map_err(refused)?.into_inner();
        match requests.message().await.map_err(refused)? {
            Some(_mounted) => Ok((input, requests)),
            None => Err(not_mounted()),
        }
    }
}

fn not_mounted() -> ApiError {
    ApiError::new(ErrorCode::SandboxUnreachable, "the sandbox's agent did not mount it")
        .hint("heyvm get says whether the sandbox still runs")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use heyvm_mounts::Directory;

    use super::{on_host::resolve, *};

    fn mount(host: &Path, sandbox: &str) -> Mount {
        Mount { host_path: host.to_str().unwrap().into(), sandbox_path: sandbox.into(), read_only: false }
    }

    #[test]
    fn what_may_be_mounted_where() {
        let dir = tempfile::tempdir().unwrap();
        let (home, project) = (dir.path().join("home"), dir.path().join("project"));
        fs::create_dir_all(home.join("sandboxes")).unwrap();
        fs::create_dir(&project).unwrap();
        fs::write(project.join("file"), "").unwrap();
        std::os::unix::fs::symlink(&home, project.join("link")).unwrap();

        let good = check(&[mount(&project, "/data/./x/")]).unwrap();
        assert_eq!(good[0].sandbox_path, "/data/x");
        use ErrorCode::{Forbidden, InvalidArgument, InvalidDirectory};
        for (host, code) in [
            (Path::new("relative"), InvalidArgument),
            (Path::new(""), InvalidArgument),
            (&project.join("nowhere"), InvalidDirectory),
            (&project.join("file"), InvalidDirectory),
            (Path::new("/"), Forbidden),
            (Path::new("/proc/self"), Forbidden),
            (Path::new("/dev"), Forbidden),
            (&home, Forbidden),
            (&home.join("sandboxes"), Forbidden),
            (dir.path(), Forbidden),
            (&project.join("link"), Forbidden),
            (&project.join("../home"), Forbidden),
        ] {
            let checked = check(&[mount(host, "/data")]).and_then(|mut mounts| resolve(&mut mounts[0], &home));
            let error = checked.unwrap_err();
            assert!(error.code == code && error.hint.is_some(), "{host:?}: {error:?}");
        }
        for sandbox in ["", "data", "/", "/.", "/proc", "/proc/x", "/sys", "/dev/shm", "/a/../b", "/a\0b"] {
            let error = check(&[mount(&project, sandbox)]).unwrap_err();
            assert!(error.code == InvalidArgument && error.hint.is_some(), "{sandbox:?}: {error:?}");
        }
        let twice = [mount(&project, "/data"), mount(&project, "/data/")];
        assert!(check(&twice).unwrap_err().message.contains("already"));
        let many: Vec<_> = (0..=MAX_MOUNTS).map(|number| mount(&project, &format!("/data/{number}"))).collect();
        assert_eq!(check(&many).unwrap_err().code, InvalidArgument);
        check(&many[1..]).unwrap();
    }

    #[test]
    fn links_are_resolved_once() {
        let dir = tempfile::tempdir().unwrap();
        let dir = fs::canonicalize(dir.path()).unwrap();
        let (home, project) = (dir.join("home"), dir.join("project"));
        fs::create_dir(&home).unwrap();
        fs::create_dir(&project).unwrap();
        std::os::unix::fs::symlink("project", dir.join("link")).unwrap();
        let mut linked = mount(&dir.join("link"), "/data");
        let directory = resolve(&mut linked, &home).unwrap();
        assert_eq!(Path::new(&linked.host_path), project);
        Directory::reopen(&project, &directory).unwrap();
    }
}
