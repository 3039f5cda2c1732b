//! The calls of `agent.proto`, one method each: checks that the guest is a sandbox by now and hands over.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use heyvm_agent_protocol::v1::{
    ClockReply, ClockRequest, DialInput, DialOutput, ExecInput, ExecOutput, ExecStart, ExecStarted, Exit, FileChunk,
    FileInfo, FreezeDiskReply, FreezeDiskRequest, GrowDiskReply, GrowDiskRequest, ListDirReply, ListDirRequest,
    MainEvent, MetricsReply, MetricsRequest, MountInput, MountOutput, PackRequest, PersonalizeReply,
    PersonalizeRequest, PortStatusReply, PortStatusRequest, ReadFileRequest, RemoveReply, RemoveRequest, ShutdownReply,
    ShutdownRequest, StartMainReply, StartMainRequest, StatRequest, ThawDiskReply, ThawDiskRequest, UnpackInput,
    UnpackReply, WarmUpReply, WarmUpRequest, WatchMainRequest, WriteFileInput, WriteFileReply, agent_server::Agent,
    exec_input, exec_output,
};
use tokio::{
    sync::{Mutex, mpsc},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    clock,
    disk::{self, Stillness},
    exec::{self, Run, session::Sessions},
    files::{archive, blocking, content, listing},
    main_command::MainCommand,
    metrics,
    mounts::Mounts,
    net,
    oom::OomKills,
    personalize::{self, OldRoot, PersonalizeError},
    process::{
        Cgroups, Command, Reaper, SpawnError, Spawner,
        command::{self, CommandError},
    },
    sandbox::Sandbox,
    shutdown, warm_up,
};

/// Longer time-outs are none.
const MAX_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);

/// The agent as the host sees it.
pub struct Service {
    spawner: Arc<Spawner>,
    sandbox: RwLock<Option<Arc<Sandbox>>>,
    /// Held while the guest becomes a sandbox or ends.
    stage: Mutex<Stage>,
    sessions: Arc<Sessions>,
    main: Arc<MainCommand>,
    oom_kills: Arc<OomKills>,
    stillness: Arc<Stillness>,
    mounts: Mounts,
}

/// ```text
/// fresh ──Personalize(reserve)──▶ reserved ──Personalize──▶ personal
///   └───────────────────────Personalize──────────────────────▲
/// ```
#[derive(Default)]
enum Stage {
    #[default]
    Fresh,
    Reserved(OldRoot),
    Personal(OldRoot),
}

impl Service {
    /// An agent that waits for `Personalize`; children run in cgroups below the one whose directory is `cgroup`.
    pub fn new(reaper: Arc<Reaper>, cgroup: Option<OwnedFd>) -> Self {
        Self {
            spawner: Arc::new(Spawner { reaper, cgroups: cgroup.map(Cgroups::below) }),
            sandbox: RwLock::default(),
            stage: Mutex::default(),
            sessions: Arc::default(),
            main: Arc::default(),
            oom_kills: Arc::default(),
            stillness: Arc::default(),
            mounts: Mounts::default(),
        }
    }

    /// An agent that serves the host it is on as it is.
    pub fn personalized(reaper: Arc<Reaper>, cgroup: Option<OwnedFd>, sandbox: Sandbox) -> Self {
        let service = Self::new(reaper, cgroup);
        service.become_sandbox(sandbox);
        service
    }

    /// Whether this guest is a sandbox by now.
    pub fn is_sandbox(&self) -> bool {
        self.sandbox().is_ok()
    }

    fn become_sandbox(&self, sandbox: Sandbox) {
        *self.sandbox.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(sandbox));
    }

    /// The top of the sandbox's disk, which is not to be seen from its root.
    async fn disk(&self) -> Result<File, Status> {
        match &*self.stage.lock().await {
            Stage::Personal(old_root) => {
                old_root.disk().map_err(|error| Status::internal(format!("the disk: {error}")))
            }
            _ => Err(Status::failed_precondition("this guest has no disk of its own")),
        }
    }

    fn sandbox(&self) -> Result<Arc<Sandbox>, Status> {
        let sandbox = self.sandbox.read().unwrap_or_else(PoisonError::into_inner);
        sandbox.clone().ok_or_else(|| Status::failed_precondition("this guest is not a sandbox yet"))
    }
}

/// Waits for the disk on a thread of its own.
async fn on_the_disk<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)));
    done.map_err(|error| match error.kind() {
        io::ErrorKind::ResourceBusy => Status::failed_precondition("the disk is held still already"),
        _ => Status::internal(format!("the disk: {error}")),
    })
}

type Replies<T> = Response<ReceiverStream<Result<T, Status>>>;

fn stream<T>(receiver: mpsc::Receiver<Result<T, Status>>) -> Replies<T> {
    Response::new(ReceiverStream::new(receiver))
}

impl From<PersonalizeError> for Status {
    fn from(error: PersonalizeError) -> Self {
        match error {
            PersonalizeError::Request(_) => Self::invalid_argument(error.to_string()),
            PersonalizeError::Step { .. } => Self::internal(error.to_string()),
        }
    }
}

/// Why nothing was started: the caller's mistake, or an end with an exit code before the beginning.
enum NotStarted {
    Refused(Status),
    Ended(Exit),
}

impl From<CommandError> for NotStarted {
    fn from(error: CommandError) -> Self {
        match error {
            CommandError::User(_) => Self::Ended(Exit { code: 126, error: error.to_string(), ..Exit::default() }),
            _ => Self::Refused(Status::invalid_argument(error.to_string())),
        }
    }
}

impl From<NotStarted> for Status {
    fn from(reason: NotStarted) -> Self {
        match reason {
            NotStarted::Refused(status) => status,
            NotStarted::Ended(exit) => Self::invalid_argument(exit.error),
        }
    }
}

/// The longest argument, and all of them together, are the kernel's to limit.
const TOO_LONG: &str = "an argument is longer than 128 KiB, or all together exceed 2 MiB; pass it on standard input, or in \
                        a file";

fn not_started(start: &ExecStart, error: &SpawnError) -> NotStarted {
    let name = command::name(start);
    let error_text = match error {
        SpawnError::Exec(cause) if cause.raw_os_error() == Some(nix::libc::E2BIG) => format!("{name}: {TOO_LONG}"),
        SpawnError::Exec(_) if error.code() == 127 && name == command::SHELL => {
            format!(
                "{name}: {error}; scripts and sessions need a shell, which this image does not have: run a program \
                     with its arguments as words"
            )
        }
        _ => format!("{name}: {error}"),
    };
    NotStarted::Ended(Exit { code: error.code(), error: error_text, ..Exit::default() })
}

/// What it takes to start something.
struct Launcher {
    spawner: Arc<Spawner>,
    sessions: Arc<Sessions>,
    sandbox: Arc<Sandbox>,
}

impl Launcher {
    fn start(&self, start: &ExecStart) -> Result<(crate::process::Child, crate::process::Streams), NotStarted> {
        let session = self.sessions.get(&start.session);
        let command = Command::new(start, &self.sandbox, session.as_ref())?;
        self.spawner.start(&command).or_else(|error| {
            let words = (start.shell && start.session.is_empty() && start.argv.len() == 1 && error.code() == 127)
                .then(|| command::words(&start.argv[0]))
                .flatten();
            let Some(argv) = words else { return Err(not_started(start, &error)) };
            // An image without a shell: nothing in these words needs one.
            let direct = ExecStart { argv, shell: false, ..start.clone() };
            let command = Command::new(&direct, &self.sandbox, None)?;
            self.spawner.start(&command).map_err(|second| match second.code() {
                127 => not_started(start, &error),
                _ => not_started(&direct, &second),
            })
        })
    }
}

impl Service {
    fn launcher(&self) -> Result<Launcher, Status> {
        let (spawner, sessions) = (Arc::clone(&self.spawner), Arc::clone(&self.sessions));
        Ok(Launcher { spawner, sessions, sandbox: self.sandbox()? })
    }

    /// Does what looks at paths of the sandbox: at once, or on a thread of its own where a path may be a mount's, which
    /// this thread serves.
    async fn look<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
        if !self.mounts.any() {
            return Ok(work());
        }
        tokio::task::spawn_blocking(work).await.map_err(|error| Status::internal(format!("the agent failed: {error}")))
    }
}

#[tonic::async_trait]
impl Agent for Service {
    type ExecStream = ReceiverStream<Result<ExecOutput, Status>>;
    type WatchMainStream = ReceiverStream<Result<MainEvent, Status>>;
    type DialStream = ReceiverStream<Result<DialOutput, Status>>;
    type MountStream = ReceiverStream<Result<MountOutput, Status>>;
    type ReadFileStream = ReceiverStream<Result<FileChunk, Status>>;
    type PackStream = ReceiverStream<Result<FileChunk, Status>>;

    async fn personalize(&self, request: Request<PersonalizeRequest>) -> Result<Response<PersonalizeReply>, Status> {
        let request = request.into_inner();
        let mut stage = self.stage.lock().await;
        *stage = match (std::mem::take(&mut *stage), request.reserve) {
            (Stage::Fresh, true) => Stage::Reserved(personalize::reserve(&request)?),
            (Stage::Fresh, false) => Stage::Personal(personalize::personalize(&request, None)?),
            (Stage::Reserved(root), false) => Stage::Personal(personalize::personalize(&request, Some(root))?),
            // Asked for a second time: it is done.
            (stage, _) => stage,
        };
        self.become_sandbox(Sandbox::new(request));
        let kernel = nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned());
        let reply =
            PersonalizeReply { kernel: kernel.unwrap_or_default(), agent_version: env!("CARGO_PKG_VERSION").into() };
        Ok(Response::new(reply))
    }

    async fn warm_up(&self, _: Request<WarmUpRequest>) -> Result<Response<WarmUpReply>, Status> {
        if self.sandbox().is_ok() {
            return Err(Status::failed_precondition("only a template is warmed up"));
        }
        let bytes_read = warm_up::warm_up(&self.spawner).await;
        Ok(Response::new(WarmUpReply { bytes_read, clock_source: clock::source() }))
    }

    async fn exec(&self, request: Request<Streaming<ExecInput>>) -> Result<Replies<ExecOutput>, Status> {
        let mut requests = request.into_inner();
        let start = match requests.message().await?.and_then(|first| first.kind) {
            Some(exec_input::Kind::Start(start)) => start,
            _ => return Err(Status::invalid_argument("the first message of a call must say what to run")),
        };
        let (replies, receiver) = mpsc::channel(exec::QUEUE);
        let launcher = self.launcher()?;
        let (started, start) = self.look(move || (launcher.start(&start), start)).await?;
        let (child, streams) = match started {
            Ok(started) => started,
            Err(NotStarted::Refused(status)) => return Err(status),
            Err(NotStarted::Ended(exit)) => {
                replies.try_send(Ok(ExecOutput { kind: Some(exec_output::Kind::Exit(exit)) })).ok();
                return Ok(stream(receiver));
            }
        };
        let timeout = Duration::from_millis(start.timeout_ms).min(MAX_TIMEOUT);
        let deadline = (!timeout.is_zero()).then(|| Instant::now() + timeout);
        if start.detach {
            let started = ExecStarted { pid: child.pid.as_raw() };
            replies.try_send(Ok(ExecOutput { kind: Some(exec_output::Kind::Started(started)) })).ok();
            tokio::spawn(exec::detached(child, deadline));
            return Ok(stream(receiver));
        }
        let oom_kills = Arc::clone(&self.oom_kills);
        let sessions = Arc::clone(&self.sessions);
        let run = Run { child, streams, replies, requests, deadline, oom_kills };
        tokio::spawn(async move {
            run.finish(|session| sessions.put(&start.session, session)).await;
        });
        Ok(stream(receiver))
    }

    async fn start_main(&self, request: Request<StartMainRequest>) -> Result<Response<StartMainReply>, Status> {
        let StartMainRequest { start, stop_signal } = request.into_inner();
        let start = start.ok_or_else(|| Status::invalid_argument("there is no command"))?;
        if start.pty.is_some() || start.stdin || !start.session.is_empty() || start.detach {
            let what = "a start command has neither terminal nor input nor session";
            return Err(Status::invalid_argument(what));
        }
        let (launcher, main, oom_kills) = (self.launcher()?, Arc::clone(&self.main), Arc::clone(&self.oom_kills));
        let pid = self.look(move || main.start(&oom_kills, stop_signal, || launcher.start(&start))).await??;
        Ok(Response::new(StartMainReply { pid }))
    }

    async fn watch_main(&self, request: Request<WatchMainRequest>) -> Result<Replies<MainEvent>, Status> {
        self.sandbox()?;
        Ok(stream(self.main.watch(request.get_ref().from_offset)?))
    }

    async fn dial(&self, request: Request<Streaming<DialInput>>) -> Result<Replies<DialOutput>, Status> {
        drop(request);
        Err(Status::unimplemented("ports have a connection of their own"))
    }

    async fn port_status(&self, request: Request<PortStatusRequest>) -> Result<Response<PortStatusReply>, Status> {
        self.sandbox()?;
        let PortStatusRequest { port, wait_ms } = request.into_inner();
        let port = u16::try_from(port).map_err(|_| Status::invalid_argument(format!("{port} is not a port")))?;
        let wait = Duration::from_millis(u64::from(wait_ms));
        Ok(Response::new(PortStatusReply { listening: net::listening::listens_within(port, wait).await }))
    }

    async fn read_file(&self, request: Request<ReadFileRequest>) -> Result<Replies<FileChunk>, Status> {
        self.sandbox()?;
        Ok(stream(content::read(request.into_inner().path).await?))
    }

    async fn write_file(
        &self,
        request: Request<Streaming<WriteFileInput>>,
    ) -> Result<Response<WriteFileReply>, Status> {
        self.sandbox()?;
        Ok(Response::new(content::write(request.into_inner()).await?))
    }

    async fn stat(&self, request: Request<StatRequest>) -> Result<Response<FileInfo>, Status> {
        self.sandbox()?;
        Ok(Response::new(blocking(move || listing::stat(&request.get_ref().path)).await?))
    }

    async fn list_dir(&self, request: Request<ListDirRequest>) -> Result<Response<ListDirReply>, Status> {
        self.sandbox()?;
        Ok(Response::new(blocking(move || listing::list(&request.get_ref().path)).await?))
    }

    async fn remove(&self, request: Request<RemoveRequest>) -> Result<Response<RemoveReply>, Status> {
        self.sandbox()?;
        let RemoveRequest { path, recursive } = request.into_inner();
        blocking(move || listing::remove(&path, recursive)).await?;
        Ok(Response::new(RemoveReply {}))
    }

    async fn unpack(&self, request: Request<Streaming<UnpackInput>>) -> Result<Response<UnpackReply>, Status> {
        let sandbox = self.sandbox()?;
        Ok(Response::new(archive::unpack(request.into_inner(), &sandbox.user).await?))
    }

    async fn pack(&self, request: Request<PackRequest>) -> Result<Replies<FileChunk>, Status> {
        self.sandbox()?;
        Ok(stream(archive::pack(request.into_inner().path).await?))
    }

    async fn mount(&self, request: Request<Streaming<MountInput>>) -> Result<Replies<MountOutput>, Status> {
        self.sandbox()?;
        Ok(stream(self.mounts.attach(request.into_inner()).await?))
    }

    async fn metrics(&self, _: Request<MetricsRequest>) -> Result<Response<MetricsReply>, Status> {
        self.sandbox()?;
        Ok(Response::new(metrics::read()))
    }

    async fn clock(&self, request: Request<ClockRequest>) -> Result<Response<ClockReply>, Status> {
        let reply = clock::answer(request.into_inner());
        reply.map(Response::new).map_err(|error| Status::internal(format!("the clock: {error}")))
    }

    async fn shutdown(&self, request: Request<ShutdownRequest>) -> Result<Response<ShutdownReply>, Status> {
        self.sandbox()?;
        let stage = self.stage.lock().await;
        let (Stage::Reserved(old_root) | Stage::Personal(old_root)) = &*stage else {
            return Err(Status::failed_precondition("this machine is not the agent's to switch off"));
        };
        // Whoever waits to write could not be ended.
        self.stillness.end_or_say();
        shutdown::end_processes(Duration::from_millis(request.get_ref().grace_ms), self.main.stops_by()).await;
        shutdown::write_back().await;
        self.mounts.close().await;
        shutdown::close_disk(old_root);
        tokio::spawn(shutdown::power_off());
        Ok(Response::new(ShutdownReply {}))
    }

    async fn grow_disk(&self, request: Request<GrowDiskRequest>) -> Result<Response<GrowDiskReply>, Status> {
        let (disk, bytes) = (self.disk().await?, request.into_inner().bytes);
        on_the_disk(move || disk::grow_soon(&disk, bytes)).await?;
        Ok(Response::new(GrowDiskReply {}))
    }

    async fn freeze_disk(&self, request: Request<FreezeDiskRequest>) -> Result<Response<FreezeDiskReply>, Status> {
        let deadline = Duration::from_millis(request.into_inner().deadline_ms);
        let (disk, stillness) = (self.disk().await?, Arc::clone(&self.stillness));
        on_the_disk(move || stillness.begin(disk, deadline)).await?;
        Ok(Response::new(FreezeDiskReply {}))
    }

    async fn thaw_disk(&self, _: Request<ThawDiskRequest>) -> Result<Response<ThawDiskReply>, Status> {
        let stillness = Arc::clone(&self.stillness);
        let was_frozen = on_the_disk(move || stillness.end()).await?;
        Ok(Response::new(ThawDiskReply { was_frozen }))
    }
}
