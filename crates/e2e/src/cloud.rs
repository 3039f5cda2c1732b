//! A heyvm server of a test's own, in front of a host's daemon, and machines that are logged in to it.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
};

use serde_json::Value;

use crate::{Host, Ran, Refusal, eventually, http};

/// `heyvm server run` with the home of a host, ended with its test; its accounts' sandboxes are removed before.
pub struct Cloud<'a> {
    host: &'a Host,
    process: Child,
    store: String,
    keys: Mutex<Vec<String>>,
    /// `http://127.0.0.1:PORT` of the API.
    pub url: String,
    /// Port of the edge.
    pub edge: u16,
    log: Arc<Mutex<String>>,
}

impl<'a> Cloud<'a> {
    /// One over the daemon of `host`; `settings` are lines of server.toml, at the top or in tables of their own. The
    /// store is an SQLite file unless `store` names another.
    pub fn over(host: &'a Host, store: Option<&str>, settings: &str) -> Self {
        let store = store.map_or_else(|| host.scratch().join("server.db").display().to_string(), str::to_owned);
        let config = host.scratch().join("server.toml");
        let (top, tables) =
            settings.split_once("[").map_or((settings, String::new()), |(top, rest)| (top, format!("[{rest}")));
        let edge = if tables.contains("[edge]") { "" } else { "[edge]\nport = 0\n" };
        std::fs::write(&config, format!("listen = \"127.0.0.1:0\"\n{top}\n{edge}{tables}")).expect("server.toml");
        let mut command = host.command();
        command.args(["server", "run", "--config"]).arg(&config).env("HEYVM_STORE", &store);
        let (process, places, log) = started(command);
        let port = |text: &str| text.rsplit(':').next().and_then(|port| port.trim().parse().ok()).expect("a port");
        Self { host, process, store, keys: Mutex::default(), edge: port(&places.1), url: places.0, log }
    }

    /// An API key for an account, which is made if it is not there.
    pub fn key(&self, account: &str, scope: &str) -> String {
        let email = format!("{account}@example.org");
        let arguments = ["server", "admin", "user", "add", &email, "--account", account];
        // The second key of an account finds its user there.
        self.admin(&arguments, b"correct horse\n");
        let made = self.admin(&["server", "admin", "key", "create", account, "--scope", scope], b"").succeeded().json();
        let key = made["api_key"].as_str().expect("a key").to_owned();
        self.keys.lock().unwrap_or_else(PoisonError::into_inner).push(key.clone());
        key
    }

    /// `heyvm server admin …` over the store.
    pub fn admin(&self, arguments: &[&str], input: &[u8]) -> Ran {
        Ran::of(self.host.command().args(["--format", "json"]).args(arguments).env("HEYVM_STORE", &self.store), input)
    }

    /// A call of the API with a token, with its status and JSON answer.
    #[track_caller]
    pub fn call(&self, method: &str, path: &str, token: &str, body: &Value) -> (u16, Value) {
        let bearer = format!("Bearer {token}");
        let headers =
            [("content-type", "application/json"), ("accept", "application/json"), ("authorization", bearer.as_str())];
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let answer = self.host.inside(|| http::call(method, &format!("{}{path}", self.url), &headers, body));
        (answer.status, if answer.body.is_empty() { Value::Null } else { answer.json() })
    }

    /// What the server has said.
    pub fn log(&self) -> String {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends it as nobody should.
    pub fn kill(mut self) {
        self.process.kill().expect("kill");
        self.process.wait().expect("wait");
    }

    fn remove_everything(&self) {
        for key in self.keys.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let (status, all) = self.call("GET", "/sandboxes?filter=all", key, &Value::Null);
            if status != 200 {
                continue;
            }
            for sandbox in all.as_array().into_iter().flatten().filter(|one| one["status"] != "removed") {
                let path = format!("/sandboxes/{}", sandbox["id"].as_str().expect("id"));
                self.call("DELETE", &path, key, &Value::Null);
            }
        }
    }
}

impl Drop for Cloud<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the server's log ---\n{}", self.log());
        } else if self.process.try_wait().is_ok_and(|ended| ended.is_none()) {
            self.remove_everything();
        }
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(self.process.id().cast_signed()),
            nix::sys::signal::Signal::SIGTERM,
        )
        .ok();
        self.process.wait().ok();
    }
}

/// The process, where it says that API and sandboxes are, and what it goes on to say.
fn started(mut command: Command) -> (Child, (String, String), Arc<Mutex<String>>) {
    let mut process =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("heyvm server");
    let said = BufReader::new(process.stderr.take().expect("piped"));
    let log = Arc::new(Mutex::new(String::new()));
    let kept = Arc::clone(&log);
    std::thread::spawn(move || {
        for line in said.lines().map_while(Result::ok) {
            let mut log = kept.lock().unwrap_or_else(PoisonError::into_inner);
            log.push_str(&line);
            log.push('\n');
        }
    });
    let places = eventually("the server serves", || {
        let text = log.lock().unwrap_or_else(PoisonError::into_inner).clone();
        assert!(process.try_wait().ok().flatten().is_none(), "the server has ended: {text}");
        let line = text.lines().find_map(|line| line.strip_prefix("heyvm: the API is at "))?;
        let (api, sandboxes) = line.split_once(", sandboxes at ")?;
        Some((api.to_owned(), sandboxes.to_owned()))
    });
    (process, places, log)
}

/// A machine of somebody's own, that uses the server with an API key and runs no daemon.
pub struct Machine {
    host: Host,
    url: String,
    key: String,
}

impl Machine {
    /// One that sends this key.
    pub fn new(cloud: &Cloud<'_>, key: &str) -> Self {
        Self { host: cloud.host.another(), url: cloud.url.clone(), key: key.to_owned() }
    }

    /// `heyvm`, ready for arguments.
    pub fn command(&self) -> Command {
        let mut command = self.host.command();
        command.env("HEYO_CLOUD_URL", &self.url).env("HEYO_API_KEY", &self.key);
        command
    }

    /// `heyvm` without server and key in its environment: what a login left is what counts.
    pub fn bare_command(&self) -> Command {
        self.host.command()
    }

    /// Its `HEYO_HOME`.
    pub fn home(&self) -> &std::path::Path {
        &self.host.home
    }

    /// Runs `heyvm` with these arguments, whatever comes of it.
    pub fn run(&self, arguments: &[&str]) -> Ran {
        Ran::of(self.command().args(arguments), b"")
    }

    /// Runs `heyvm … --format json` and gives its JSON document.
    #[track_caller]
    pub fn json(&self, arguments: &[&str]) -> Value {
        Ran::of(self.command().args(["--format", "json"]).args(arguments), b"").succeeded().json()
    }

    /// Runs `heyvm … --format json`, which must fail.
    #[track_caller]
    pub fn refused(&self, arguments: &[&str]) -> Refusal {
        Ran::of(self.command().args(["--format", "json"]).args(arguments), b"").refusal()
    }

    /// Whether a daemon runs here, as none should.
    pub fn has_daemon(&self) -> bool {
        self.host.daemon().is_some()
    }
}
