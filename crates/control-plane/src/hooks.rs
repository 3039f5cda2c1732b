//! Setup hooks: run in order, their output streamed to the caller, kept in the log, and bounded.

use std::sync::Arc;

use heyvm_agent_protocol::v1::Exit;
use heyvm_api::{ApiError, ErrorCode, system::ProgressEvent};
use heyvm_vm::Vm;

use crate::{
    ControlPlane, ProgressSink, Sandbox,
    guest_command::{Running, Said, Tail, shown},
};

/// The step's name in progress, errors and lists.
pub(crate) const STEP: &str = "setup_hook";
/// Bytes of all hooks' output that one create streams; the log has the rest. Events wait in memory for a slow client.
const STREAMED: usize = 1 << 20;
/// A line without an end is cut here.
const MAX_LINE: usize = 16 << 10;

/// The output of one sandbox's hooks, on its way to the caller and to the log.
pub(crate) struct HookOutput<'a> {
    plane: &'a ControlPlane,
    sandbox: &'a Sandbox,
    progress: &'a ProgressSink,
    logged: u64,
    left: usize,
    lines: [Lines; 2],
}

impl<'a> HookOutput<'a> {
    pub fn new(plane: &'a ControlPlane, sandbox: &'a Sandbox, progress: &'a ProgressSink) -> Self {
        Self { plane, sandbox, progress, logged: 0, left: STREAMED, lines: Default::default() }
    }

    /// Runs one hook; its failure carries its last lines.
    pub async fn run(&mut self, vm: &Arc<dyn Vm>, hook: &str) -> Result<(), ApiError> {
        let ran = self.run_and_pass_on(vm, hook).await;
        for stderr in [false, true] {
            if let Some(line) = self.lines[usize::from(stderr)].rest() {
                self.send(stderr, &line);
            }
        }
        let (exit, output) = ran?;
        if exit.code == 0 {
            return Ok(());
        }
        let named: String = hook.chars().take(80).collect();
        Err(ApiError::new(ErrorCode::SetupHookFailed, format!("setup hook `{named}` exited with {}", exit.code))
            .hint("the last lines of its output say why; --keep-on-failure keeps the sandbox to look into")
            .exit_code(exit.code)
            .log_tail(output.lines()))
    }

    async fn run_and_pass_on(&mut self, vm: &Arc<dyn Vm>, hook: &str) -> Result<(Exit, Tail), ApiError> {
        let mut running = Running::start(vm, hook).await?;
        loop {
            match running.next().await? {
                Said::Printed { stderr, data } => self.add(stderr, data).await,
                Said::Ended(exit) => return Ok((exit, running.output)),
            }
        }
    }

    async fn add(&mut self, stderr: bool, data: Vec<u8>) {
        let (logged, lines) = (self.logged, self.lines[usize::from(stderr)].add(&data));
        self.logged += data.len() as u64;
        self.plane.append_log(self.sandbox, stderr, logged, data).await;
        for line in lines {
            self.send(stderr, &line);
        }
    }

    fn send(&mut self, stderr: bool, line: &[u8]) {
        if self.left == 0 {
            return;
        }
        let message = shown(&String::from_utf8_lossy(line));
        self.left = self.left.saturating_sub(message.len() + 1);
        self.progress.send(event(if stderr { "stderr" } else { "stdout" }, message)).ok();
        if self.left == 0 {
            let rest = "(more output than is streamed: `heyvm logs` has the rest)";
            self.progress.send(event("stderr", rest.into())).ok();
        }
    }
}

fn event(stream: &str, message: String) -> ProgressEvent {
    ProgressEvent { step: STEP.into(), message, done: None, total: None, stream: Some(stream.into()) }
}

/// Bytes as lines.
#[derive(Debug, Default)]
struct Lines(Vec<u8>);

impl Lines {
    fn add(&mut self, data: &[u8]) -> Vec<Vec<u8>> {
        let mut whole = Vec::new();
        for piece in data.split_inclusive(|byte| *byte == b'\n') {
            self.0.extend(piece);
            if self.0.ends_with(b"\n") || self.0.len() >= MAX_LINE {
                whole.extend(self.rest());
            }
        }
        whole
    }

    /// What has no end yet. A terminal's progress bar overwrites its line: its last state counts.
    fn rest(&mut self) -> Option<Vec<u8>> {
        let line = std::mem::take(&mut self.0);
        let line = line.strip_suffix(b"\n").unwrap_or(&line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let last = line.rsplit(|byte| *byte == b'\r').next().unwrap_or_default();
        Some(last.to_vec()).filter(|line| !line.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_comes_in_lines_however_it_is_cut() {
        let mut lines = Lines::default();
        assert!(lines.add(b"one").is_empty());
        assert_eq!(lines.add(b" line\r\ntwo\n\nthr"), [b"one line".to_vec(), b"two".to_vec()]);
        assert_eq!(lines.add(b"ee 10%\rthree 90%\r\n"), [b"three 90%".to_vec()]);
        assert_eq!(lines.add(&b"x".repeat(3 * MAX_LINE)).len(), 1, "it is cut");
        assert_eq!(lines.rest(), None);
    }
}
