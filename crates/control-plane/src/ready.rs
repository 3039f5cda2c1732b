//! When a sandbox counts as running: its start command, its ports, its health.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use heyvm_agent_protocol::v1::{
    EnvVar, ExecStart, Exit, MainEvent, PortStatusRequest, StartMainRequest, WatchMainRequest, main_event,
};
use heyvm_api::{ApiError, ErrorCode, names};
use heyvm_vm::{AgentConnection, Vm};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use crate::{ControlPlane, ProgressSink, Sandbox, create::tail, errors, record::Record, tell};

/// A start command without a port must have lived this long.
const SETTLED: Duration = Duration::from_millis(500);
/// First and longest pause between two looks.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(200);
/// An app that takes this long for its health check is asked again.
const CHECK_DEADLINE: Duration = Duration::from_secs(10);
/// Longest status line that is read.
const MAX_STATUS_LINE: u64 = 1024;

impl ControlPlane {
    /// Starts the start command, where there is one.
    pub(crate) async fn run_start_command(
        &self,
        sandbox: &Sandbox,
        vm: &Arc<dyn Vm>,
        progress: &ProgressSink,
    ) -> Result<(), ApiError> {
        let record = sandbox.snapshot();
        let Some(command) = record.start_command.clone() else { return Ok(()) };
        tell(progress, "start_command", &command);
        let port = record.open_ports.first().filter(|_| !record.env_vars.contains_key("PORT"));
        let env = port.map(|port| EnvVar { name: "PORT".into(), value: port.to_string() }).into_iter().collect();
        let start = ExecStart { argv: vec![command], shell: true, env, ..ExecStart::default() };
        let mut client = vm.agent().client().await.map_err(errors::vm)?;
        let request = StartMainRequest { start: Some(start) };
        client.start_main(request).await.map_err(|status| errors::agent(&status).step("start_command"))?;
        Ok(())
    }

    /// Returns when it is ready; an error when the start command ends before, or time runs out.
    pub(crate) async fn wait_until_ready(
        &self,
        sandbox: &Sandbox,
        vm: &Arc<dyn Vm>,
        progress: &ProgressSink,
    ) -> Result<(), ApiError> {
        let record = sandbox.snapshot();
        if record.start_command.is_none() && record.health_path.is_none() {
            return Ok(());
        }
        if record.health_path.is_some() {
            tell(progress, "health", "waiting until it is healthy");
        }
        let agent = vm.agent();
        let deadline = Instant::now() + Duration::from_millis(record.health_timeout_ms);
        tokio::select! {
            ready = until_ready(&agent, &record, deadline) => match ready {
                Ok(()) => Ok(()),
                Err(why) => Err(self.not_ready(&agent, &record, &why).await),
            },
            exit = main_exit(&agent), if record.start_command.is_some() => Err(exited(&agent, &exit?).await),
        }
    }

    async fn not_ready(&self, agent: &AgentConnection, record: &Record, why: &str) -> ApiError {
        let seconds = record.health_timeout_ms as f64 / 1000.0;
        ApiError::new(ErrorCode::HealthTimeout, format!("not ready within {seconds} s: {why}"))
            .hint("the last lines of the start command's output may say why; --health-timeout gives it longer")
            .step("health")
            .log_tail(main_tail(agent).await)
    }

    /// Waits until something listens on the port in the sandbox, and answers 2xx or 3xx on `path` where given. `false` at the deadline.
    pub async fn wait_for_port(
        &self,
        who: &str,
        port: i64,
        path: Option<&str>,
        timeout: Duration,
    ) -> Result<bool, ApiError> {
        let port = names::check_port(port)?;
        let agent = self.agent(who).await?;
        let deadline = Instant::now() + timeout;
        Ok(poll(deadline, || check(&agent, port, path)).await.is_ok())
    }
}

async fn until_ready(agent: &AgentConnection, record: &Record, deadline: Instant) -> Result<(), String> {
    match record.open_ports.first() {
        Some(port) => poll(deadline, || check(agent, *port, record.health_path.as_deref())).await,
        None => {
            tokio::time::sleep(SETTLED).await;
            Ok(())
        }
    }
}

/// Looks again and again, ever less often, until it is right or time is up; the last finding is the error.
async fn poll<F: Future<Output = Result<(), String>>>(deadline: Instant, look: impl Fn() -> F) -> Result<(), String> {
    let mut pause = FIRST_PAUSE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let found = tokio::time::timeout(left.min(CHECK_DEADLINE), look())
            .await
            .unwrap_or_else(|_| Err("no answer in time".into()));
        match found {
            Ok(()) => return Ok(()),
            Err(why) if Instant::now() + pause >= deadline => {
                tokio::time::sleep_until(deadline.into()).await;
                return Err(why);
            }
            Err(_) => tokio::time::sleep(pause).await,
        }
        pause = (pause * 3 / 2).min(LONGEST_PAUSE);
    }
}

async fn check(agent: &AgentConnection, port: u16, path: Option<&str>) -> Result<(), String> {
    let mut client = agent.client().await.map_err(|error| error.to_string())?;
    let status =
        client.port_status(PortStatusRequest { port: u32::from(port) }).await.map_err(|error| error.to_string())?;
    if !status.into_inner().listening {
        return Err(format!("nothing listens on port {port}"));
    }
    let Some(path) = path else { return Ok(()) };
    let stream = agent.dial(port).await.map_err(|error| error.to_string())?;
    let status = http_status(stream, path).await.map_err(|error| format!("{path} on port {port}: {error}"))?;
    if (200..400).contains(&status) { Ok(()) } else { Err(format!("{path} on port {port} answers {status}")) }
}

/// The status of one GET. Only the first line of the answer is read: that is all the question.
async fn http_status(mut stream: Box<dyn heyvm_vm::agent::PortStream>, path: &str) -> std::io::Result<u16> {
    use tokio::io::AsyncReadExt;
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: heyvm-health\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut line = String::new();
    BufReader::new(stream.take(MAX_STATUS_LINE)).read_line(&mut line).await?;
    let status = line.split_ascii_whitespace().nth(1).and_then(|word| word.parse().ok());
    status.filter(|_| line.starts_with("HTTP/")).ok_or_else(|| std::io::Error::other("the answer is not HTTP"))
}

/// Resolves when the start command has ended.
async fn main_exit(agent: &AgentConnection) -> Result<Exit, ApiError> {
    let mut events = watch_main(agent, u64::MAX).await?;
    loop {
        match events.message().await.map_err(|status| errors::agent(&status))?.and_then(|event: MainEvent| event.kind) {
            Some(main_event::Kind::Exit(exit)) => return Ok(exit),
            Some(main_event::Kind::Log(_)) => {}
            None => return Err(ApiError::new(ErrorCode::SandboxUnreachable, "the sandbox's agent went away")),
        }
    }
}

pub(crate) async fn watch_main(
    agent: &AgentConnection,
    from_offset: u64,
) -> Result<tonic::Streaming<MainEvent>, ApiError> {
    let mut client = agent.client().await.map_err(errors::vm)?;
    let events = client.watch_main(WatchMainRequest { from_offset }).await.map_err(|status| errors::agent(&status))?;
    Ok(events.into_inner())
}

async fn exited(agent: &AgentConnection, exit: &Exit) -> ApiError {
    let message = if exit.error.is_empty() {
        format!("the start command exited with {} before the sandbox was ready", exit.code)
    } else {
        let why: String = exit.error.chars().filter(|c| !c.is_control()).take(200).collect();
        format!("the start command could not be started: {why}")
    };
    ApiError::new(ErrorCode::StartCommandFailed, message)
        .hint("the start command must keep running; the last lines of its output say why it did not")
        .step("start_command")
        .log_tail(main_tail(agent).await)
}

/// The end of what the start command has printed so far.
async fn main_tail(agent: &AgentConnection) -> Vec<String> {
    let mut output = Vec::new();
    let Ok(mut events) = watch_main(agent, 0).await else { return Vec::new() };
    // What is there comes at once; a running command's stream never ends.
    while let Ok(Ok(Some(event))) = tokio::time::timeout(Duration::from_millis(300), events.message()).await {
        match event.kind {
            Some(main_event::Kind::Log(log)) => output.extend(log.data),
            _ => break,
        }
    }
    tail(&output)
}
