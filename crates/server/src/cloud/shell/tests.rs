//! Against a real daemon and VMs, through a proxy that cuts connections.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use axum::extract::FromRef;
use heyvm_accounts::{NewUser, Settings};
use heyvm_api::client::Server as Daemon;
use heyvm_e2e::Host;
use heyvm_store::Store;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Notify,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, client::IntoClientRequest},
};

use super::*;

/// One daemon for everybody.
struct OneDaemon(Client);

#[async_trait]
impl Regions for OneDaemon {
    async fn daemon_of(&self, _: &str, who: &str) -> Result<(String, Client), ApiError> {
        Ok((who.to_owned(), self.0.clone()))
    }
}

#[derive(Clone)]
struct Served {
    shells: Arc<Shells>,
    accounts: Arc<Accounts>,
}

impl FromRef<Served> for Arc<Shells> {
    fn from_ref(served: &Served) -> Self {
        Self::clone(&served.shells)
    }
}

impl FromRef<Served> for Arc<Accounts> {
    fn from_ref(served: &Served) -> Self {
        Self::clone(&served.accounts)
    }
}

/// A sandbox, a server before it, and the tokens of two accounts.
struct Place {
    address: SocketAddr,
    path: String,
    tokens: Vec<String>,
    accounts: Arc<Accounts>,
    _directory: tempfile::TempDir,
    vm_id: String,
    host: Host,
}

impl Place {
    async fn new() -> Self {
        let host = Host::new();
        let vm_id = host.create(&[]).id.clone();
        let daemon = Client::new(Daemon::Socket(host.home.join("run/daemon.sock")));
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("heyvm.db")).await.unwrap();
        let accounts = Accounts::open(store, Settings::default()).await.unwrap();
        let mut tokens = Vec::new();
        for email in ["ada@example.com", "bob@example.com"] {
            let new = NewUser { email, password: "correct horse", account: None, scope: Scope::Admin };
            accounts.add_user(new).await.unwrap();
            let from = std::net::Ipv4Addr::LOCALHOST.into();
            tokens.push(accounts.log_in(email, "correct horse", from).await.unwrap().access_token);
        }
        let served = Served { shells: Shells::new(Arc::new(OneDaemon(daemon))), accounts: Arc::clone(&accounts) };
        let (router, _) = routes::<Served>().split_for_parts();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(axum::serve(listener, router.with_state(served)).into_future());
        let path = format!("/deployed-sandboxes/{vm_id}/shell-stream");
        Self { address, path, tokens, accounts, _directory: directory, vm_id, host }
    }

    async fn connect(&self, init: Value) -> Shell {
        Shell::connect(self.address, &self.path, &self.tokens[0], init).await
    }
}

/// A client's side of a connection.
struct Shell {
    socket: WebSocketStream<TcpStream>,
}

enum Heard {
    Output(u64, Vec<u8>),
    Told(Value),
    Nothing,
}

impl Shell {
    async fn connect(to: SocketAddr, path: &str, token: &str, init: Value) -> Self {
        let mut request = format!("ws://{to}{path}").into_client_request().unwrap();
        request.headers_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        let stream = TcpStream::connect(to).await.unwrap();
        let (mut socket, _) = tokio_tungstenite::client_async(request, stream).await.unwrap();
        futures::SinkExt::send(&mut socket, Message::text(init.to_string())).await.unwrap();
        Self { socket }
    }

    async fn say(&mut self, text: Value) {
        futures::SinkExt::send(&mut self.socket, Message::text(text.to_string())).await.ok();
    }

    async fn type_in(&mut self, text: &str) {
        let frame = [b"\x01", text.as_bytes()].concat();
        futures::SinkExt::send(&mut self.socket, Message::binary(frame)).await.ok();
    }

    async fn hear(&mut self) -> Heard {
        loop {
            let next = futures::StreamExt::next(&mut self.socket);
            match tokio::time::timeout(Duration::from_secs(30), next).await.expect("a frame within 30 s") {
                Some(Ok(Message::Binary(frame))) => {
                    assert_eq!(frame[0], 2);
                    let seq = u64::from_be_bytes(frame[1..9].try_into().unwrap());
                    return Heard::Output(seq, frame[9..].to_vec());
                }
                Some(Ok(Message::Text(text))) => return Heard::Told(serde_json::from_str(&text).unwrap()),
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Heard::Nothing,
                Some(Ok(_)) => {}
            }
        }
    }

    /// The next thing that is told, output aside.
    async fn told(&mut self) -> Value {
        loop {
            match self.hear().await {
                Heard::Told(told) => return told,
                Heard::Output(..) => {}
                Heard::Nothing => return Value::Null,
            }
        }
    }

    async fn ready(&mut self) -> String {
        let told = self.told().await;
        assert_eq!(told["type"], "ready", "{told}");
        told["sessionId"].as_str().unwrap().to_owned()
    }
}

/// A proxy that cuts every connection after so many bytes from the server, in the middle of whatever they are.
async fn cutting_proxy(to: SocketAddr, after: u64) -> (SocketAddr, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let cuts = Arc::<AtomicU64>::default();
    let counted = Arc::clone(&cuts);
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let cuts = Arc::clone(&counted);
            tokio::spawn(async move {
                let server = TcpStream::connect(to).await.unwrap();
                let (mut from_client, mut to_client) = client.into_split();
                let (mut from_server, mut to_server) = server.into_split();
                let ended = Notify::new();
                let up = async {
                    tokio::io::copy(&mut from_client, &mut to_server).await.ok();
                    ended.notified().await;
                };
                let down = async {
                    let mut from_server = (&mut from_server).take(after);
                    if tokio::io::copy(&mut from_server, &mut to_client).await.is_ok_and(|passed| passed == after) {
                        cuts.fetch_add(1, Ordering::Relaxed);
                    }
                    to_client.shutdown().await.ok();
                };
                tokio::select! { () = up => {}, () = down => {} }
            });
        }
    });
    (address, cuts)
}

#[tokio::test(flavor = "multi_thread")]
async fn not_a_byte_is_lost_or_doubled_when_connections_are_cut() {
    const LAST: u32 = 150_000;
    let place = Place::new().await;
    let (proxy, cuts) = cutting_proxy(place.address, 150_000).await;
    let (mut session, mut last, mut output) = (None::<String>, 0, Vec::new());
    let exit = loop {
        let mut init = json!({"type": "init", "cols": 100, "rows": 30, "env": {"GREETING": "yes"}, "cwd": "/"});
        if let Some(id) = &session {
            init["sessionId"] = json!(id);
        }
        let mut shell = Shell::connect(proxy, &place.path, &place.tokens[0], init).await;
        let id = shell.ready().await;
        if session.replace(id.clone()).is_none() {
            shell.type_in(&format!("stty -echo; echo $GREETING; pwd; stty size; seq {LAST}; exit 7\n")).await;
        }
        assert_eq!(session.as_deref(), Some(id.as_str()));
        let told = loop {
            match shell.hear().await {
                Heard::Output(seq, bytes) => {
                    if seq > last {
                        assert_eq!(seq, last + 1);
                        last = seq;
                        output.extend_from_slice(&bytes);
                    }
                    if last.is_multiple_of(5) {
                        shell.say(json!({"type": "ack", "seq": last})).await;
                    }
                }
                Heard::Told(told) => break told,
                Heard::Nothing => break Value::Null,
            }
        };
        if told != Value::Null {
            break told;
        }
    };
    assert_eq!(exit, json!({"type": "exit", "code": 7}));
    let wanted: String = (1..=LAST).map(|n| format!("{n}\r\n")).collect();
    let output = String::from_utf8(output).unwrap();
    let begin = output.find("\r\n1\r\n").expect("the first number") + 2;
    assert!(output[begin..].starts_with(&wanted), "{} bytes", output.len());
    assert!(output[..begin].contains("yes\r\n/\r\n30 100\r\n"), "{:?}", &output[..begin]);
    assert!(cuts.load(Ordering::Relaxed) >= 5, "{} cuts", cuts.load(Ordering::Relaxed));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_waits_for_a_client_that_acknowledges_nothing() {
    let place = Place::new().await;
    let mut shell = place.connect(json!({"type": "init", "cols": 80, "rows": 24})).await;
    let id = shell.ready().await;
    shell.type_in("stty -echo -opost; head -c 10000000 /dev/zero | tr '\\0' x; exit 0\n").await;
    let (mut bytes, mut last) = (0, 0);
    loop {
        match tokio::time::timeout(Duration::from_secs(8), shell.hear()).await {
            Ok(Heard::Output(seq, data)) => (last, bytes) = (seq, bytes + data.len()),
            Ok(_) => panic!("it has ended after {bytes} bytes"),
            Err(_) => break,
        }
    }
    assert!((2 << 20..6 << 20).contains(&bytes), "{bytes}");
    // A newer connection takes the session over, and the output goes on from what was acknowledged.
    shell.say(json!({"type": "ack", "seq": last})).await;
    let mut next = place.connect(json!({"type": "init", "cols": 80, "rows": 24, "sessionId": id})).await;
    assert_eq!(next.ready().await, id);
    drop(shell);
    loop {
        match next.hear().await {
            Heard::Output(seq, data) => {
                (last, bytes) = if seq > last { (seq, bytes + data.len()) } else { (last, bytes) };
                next.say(json!({"type": "ack", "seq": seq})).await;
            }
            Heard::Told(told) => {
                assert_eq!(told, json!({"type": "exit", "code": 0}));
                break;
            }
            Heard::Nothing => panic!("cut"),
        }
    }
    assert!((10_000_000..10_001_000).contains(&bytes), "{bytes}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_meant_ends_the_connection_and_no_more() {
    let place = Place::new().await;
    let mut shell = place.connect(json!({"type": "init"})).await;
    let id = shell.ready().await;
    let bad = [
        Message::text("{"),
        Message::text(json!({"type": "resize", "cols": 0, "rows": 24}).to_string()),
        Message::text(json!({"type": "resize", "cols": 80, "rows": 100_000}).to_string()),
        Message::binary(vec![9; 10]),
        Message::binary(Vec::new()),
        Message::binary(vec![1; (1 << 20) + 1]),
    ];
    for frame in bad {
        futures::SinkExt::send(&mut shell.socket, frame.clone()).await.ok();
        let told = shell.told().await;
        // Of one that is too large the rest is not read: the error may be lost with the connection.
        assert!(told["type"] == "error" || frame.len() > 1 << 20, "{told}");
        shell = place.connect(json!({"type": "init", "sessionId": id})).await;
        assert_eq!(shell.ready().await, id);
    }
    // Whoever does not own a session learns nothing of it.
    let init = json!({"type": "init", "sessionId": id});
    let mut other = Shell::connect(place.address, &place.path, &place.tokens[1], init).await;
    assert_eq!(other.told().await["code"], "session_expired");

    shell.say(json!({"type": "close"})).await;
    let exit = shell.told().await;
    assert_eq!(exit["type"], "exit", "{exit}");
    let mut gone = place.connect(json!({"type": "init", "sessionId": id})).await;
    assert_eq!(gone.told().await["code"], "session_expired");

    let begun = std::time::Instant::now();
    let mut last = place.connect(json!({"type": "init", "env": {"PROMPT_COMMAND": "sleep 2"}})).await;
    last.ready().await;
    assert!(begun.elapsed() >= Duration::from_secs(2), "ready before the first prompt: {:?}", begun.elapsed());
    place.host.run(&["stop", &place.vm_id]).succeeded();
    // Ended in order, the shell hears of it before its sandbox is gone.
    let end = last.told().await;
    assert!(end["type"] == "error" || end == json!({"type": "exit", "code": 129}), "{end}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shell_ends_with_its_credentials() {
    let place = Place::new().await;
    let mut shell = place.connect(json!({"type": "init"})).await;
    let id = shell.ready().await;
    place.accounts.disable_user("ada@example.com").await.unwrap();
    let told = shell.told().await;
    assert_eq!((&told["type"], &told["code"]), (&json!("error"), &json!("unauthorized")), "{told}");
    place.accounts.enable_user("ada@example.com").await.unwrap();
    let from = std::net::Ipv4Addr::LOCALHOST.into();
    let token = place.accounts.log_in("ada@example.com", "correct horse", from).await.unwrap().access_token;
    let init = json!({"type": "init", "sessionId": id});
    let mut again = Shell::connect(place.address, &place.path, &token, init).await;
    assert_eq!(again.told().await["code"], "session_expired");
}
