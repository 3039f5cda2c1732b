//! An agent in this process and clients of it.

use std::{
    fs::{self, File},
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use heyvm_agent::{Reaper, Sandbox, connection, service::Service};
use heyvm_agent_protocol::{
    hello,
    v1::{agent_client::AgentClient, exec_input, exec_output, *},
};
use hyper_util::rt::TokioIo;
use tokio::{io::BufReader, sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint},
};

pub type Client = AgentClient<Channel>;

/// Nothing here takes long; a test that hangs should say so.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Agent {
    service: Arc<Service>,
}

impl Agent {
    /// One that is a sandbox already, with `dir` as its working directory.
    pub fn personalized(dir: &std::path::Path) -> Self {
        Self::in_cgroup(dir, None)
    }

    /// The same, whose commands run in cgroups below the one whose directory is `cgroup`.
    pub fn in_cgroup(dir: &std::path::Path, cgroup: Option<OwnedFd>) -> Self {
        let sandbox = Sandbox {
            env: vec![("PATH".into(), "/usr/bin:/bin".into()), ("GREETING".into(), "hello".into())],
            working_dir: dir.to_str().unwrap().into(),
            hostname: "box".into(),
            ..Sandbox::default()
        };
        Self { service: Arc::new(Service::personalized(reaper(), cgroup, sandbox)) }
    }

    /// One that waits for its first call.
    pub fn fresh() -> Self {
        Self { service: Arc::new(Service::new(reaper(), None)) }
    }

    pub async fn client(&self) -> Client {
        self.connect().await.0
    }

    /// A connection and the agent's end of it, which can be broken.
    pub async fn connect(&self) -> (Client, JoinHandle<io::Result<()>>) {
        let (host, guest) = tokio::io::duplex(64 << 10);
        let serving = tokio::spawn(connection::serve(guest, Arc::clone(&self.service)));
        let mut host = Some(host);
        let connector = tower::service_fn(move |_| {
            let host = host.take();
            async move {
                let mut host = BufReader::new(host.ok_or(io::ErrorKind::NotConnected)?);
                hello::greet(&mut host, "0123456789abcdef0123456789abcdef").await?;
                Ok::<_, io::Error>(TokioIo::new(host))
            }
        });
        let endpoint = Endpoint::from_static("http://agent").initial_stream_window_size(1 << 20);
        let channel = endpoint.connect_with_connector(connector).await.unwrap();
        (AgentClient::new(channel), serving)
    }
}

fn reaper() -> Arc<Reaper> {
    let reaper = Reaper::new(false);
    tokio::spawn(Arc::clone(&reaper).run());
    reaper
}

/// What to run.
pub fn program(argv: &[&str]) -> ExecStart {
    ExecStart { argv: argv.iter().map(ToString::to_string).collect(), ..ExecStart::default() }
}

pub fn script(text: &str) -> ExecStart {
    ExecStart { shell: true, ..program(&[text]) }
}

/// A command under way.
pub struct Call {
    pub input: mpsc::Sender<ExecInput>,
    pub output: Streaming<ExecOutput>,
}

/// What a command has left.
#[derive(Debug, Default)]
pub struct Ran {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit: Exit,
    pub stdin_taken: u64,
}

impl Ran {
    pub fn out(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap().trim_end()
    }

    pub fn err(&self) -> &str {
        std::str::from_utf8(&self.stderr).unwrap().trim_end()
    }
}

impl Call {
    pub async fn start(client: &mut Client, start: ExecStart) -> Result<Self, Status> {
        let (input, requests) = mpsc::channel(4);
        input.send(ExecInput { kind: Some(exec_input::Kind::Start(start)) }).await.unwrap();
        let output = client.exec(ReceiverStream::new(requests)).await?.into_inner();
        Ok(Self { input, output })
    }

    pub async fn say(&self, kind: exec_input::Kind) {
        self.input.send(ExecInput { kind: Some(kind) }).await.unwrap();
    }

    pub async fn next(&mut self) -> Option<exec_output::Kind> {
        let message = tokio::time::timeout(PATIENCE, self.output.message()).await.expect("the call hangs");
        message.unwrap().and_then(|reply| reply.kind)
    }

    pub async fn finish(mut self) -> Ran {
        let mut ran = Ran::default();
        let mut exit = None;
        while let Some(kind) = self.next().await {
            assert!(exit.is_none(), "a message after the exit: {kind:?}");
            match kind {
                exec_output::Kind::Stdout(data) => ran.stdout.extend(data),
                exec_output::Kind::Stderr(data) => ran.stderr.extend(data),
                exec_output::Kind::Exit(end) => exit = Some(end),
                exec_output::Kind::Started(started) => assert!(started.pid > 0),
                exec_output::Kind::StdinTaken(bytes) => ran.stdin_taken += bytes,
            }
        }
        ran.exit = exit.expect("no exit");
        ran
    }
}

pub async fn run(client: &mut Client, start: ExecStart) -> Ran {
    Call::start(client, start).await.unwrap().finish().await
}

/// Whether a process does anything any more: one that is dead may still wait for its parent.
pub fn alive(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

/// Waits until `condition` holds.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let give_up = std::time::Instant::now() + PATIENCE;
    while !condition() {
        assert!(std::time::Instant::now() < give_up, "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A cgroup for a test, where this host lets one be made; removed with everything in it.
pub struct TestCgroup(PathBuf);

impl TestCgroup {
    pub fn make() -> Option<Self> {
        let top = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(PathBuf::from);
        let top = top.into_iter().find(|top| top.join("cgroup.controllers").exists())?;
        let dir = top.join(format!("heyvm-agent-test-{}", std::process::id()));
        fs::create_dir(&dir).ok()?;
        Some(Self(dir))
    }

    pub fn open(&self) -> OwnedFd {
        File::open(&self.0).unwrap().into()
    }

    /// Whether anything lives in it or below it.
    pub fn is_populated(&self) -> bool {
        fs::read_to_string(self.0.join("cgroup.events")).unwrap().contains("populated 1")
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        fs::write(self.0.join("cgroup.kill"), "1").ok();
        let give_up = std::time::Instant::now() + PATIENCE;
        while fs::remove_dir(&self.0).is_err() && std::time::Instant::now() < give_up {
            for below in fs::read_dir(&self.0).into_iter().flatten().flatten() {
                fs::remove_dir(below.path()).ok();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
