//! The wire of the QEMU Machine Protocol: a JSON object per line, a command's id in its answer, events without one.
//!
//! Nothing here panics and nothing waits without a deadline: a guest may have taken over the QEMU at the other end, and
//! one daemon holds the connections of every sandbox. A caller may leave at any moment; an answer that nobody waits for
//! any more is ignored.

use std::{
    collections::HashMap,
    io,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::StreamExt;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncWriteExt, ReadHalf, WriteHalf, split},
    net::UnixStream,
    sync::{mpsc, oneshot},
};
use tokio_util::{
    codec::{FramedRead, LinesCodec},
    task::AbortOnDropHandle,
};

use crate::{Error, agent};

/// A QEMU that does not answer a command for this long is stuck, or its host is.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(20);
/// The message of a command that was not answered in time, which says nothing against QEMU or its guest.
pub const LATE: &str = "no answer in time";
/// Longest line in bytes: the console's 32 KiB take at most 200 of them.
const MAX_LINE: usize = 1 << 20;
/// Commands that wait to be written.
const QUEUE: usize = 16;

type Answer = Result<Value, String>;
type Lines = FramedRead<ReadHalf<UnixStream>, LinesCodec>;

/// A message that answers no command.
pub enum Notice<'a> {
    /// An event of this name.
    Event(&'a str),
    /// The connection has ended; nothing follows.
    Closed,
}

/// One connection; closed when dropped.
pub struct Client {
    commands: mpsc::Sender<String>,
    pending: Arc<Pending>,
    next_id: AtomicU64,
    _reading: AbortOnDropHandle<()>,
    _writing: AbortOnDropHandle<()>,
}

impl Client {
    /// Connects and negotiates. `notify` is called for every event, and once at the end.
    pub async fn connect(socket: &Path, mut notify: impl FnMut(Notice<'_>) + Send + 'static) -> Result<Self, Error> {
        let io = |source| Error::Io { doing: "connecting to QEMU's control socket", path: socket.to_owned(), source };
        let (read, write) = split(agent::connect(socket).await.map_err(io)?);
        let mut lines = FramedRead::new(read, LinesCodec::new_with_max_length(MAX_LINE));
        tokio::time::timeout(COMMAND_DEADLINE, greeting(&mut lines))
            .await
            .map_err(|_| late("greeting"))?
            .map_err(io)?;
        let (commands, queue) = mpsc::channel(QUEUE);
        let pending = Arc::new(Pending::default());
        let reading = {
            let pending = Arc::clone(&pending);
            tokio::spawn(async move {
                read_to_the_end(lines, &pending, &mut notify).await;
                pending.close();
                notify(Notice::Closed);
            })
        };
        let client = Self {
            commands,
            pending,
            next_id: AtomicU64::new(1),
            _reading: AbortOnDropHandle::new(reading),
            _writing: AbortOnDropHandle::new(tokio::spawn(write_all(queue, write))),
        };
        client.execute("qmp_capabilities", json!({})).await?;
        Ok(client)
    }

    /// Runs a command and returns what it gives. Cancel-safe: a later answer goes nowhere.
    pub async fn execute(&self, command: &'static str, arguments: Value) -> Result<Value, Error> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let closed = || Error::Qmp { command, message: "the connection has ended".into() };
        let waiting = self.pending.wait_for(id).ok_or_else(closed)?;
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments, "id": id}));
        let answered = async {
            self.commands.send(line).await.map_err(|_| closed())?;
            waiting.answer().await.ok_or_else(closed)?.map_err(|message| Error::Qmp { command, message })
        };
        tokio::time::timeout(COMMAND_DEADLINE, answered).await.unwrap_or_else(|_| Err(late(command)))
    }

    /// Whether the connection has ended: no command is answered any more.
    pub fn is_closed(&self) -> bool {
        self.pending.lock().is_none()
    }
}

fn late(command: &'static str) -> Error {
    Error::Qmp { command, message: LATE.into() }
}

async fn greeting(lines: &mut Lines) -> io::Result<()> {
    match lines.next().await {
        Some(Ok(line)) if serde_json::from_str::<Value>(&line).is_ok_and(|hello| hello.get("QMP").is_some()) => Ok(()),
        Some(Ok(_)) => Err(io::Error::new(io::ErrorKind::InvalidData, "not the greeting of a QEMU")),
        Some(Err(error)) => Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Ends with the connection, and at a line that is too long or no JSON: nothing that follows could be trusted.
async fn read_to_the_end(mut lines: Lines, pending: &Pending, notify: &mut (impl FnMut(Notice<'_>) + Send)) {
    while let Some(Ok(line)) = lines.next().await {
        let Ok(message) = serde_json::from_str::<Value>(&line) else { return };
        if let Some(event) = message.get("event").and_then(Value::as_str) {
            notify(Notice::Event(event));
        } else if let Some(id) = message.get("id").and_then(Value::as_u64) {
            pending.deliver(id, answer_in(message));
        }
    }
}

fn answer_in(mut message: Value) -> Answer {
    match message.get_mut("return") {
        Some(value) => Ok(value.take()),
        None => Err(message["error"]["desc"].as_str().unwrap_or("no reason given").to_owned()),
    }
}

/// A line is written whole or the connection is over, whether or not its caller still waits.
async fn write_all(mut queue: mpsc::Receiver<String>, mut write: WriteHalf<UnixStream>) {
    while let Some(line) = queue.recv().await {
        if write.write_all(line.as_bytes()).await.is_err() {
            return;
        }
    }
}

/// Commands whose answers are awaited; `None` once none can come.
struct Pending(Mutex<Option<HashMap<u64, oneshot::Sender<Answer>>>>);

impl Default for Pending {
    fn default() -> Self {
        Self(Mutex::new(Some(HashMap::new())))
    }
}

impl Pending {
    fn wait_for(&self, id: u64) -> Option<Waiting<'_>> {
        let (sender, receiver) = oneshot::channel();
        self.lock().as_mut()?.insert(id, sender);
        Some(Waiting { pending: self, id, receiver })
    }

    fn deliver(&self, id: u64, answer: Answer) {
        let waiting = self.lock().as_mut().and_then(|all| all.remove(&id));
        // Its caller may have left in this very moment.
        let _ = waiting.map(|waiting| waiting.send(answer));
    }

    fn close(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<HashMap<u64, oneshot::Sender<Answer>>>> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// A caller that waits; forgotten when it leaves.
struct Waiting<'a> {
    pending: &'a Pending,
    id: u64,
    receiver: oneshot::Receiver<Answer>,
}

impl Waiting<'_> {
    /// `None` when the connection ends first.
    async fn answer(mut self) -> Option<Answer> {
        (&mut self.receiver).await.ok()
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(all) = self.pending.lock().as_mut() {
            all.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use tokio::{
        io::{AsyncBufReadExt, BufReader},
        net::UnixListener,
    };

    use super::*;

    const GREETING: &str =
        r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}"#;

    /// A server that answers each command with its name, those called `slow` when `release` rings.
    struct LateServer {
        _dir: tempfile::TempDir,
        socket: PathBuf,
        release: mpsc::UnboundedSender<()>,
    }

    fn late_server() -> LateServer {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        let (release, mut released) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let (read, mut write) = split(listener.accept().await.unwrap().0);
            write.write_all(format!("{GREETING}\r\n").as_bytes()).await.unwrap();
            let mut lines = BufReader::new(read).lines();
            let mut held = Vec::new();
            loop {
                let answer = tokio::select! {
                    line = lines.next_line() => {
                        let Ok(Some(line)) = line else { return };
                        let command: Value = serde_json::from_str(&line).unwrap();
                        let answer = json!({"return": command["execute"], "id": command["id"]}).to_string();
                        if command["execute"] == "slow" {
                            held.push(answer);
                            continue;
                        }
                        answer
                    }
                    Some(()) = released.recv() => held.remove(0),
                };
                if write.write_all(format!("{answer}\r\n").as_bytes()).await.is_err() {
                    return;
                }
            }
        });
        LateServer { _dir: dir, socket, release }
    }

    async fn dropped_before_its_answer(client: &Client) {
        let mut slow = Box::pin(client.execute("slow", json!({})));
        // The line is on its way once the queue has taken it.
        assert!(futures::poll!(&mut slow).is_pending());
        drop(slow);
        assert!(client.pending.lock().as_ref().unwrap().is_empty(), "a caller that left is forgotten");
    }

    #[tokio::test]
    async fn answer_that_comes_before_the_next_command_is_ignored() {
        let server = late_server();
        let client = Client::connect(&server.socket, |_| {}).await.unwrap();
        dropped_before_its_answer(&client).await;
        // The server has read the slow one when it has answered this.
        assert_eq!(client.execute("quick", json!({})).await.unwrap(), "quick");
        server.release.send(()).unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(client.execute("next", json!({})).await.unwrap(), "next");
        assert!(!client.is_closed());
    }

    #[tokio::test]
    async fn answer_that_comes_after_the_next_command_is_ignored() {
        let server = late_server();
        let client = Client::connect(&server.socket, |_| {}).await.unwrap();
        dropped_before_its_answer(&client).await;
        let mut second = Box::pin(client.execute("slow", json!({})));
        assert!(futures::poll!(&mut second).is_pending());
        assert_eq!(client.execute("quick", json!({})).await.unwrap(), "quick");
        server.release.send(()).unwrap();
        server.release.send(()).unwrap();
        assert_eq!(second.await.unwrap(), "slow");
        assert!(!client.is_closed());
    }

    async fn closed_after(bytes: &'static [u8]) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move {
            let mut stream = listener.accept().await.unwrap().0;
            stream.write_all(format!("{GREETING}\n").as_bytes()).await.unwrap();
            loop {
                if stream.write_all(bytes).await.is_err() {
                    return;
                }
            }
        });
        let (say, closed) = oneshot::channel();
        let mut say = Some(say);
        let connected = Client::connect(&socket, move |notice| {
            if matches!(notice, Notice::Closed) {
                say.take().unwrap().send(()).ok();
            }
        });
        assert!(connected.await.is_err());
        closed.await.unwrap();
    }

    #[tokio::test]
    async fn hostile_messages_close_the_connection() {
        // A line without end, no JSON, and JSON that is nested too deep.
        closed_after(&[b'x'; 4096]).await;
        closed_after(b"no JSON\n").await;
        let deep: &'static [u8] = Box::leak([b"[".repeat(100_000), b"\n".to_vec()].concat().into_boxed_slice());
        closed_after(deep).await;
    }

    #[tokio::test]
    async fn unexpected_json_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move {
            let (read, mut write) = split(listener.accept().await.unwrap().0);
            write.write_all(format!("{GREETING}\n").as_bytes()).await.unwrap();
            let mut lines = BufReader::new(read).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let id = serde_json::from_str::<Value>(&line).unwrap()["id"].clone();
                let strange = r#"[]
7
{"event": 7}
{"id": -1, "return": {}}
{"id": 999, "return": {}}
{"id": "1", "error": 7}
"#;
                write.write_all(strange.as_bytes()).await.unwrap();
                let refused = json!({"id": id, "error": {"class": "GenericError", "desc": "no"}});
                let answer = if line.contains("refused") { refused } else { json!({"id": id, "return": {}}) };
                write.write_all(format!("{answer}\n").as_bytes()).await.unwrap();
            }
        });
        let client = Client::connect(&socket, |_| {}).await.unwrap();
        let refused = client.execute("refused", json!({})).await.unwrap_err();
        assert!(matches!(refused, Error::Qmp { command: "refused", message } if message == "no"));
    }
}
