//! Commands that the control plane runs in a guest: setup hooks and small questions.

use std::sync::Arc;

use heyvm_agent_protocol::v1::{ExecInput, ExecOutput, ExecStart, Exit, exec_input, exec_output};
use heyvm_api::{ApiError, ErrorCode};
use heyvm_vm::Vm;
use tokio::sync::mpsc;
use tonic::Streaming;

use crate::errors;

/// Lines of a command's output that are told.
const TAIL_LINES: usize = 20;
const TAIL_WIDTH: usize = 500;
/// Bytes of a command's output that are kept for its last lines.
const TAIL_BYTES: usize = 64 << 10;

/// Runs a script and keeps the end of its output.
pub(crate) async fn run(vm: &Arc<dyn Vm>, script: &str) -> Result<(Exit, Tail), ApiError> {
    let mut running = Running::start(vm, script).await?;
    loop {
        if let Said::Ended(exit) = running.next().await? {
            return Ok((exit, running.output));
        }
    }
}

/// A script that runs.
pub(crate) struct Running {
    messages: Streaming<ExecOutput>,
    /// The end of what it has printed.
    pub output: Tail,
    /// The stream of input stays open until the end: its end would be the host's leave.
    _input: mpsc::Sender<ExecInput>,
}

/// What a script does next.
pub(crate) enum Said {
    /// It prints.
    Printed { stderr: bool, data: Vec<u8> },
    /// It ends.
    Ended(Exit),
}

impl Running {
    pub async fn start(vm: &Arc<dyn Vm>, script: &str) -> Result<Self, ApiError> {
        let start = ExecStart { argv: vec![script.to_owned()], shell: true, ..ExecStart::default() };
        let (sender, receiver) = mpsc::channel(1);
        let first = ExecInput { kind: Some(exec_input::Kind::Start(start)) };
        sender.try_send(first).map_err(|error| errors::internal(&error))?;
        let mut client = vm.agent().client().await.map_err(errors::vm)?;
        let input = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let messages = client.exec(input).await.map_err(|status| errors::agent(&status))?.into_inner();
        Ok(Self { messages, output: Tail::default(), _input: sender })
    }

    pub async fn next(&mut self) -> Result<Said, ApiError> {
        while let Some(message) = self.messages.message().await.map_err(|status| errors::agent(&status))? {
            let (stderr, data) = match message.kind {
                Some(exec_output::Kind::Stdout(data)) => (false, data),
                Some(exec_output::Kind::Stderr(data)) => (true, data),
                Some(exec_output::Kind::Exit(exit)) => return Ok(Said::Ended(exit)),
                _ => continue,
            };
            self.output.add(&data);
            return Ok(Said::Printed { stderr, data });
        }
        Err(ApiError::new(ErrorCode::SandboxUnreachable, "the sandbox's agent went away"))
    }
}

/// The end of an output, however long that is.
#[derive(Debug, Default)]
pub(crate) struct Tail(Vec<u8>);

impl Tail {
    pub fn add(&mut self, data: &[u8]) {
        self.0.extend(data);
        if self.0.len() > 2 * TAIL_BYTES {
            self.0.drain(..self.0.len() - TAIL_BYTES);
        }
    }

    /// Its last lines, fit to be shown.
    pub fn lines(&self) -> Vec<String> {
        tail(&self.0)
    }
}

/// The last lines of what a guest printed, fit to be shown.
pub(crate) fn tail(output: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(output);
    let mut lines: Vec<String> = text.lines().map(shown).collect();
    lines.split_off(lines.len().saturating_sub(TAIL_LINES))
}

/// One line without control characters, cut to a width.
pub(crate) fn shown(line: &str) -> String {
    line.chars().filter(|c| !c.is_control() || *c == '\t').take(TAIL_WIDTH).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_is_short_and_clean() {
        let output = format!("first\n{}\x1b[31mlast\n", "line\n".repeat(30));
        let lines = tail(output.as_bytes());
        assert_eq!(lines.len(), TAIL_LINES);
        assert_eq!(lines.last().unwrap(), "[31mlast");
    }

    #[test]
    fn an_output_without_end_takes_no_memory_without_end() {
        let mut output = Tail::default();
        for number in 0..100_000 {
            output.add(format!("line {number}\n").as_bytes());
        }
        assert!(output.0.len() <= 2 * TAIL_BYTES);
        assert_eq!(output.lines().last().unwrap(), "line 99999");
    }
}
