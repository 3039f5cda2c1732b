//! When a sandbox counts as running: its start command, its ports, its health.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use heyvm_agent_protocol::v1::{Exit, PortStatusRequest};
use heyvm_api::{ApiError, ErrorCode, names};
use heyvm_vm::{AgentConnection, Vm};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use crate::{
    ControlPlane, ProgressSink, Sandbox, Who, begin_step, errors, lifecycle,
    main_command::{Followed, Main, tail_of_this_run},
    record::Record,
};

/// A start command without a port must have lived this long.
const SETTLED: Duration = Duration::from_millis(500);
/// Shortest and longest pause between two looks: each takes processor time from who is waited for.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(200);
/// The agent watches a port for us this long, in vain on a busy processor: so it is asked again.
const LISTEN_WAIT: Duration = Duration::from_secs(1);
/// An app that takes this long for its health check is asked again.
const CHECK_DEADLINE: Duration = Duration::from_secs(10);
/// Longest status line that is read.
const MAX_STATUS_LINE: u64 = 1024;

impl ControlPlane {
    /// Returns when it is ready; an error when the start command ends before, or time runs out.
    pub(crate) async fn wait_until_ready(
        &self,
        sandbox: &Sandbox,
        vm: &Arc<dyn Vm>,
        main: Option<&mut Main>,
        progress: &ProgressSink,
    ) -> Result<(), ApiError> {
        let record = sandbox.snapshot();
        let images_own = record.runs_the_images_command();
        if record.start_command.is_none() && !images_own && record.health_path.is_none() {
            return Ok(());
        }
        if record.health_path.is_some() {
            begin_step(sandbox, progress, "health", "waiting until it is healthy");
        }
        let agent = vm.agent();
        let deadline = Instant::now() + Duration::from_millis(record.health_timeout_ms);
        tokio::select! {
            ready = until_ready(&agent, &record, deadline) => match ready {
                Ok(()) => Ok(()),
                Err(why) => Err(self.not_ready(&agent, &record, &why).await),
            },
            followed = ended(main) => match followed {
                // A shell or an interpreter without input: the sandbox is there for what is run in it.
                Followed::Exited(exit) if images_own && exit.code == 0 && record.health_path.is_none() => Ok(()),
                Followed::Exited(exit) => Err(exited(&agent, &exit).await),
                Followed::Lost(panicked) => Err(errors::internal(&panicked).step("start_command")),
            },
            exit = vm.exited() => Err(vm_ended(exit)),
        }
    }

    async fn not_ready(&self, agent: &AgentConnection, record: &Record, why: &str) -> ApiError {
        let seconds = record.health_timeout_ms as f64 / 1000.0;
        ApiError::new(ErrorCode::HealthTimeout, format!("not ready within {seconds} s: {why}"))
            .hint("the last lines of the start command's output may say why; --health-timeout gives it longer")
            .step("health")
            .log_tail(tail_of_this_run(agent).await)
    }

    /// Waits until something listens on the port in the sandbox, and answers 2xx or 3xx on `path` where given. `false` at the deadline.
    pub async fn wait_for_port(
        &self,
        who: &Who,
        port: i64,
        path: Option<&str>,
        timeout: Duration,
    ) -> Result<bool, ApiError> {
        let port = names::check_port(port)?;
        let agent = self.agent(who).await?;
        let deadline = Instant::now() + timeout;
        Ok(poll(deadline, |left| check(&agent, port, path, left)).await.is_ok())
    }
}

async fn until_ready(agent: &AgentConnection, record: &Record, deadline: Instant) -> Result<(), String> {
    // An image's own command listens where the image says; another port is for what will be run in the sandbox.
    let own = |port: &u16| record.image_run.exposed_ports.contains(port) || record.health_path.is_some();
    match record.open_ports.first().filter(|port| !record.runs_the_images_command() || own(port)) {
        Some(port) => poll(deadline, |left| check(agent, *port, record.health_path.as_deref(), left)).await,
        None => {
            tokio::time::sleep(SETTLED).await;
            Ok(())
        }
    }
}

/// Looks again and again, ever less often, until it is right or time is up; the last finding is the error. What took
/// long anyway is noticed an eighth later at most.
async fn poll<F: Future<Output = Result<(), String>>>(
    deadline: Instant,
    look: impl Fn(Duration) -> F,
) -> Result<(), String> {
    let began = Instant::now();
    loop {
        let pause = (began.elapsed() / 8).clamp(SHORTEST_PAUSE, LONGEST_PAUSE);
        let left = deadline.saturating_duration_since(Instant::now());
        let found = tokio::time::timeout(left.min(CHECK_DEADLINE), look(left))
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
    }
}

async fn check(agent: &AgentConnection, port: u16, path: Option<&str>, left: Duration) -> Result<(), String> {
    let mut client = agent.client().await.map_err(|error| error.to_string())?;
    // Half of the time that is left, so that the answer comes within it.
    let wait_ms = LISTEN_WAIT.min(left / 2).as_millis() as u32;
    let request = PortStatusRequest { port: u32::from(port), wait_ms };
    let status = client.port_status(request).await.map_err(|error| error.to_string())?;
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

/// Resolves when the start command has ended; never where there is none.
pub(crate) async fn ended(main: Option<&mut Main>) -> Followed {
    match main {
        Some(main) => main.ended().await,
        None => std::future::pending().await,
    }
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
        .exit_code(exit.code)
        .log_tail(tail_of_this_run(agent).await)
}

fn vm_ended(exit: heyvm_vm::Exit) -> ApiError {
    let (_, reason) = lifecycle::judge(exit, Vec::new());
    ApiError::new(ErrorCode::VmFailed, format!("{} before the sandbox was ready", reason.message))
        .hint("the last lines say why; a larger --size-class gives more memory")
        .step("start_command")
        .log_tail(reason.log_tail)
}
