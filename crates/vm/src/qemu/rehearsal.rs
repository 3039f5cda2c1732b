//! What a VM in reserve does ahead of the sandbox that will take it. Under translation code is slow the first time it
//! runs: one that is for an app in Python has run Python, answered a request and unpacked an archive.

use std::time::Duration;

use heyvm_agent_protocol::v1::{ExecInput, ExecStart, PortStatusRequest, UnpackInput, exec_input};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::running::Watched;
use crate::{AgentConnection, Error, Rehearsal, agent::unreachable_agent};

/// A program that takes longer is ended in the guest; without it the VM is still good.
const PROGRAM_DEADLINE: Duration = Duration::from_secs(20);
/// The agent watches the port for us this long at a time.
const LISTEN_WAIT: Duration = Duration::from_secs(1);
/// The rehearsal's server listens here, on the guest's loopback.
const PORT: u16 = 1;
/// Of the answer no more is read; it is a line.
const MAX_ANSWER: u64 = 4096;
/// The end of a tar archive, and nothing before it.
const EMPTY_ARCHIVE: [u8; 1024] = [0; 1024];

const PYTHON: &str = "
import http.server, json
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'ok')
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer.daemon_threads = False
with http.server.ThreadingHTTPServer(('127.0.0.1', 1), Answer) as server:
    server.handle_request()
";
const NODE: &str = "
const server = require('http').createServer((_, answer) => answer.end('ok', () => server.close()))
server.keepAliveTimeout = 1
server.listen(1, '127.0.0.1')
";

fn program(rehearsal: Rehearsal) -> Vec<String> {
    match rehearsal {
        Rehearsal::Python => vec!["python3".into(), "-c".into(), PYTHON.into()],
        Rehearsal::Node => vec!["node".into(), "-e".into(), NODE.into()],
    }
}

/// Runs a command, so that what running one takes is translated; then what else is rehearsed.
pub async fn rehearse(vm: &Watched, rehearsal: Option<Rehearsal>) -> Result<(), Error> {
    run(vm, vec!["true".into()]).await?;
    let Some(rehearsal) = rehearsal else { return Ok(()) };
    unpack_nothing(vm).await?;
    let program = run(vm, program(rehearsal));
    tokio::pin!(program);
    tokio::select! {
        // The image has no such program, or it could not listen.
        ended = &mut program => return ended,
        visited = visit(&vm.agent) => visited?,
    }
    program.await
}

async fn run(vm: &Watched, argv: Vec<String>) -> Result<(), Error> {
    let timeout_ms = PROGRAM_DEADLINE.as_millis() as u64;
    let start = ExecStart { argv, cwd: "/".into(), timeout_ms, ..ExecStart::default() };
    let input = tokio_stream::iter([ExecInput { kind: Some(exec_input::Kind::Start(start)) }]);
    let mut client = vm.agent.client().await?;
    let mut output = client.exec(input).await.map_err(|s| unreachable_agent(&s))?.into_inner();
    while output.message().await.map_err(|s| unreachable_agent(&s))?.is_some() {}
    Ok(())
}

async fn unpack_nothing(vm: &Watched) -> Result<(), Error> {
    let input = UnpackInput { path: "/".into(), data: EMPTY_ARCHIVE.into(), ..UnpackInput::default() };
    let unpacked = vm.agent.client().await?.unpack(tokio_stream::iter([input])).await;
    unpacked.map(drop).map_err(|status| unreachable_agent(&status))
}

/// Waits for the rehearsal's server and asks it for a page, as a deploy and its first visitor do.
async fn visit(agent: &AgentConnection) -> Result<(), Error> {
    let mut client = agent.client().await?;
    let request = PortStatusRequest { port: u32::from(PORT), wait_ms: LISTEN_WAIT.as_millis() as u32 };
    while !client.port_status(request).await.map_err(|status| unreachable_agent(&status))?.into_inner().listening {}
    let Ok(mut stream) = agent.dial(PORT).await else { return Ok(()) };
    let asked =
        stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\nConnection: close\r\n\r\n").await;
    if asked.is_ok() {
        // Whatever it answers: the asking is what counts.
        stream.take(MAX_ANSWER).read_to_end(&mut Vec::new()).await.ok();
    }
    Ok(())
}
