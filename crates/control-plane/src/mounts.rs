//! Directories of this host in a sandbox: which may be mounted where, and who serves them for as long as its VM runs.
//!
//! ```text
//!  create, start ──▶ mounted ──▶ served ◀─┐  the connection broke, or another daemon has adopted the VM
//!  mount-add    ──▶    │           └──────┘
//!                      └── error: nothing of it stays
//! ```
//! The file server is `heyvm-mounts`; what the guest does with it is the agent's affair.

use std::{
    fs,
    path::{Component, Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use heyvm_agent_protocol::v1::{MountInput, MountOutput, MountStart};
use heyvm_api::{
    ApiError, ErrorCode,
    error::with_causes,
    sandbox::{Mount, SandboxInfo, Status},
};
use heyvm_mounts::{History, Server};
use heyvm_vm::{AgentConnection, Vm};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

use crate::{ControlPlane, Sandbox, Who, apart, errors, not_running};

/// Mounts of one sandbox, at most.
const MAX_MOUNTS: usize = heyvm_api::limits::MOUNTS.most;
/// Never covered in a sandbox, nor mounted from here.
const SYSTEM: [&str; 3] = ["/proc", "/sys", "/dev"];
/// Requests and answers that may wait.
const QUEUE: usize = 16;
/// A guest mounts within a moment, or never.
const MOUNTING: Duration = Duration::from_secs(60);
/// First and longest pause before what could not be served is tried again.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Where it is written down what guests know of their mounts, below the home.
const DIRECTORY: &str = "mounts";

/// Checks all mounts of one sandbox; the paths of the answer are whole and plain. The one place that says which
/// directories of this host a sandbox may have.
pub(crate) fn check(mounts: &[Mount], home: &Path) -> Result<Vec<Mount>, ApiError> {
    if mounts.len() > MAX_MOUNTS {
        let message = format!("{} mounts are more than a sandbox can have", mounts.len());
        return Err(invalid(message, &format!("use up to {MAX_MOUNTS}: mount a directory that holds several")));
    }
    let mut checked: Vec<Mount> = Vec::new();
    for mount in mounts {
        let host_path = host_path(&mount.host_path, home)?;
        let sandbox_path = sandbox_path(&mount.sandbox_path)?;
        if checked.iter().any(|other| other.sandbox_path == sandbox_path) {
            let message = format!("there is a mount at {sandbox_path} already");
            return Err(invalid(message, "every mount needs a sandbox_path of its own"));
        }
        checked.push(Mount { host_path, sandbox_path, read_only: mount.read_only });
    }
    Ok(checked)
}

fn host_path(asked: &str, home: &Path) -> Result<String, ApiError> {
    if !asked.starts_with('/') {
        return Err(invalid(format!("host_path {asked:?} is not an absolute path"), "begin it with /"));
    }
    let hint = "name a directory that is there, for example one of your project";
    let no_directory = |why: String| {
        ApiError::new(ErrorCode::InvalidDirectory, format!("host_path {asked:?} cannot be mounted: {why}")).hint(hint)
    };
    let path = fs::canonicalize(asked).map_err(|error| no_directory(error.to_string()))?;
    if !path.is_dir() {
        return Err(no_directory("it is no directory".into()));
    }
    let home = fs::canonicalize(home).unwrap_or_else(|_| home.to_owned());
    let why = if path == Path::new("/") || SYSTEM.iter().any(|system| path.starts_with(system)) {
        "the whole host and its kernel's files are not for a sandbox"
    } else if path.starts_with(&home) || home.starts_with(&path) {
        "heyvm's own files are in it"
    } else {
        let whole = path.into_os_string().into_string();
        return whole.map_err(|path| no_directory(format!("{} is not UTF-8", path.display())));
    };
    Err(ApiError::new(ErrorCode::Forbidden, format!("host_path {asked:?} cannot be mounted: {why}")).hint(hint))
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
    /// Mounts a directory of this host into a sandbox: at once where it runs, else when it starts.
    pub async fn add_mount(self: &Arc<Self>, who: &Who, mount: Mount) -> Result<SandboxInfo, ApiError> {
        who.account.must_be_owner("mounting a directory of the host")?;
        let (plane, sandbox) = (Arc::clone(self), self.find(who)?);
        apart(async move {
            let _one_transition = sandbox.transition.lock().await;
            let before = sandbox.snapshot();
            if before.removing || !matches!(before.status, Status::Running | Status::Stopped | Status::Failed) {
                return Err(not_running(&before));
            }
            let mounts = check(&[before.mounts.as_slice(), &[mount]].concat(), &plane.config.home)?;
            let record = plane.save(&sandbox, |record| record.mounts = mounts).await?;
            if let (Some(vm), Some(added)) = (sandbox.vm(), record.mounts.last())
                && let Err(error) = plane.mount(&sandbox, &vm, added).await
            {
                plane.save(&sandbox, |record| record.mounts = before.mounts).await?;
                return Err(error.sandbox(record.id));
            }
            Ok(plane.info(&record))
        })
        .await
    }

    /// Mounts everything in a VM that has just been started.
    pub(crate) async fn mount_all(&self, sandbox: &Arc<Sandbox>, vm: &Arc<dyn Vm>) -> Result<(), ApiError> {
        let record = sandbox.snapshot();
        // What may be mounted, or is there, may have changed since.
        for mount in check(&record.mounts, &self.config.home)? {
            self.mount(sandbox, vm, &mount).await?;
        }
        Ok(())
    }

    /// Goes on with the mounts of a VM that another daemon has started.
    pub(crate) fn resume_mounts(&self, sandbox: &Arc<Sandbox>, vm: &Arc<dyn Vm>) {
        for mount in sandbox.snapshot().mounts {
            let history = History::Kept(self.journal(sandbox, &mount));
            tokio::spawn(Serving::new(sandbox, vm, mount, history).serve(None));
        }
    }

    async fn mount(&self, sandbox: &Arc<Sandbox>, vm: &Arc<dyn Vm>, mount: &Mount) -> Result<(), ApiError> {
        let history = History::Fresh(self.journal(sandbox, mount));
        let (mounted, is_mounted) = oneshot::channel();
        tokio::spawn(Serving::new(sandbox, vm, mount.clone(), history).serve(Some(mounted)));
        is_mounted.await.map_err(|error| errors::internal(&error))?
    }

    /// One file per mount; the name is made of what the sandbox and the mount are.
    fn journal(&self, sandbox: &Sandbox, mount: &Mount) -> PathBuf {
        use sha2::{Digest, Sha256};
        let dir = journals(&self.config.home, &sandbox.record().id);
        if let Err(error) = prepare(&dir) {
            tracing::warn!(%error, "the directory for the journals of mounts cannot be made");
        }
        dir.join(hex::encode(&Sha256::digest(&mount.sandbox_path)[..8]))
    }

    /// Forgets what a guest knew of its mounts. The host's directories are not touched.
    pub(crate) fn forget_mounts(&self, id: &str) {
        let _ = fs::remove_dir_all(journals(&self.config.home, id));
    }
}

fn journals(home: &Path, id: &str) -> PathBuf {
    home.join(DIRECTORY).join(id)
}

fn prepare(dir: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// One mount of one VM.
struct Serving {
    sandbox: Arc<Sandbox>,
    vm: Arc<dyn Vm>,
    mount: Mount,
    history: History,
}

type Mounted = oneshot::Sender<Result<(), ApiError>>;

impl Serving {
    fn new(sandbox: &Arc<Sandbox>, vm: &Arc<dyn Vm>, mount: Mount, history: History) -> Self {
        Self { sandbox: Arc::clone(sandbox), vm: Arc::clone(vm), mount, history }
    }

    /// Serves it until its VM is the sandbox's no more or somebody in the guest has unmounted it. With `mounted` somebody
    /// waits for it: the first failure is told there, and is the end.
    async fn serve(self, mut mounted: Option<Mounted>) {
        let (mut server, mut pause) = (None, FIRST_PAUSE);
        while self.is_wanted() || mounted.is_some() {
            let began = Instant::now();
            match self.serve_once(&mut server, &mut mounted).await {
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
            let _ = mounted.send(Ok(()));
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
        let (path, read_only) = (PathBuf::from(&self.mount.host_path), self.mount.read_only);
        let history = self.history.clone();
        let opened = tokio::task::spawn_blocking(move || Server::open(&path, read_only, &history));
        opened.await.map_err(|error| errors::internal(&error))?.map(Arc::new).map_err(|error| {
            ApiError::new(ErrorCode::InvalidDirectory, with_causes(&error))
                .hint("the directory must be there and open to the one who runs the daemon")
        })
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
    use super::*;

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

        let good = check(&[mount(&project, "/data/./x/")], &home).unwrap();
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
            let error = check(&[mount(host, "/data")], &home).unwrap_err();
            assert!(error.code == code && error.hint.is_some(), "{host:?}: {error:?}");
        }
        for sandbox in ["", "data", "/", "/.", "/proc", "/proc/x", "/sys", "/dev/shm", "/a/../b", "/a\0b"] {
            let error = check(&[mount(&project, sandbox)], &home).unwrap_err();
            assert!(error.code == InvalidArgument && error.hint.is_some(), "{sandbox:?}: {error:?}");
        }
        let twice = [mount(&project, "/data"), mount(&project, "/data/")];
        assert!(check(&twice, &home).unwrap_err().message.contains("already"));
        let many: Vec<_> = (0..=MAX_MOUNTS).map(|number| mount(&project, &format!("/data/{number}"))).collect();
        assert_eq!(check(&many, &home).unwrap_err().code, InvalidArgument);
        check(&many[1..], &home).unwrap();
    }
}
