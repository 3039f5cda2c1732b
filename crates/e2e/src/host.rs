//! A heyvm home of a test's own: its daemon, its sandboxes, and the end of them all.

use std::{
    fs,
    os::unix::{fs::symlink, process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
};

use nix::{
    sys::signal::{SigHandler, Signal, kill, signal},
    unistd::Pid,
};
use serde_json::Value;

use crate::{Ran, Refusal, Vm, eventually, leaks, network::Namespace};

/// What hosts share: these take long to make and are only read.
const SHARED: [&str; 4] = ["images", "kernels", "templates", "jail"];

/// Nobody's user and group id.
const ORDINARY_USER: &str = "65533";

/// One heyvm home with whatever runs in it. Dropping it removes every sandbox, ends the daemon, and fails the test when
/// a process, disk, socket, network device, mount or cgroup stays behind.
pub struct Host {
    /// `HEYO_HOME`.
    pub home: PathBuf,
    root: tempfile::TempDir,
    /// Where the programs are, for a user who may not look into the project's own directory.
    programs: Option<PathBuf>,
    /// The network it is in, where that is not the machine's.
    namespace: Option<Namespace>,
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

impl Host {
    /// A fresh home that shares kernel, images and templates with the others.
    pub fn new() -> Self {
        let host = Self::bare();
        for name in SHARED {
            let shared = test_home().join(name);
            fs::create_dir_all(&shared).expect("test home");
            symlink(&shared, host.home.join(name)).expect("link");
        }
        host
    }

    /// A fresh home with images and kernels of its own (copies of the prepared ones), for tests that add or remove some.
    pub fn with_own_images() -> Self {
        let host = Self::bare();
        for name in SHARED {
            let shared = test_home().join(name);
            fs::create_dir_all(&shared).expect("test home");
            if ["images", "kernels"].contains(&name) {
                copy_finished(&shared, &host.home.join(name));
            } else {
                symlink(&shared, host.home.join(name)).expect("link");
            }
        }
        host
    }

    /// A home of a user without any privilege, who shares nothing with others. There is no network: what that takes
    /// (/dev/net/tun, open to all) not every machine has.
    pub fn of_an_ordinary_user() -> Self {
        let mut host = Self::bare();
        host.configure("[network]\nenabled = false\n");
        for name in ["images", "kernels"] {
            copy_finished(&test_home().join(name), &host.home.join(name));
        }
        let programs = host.root.path().join("bin");
        fs::create_dir(&programs).expect("directory");
        copy(&program(), &programs.join("heyvm"));
        copy(&agent(), &programs.join("heyvm-agent"));
        let owner = format!("{ORDINARY_USER}:{ORDINARY_USER}");
        Ran::of(Command::new("chown").args(["-R", &owner]).arg(host.root.path()), b"").succeeded();
        host.programs = Some(programs);
        host
    }

    /// A home without kernel and images.
    pub fn bare() -> Self {
        let root =
            tempfile::Builder::new().prefix("hv-").rand_bytes(5).tempdir_in("/tmp").expect("temporary directory");
        let home = root.path().join("h");
        fs::create_dir(&home).expect("home");
        fs::create_dir(root.path().join("user")).expect("user's home");
        let host = Self { home, root, programs: None, namespace: None };
        host.configure("");
        host
    }

    /// The same in another network.
    pub fn within(mut self, namespace: &Namespace) -> Self {
        self.namespace = Some(namespace.clone());
        self
    }

    /// A bare one in the same network.
    pub fn another(&self) -> Self {
        let mut host = Self::bare();
        host.namespace.clone_from(&self.namespace);
        host
    }

    /// Runs some of the test's own code in its network.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        match &self.namespace {
            None => work(),
            Some(namespace) => namespace.enter(work),
        }
    }

    /// Writes config.toml, `settings` below `[edge]` or in tables of their own; takes effect when the daemon starts next.
    /// Every host has an edge port of its own, chosen by the system, and no machines in reserve: they would cost the
    /// other tests processor time.
    pub fn configure(&self, settings: &str) {
        self.write_config(0, settings);
    }

    /// Has the daemon keep machines in reserve, as it does for users.
    pub fn keep_reserve(&self) {
        self.write_config(2, "");
    }

    fn write_config(&self, reserve: usize, settings: &str) {
        let text = format!("reserve = {reserve}\n[edge]\nport = 0\n{settings}");
        fs::write(self.home.join("config.toml"), text).expect("config.toml");
    }

    /// A directory for the test's own files, below /tmp, removed at the end.
    pub fn scratch(&self) -> &Path {
        self.root.path()
    }

    /// Its `HEYO_HOME`.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// The program with this home, ready for arguments; nothing of the caller's own settings reaches it.
    pub fn command(&self) -> Command {
        let mut command = match (&self.programs, &self.namespace) {
            (None, None) => Command::new(program()),
            (None, Some(namespace)) => namespace.command(program()),
            (Some(programs), _) => {
                let mut command = Command::new("setpriv");
                let ids = ["--reuid", ORDINARY_USER, "--regid", ORDINARY_USER, "--clear-groups"];
                command.args(ids).arg(programs.join("heyvm"));
                command
            }
        };
        self.environment(&mut command);
        // What a shell starts in the background ignores Ctrl-C, and so would the program under test.
        // SAFETY: sigaction is safe to call between fork and exec.
        unsafe { command.pre_exec(|| Ok(signal(Signal::SIGINT, SigHandler::SigDfl).map(drop)?)) };
        command
    }

    /// Sets the environment in which `heyvm` is on PATH and uses this home.
    pub fn environment(&self, command: &mut Command) {
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("HEYO_") || text.starts_with("HEYVM_") || text.to_lowercase().ends_with("_proxy") {
                command.env_remove(&name);
            }
        }
        let bin = self.programs.clone().unwrap_or_else(|| program().parent().expect("directory").to_owned());
        let agent = self.programs.as_ref().map_or_else(agent, |programs| programs.join("heyvm-agent"));
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .env("HEYVM_AGENT", agent)
            .env("HEYO_HOME", &self.home)
            .env("HOME", self.root.path().join("user"))
            .env("PATH", format!("{}:{path}", bin.display()));
    }

    /// Runs `heyvm` with these arguments, whatever comes of it.
    pub fn run(&self, arguments: &[&str]) -> Ran {
        Ran::of(self.command().args(arguments), b"")
    }

    /// Runs `heyvm … --format json` and gives its JSON document; standard output must be exactly that.
    #[track_caller]
    pub fn json(&self, arguments: &[&str]) -> Value {
        Ran::of(self.command().args(["--format", "json"]).args(arguments), b"").succeeded().json()
    }

    /// Runs `heyvm … --format json`, which must fail as every failure does: see [`Ran::refusal`].
    #[track_caller]
    pub fn refused(&self, arguments: &[&str]) -> Refusal {
        Ran::of(self.command().args(["--format", "json"]).args(arguments), b"").refusal()
    }

    /// `heyvm create` of the smallest size unless told otherwise.
    #[track_caller]
    pub fn create(&self, arguments: &[&str]) -> Vm<'_> {
        let mut all = vec!["create"];
        if !arguments.contains(&"--size-class") {
            all.extend(["--size-class", "micro"]);
        }
        all.extend(arguments);
        Vm::of(self, self.json(&all))
    }

    /// `heyvm deploy` of the smallest size unless told otherwise.
    #[track_caller]
    pub fn deploy(&self, directory: &Path, arguments: &[&str]) -> Vm<'_> {
        Vm::of(self, self.json(&Self::deploy_arguments(directory, arguments)))
    }

    /// `heyvm deploy`, which must fail.
    #[track_caller]
    pub fn deploy_refused(&self, directory: &Path, arguments: &[&str]) -> Refusal {
        self.refused(&Self::deploy_arguments(directory, arguments))
    }

    fn deploy_arguments<'a>(directory: &'a Path, arguments: &[&'a str]) -> Vec<&'a str> {
        let mut all = vec!["deploy", directory.to_str().expect("UTF-8 path")];
        if !arguments.contains(&"--size-class") {
            all.extend(["--size-class", "micro"]);
        }
        all.extend(arguments);
        all
    }

    /// `heyvm list` with further arguments.
    #[track_caller]
    pub fn list(&self, arguments: &[&str]) -> Vec<Value> {
        let mut all = vec!["list"];
        all.extend(arguments);
        self.json(&all).as_array().expect("list is an array").clone()
    }

    /// The names that `heyvm list` with these arguments shows.
    #[track_caller]
    pub fn names(&self, arguments: &[&str]) -> Vec<String> {
        self.list(arguments).iter().filter_map(|sandbox| sandbox["name"].as_str().map(str::to_owned)).collect()
    }

    /// Process id of the daemon; `None` when it does not run.
    pub fn daemon(&self) -> Option<Pid> {
        leaks::processes_of(self.root.path())
            .into_iter()
            .find(|process| process.arguments.iter().skip(1).take(2).eq(["daemon", "run"]))
            .map(|process| Pid::from_raw(process.pid))
    }

    /// Ends the daemon with this signal and waits until it is gone.
    pub fn end_daemon(&self, signal: Signal) {
        if let Some(pid) = self.daemon() {
            kill(pid, signal).ok();
            eventually("the daemon ends", || (self.daemon() != Some(pid)).then_some(()));
        }
    }

    /// Kills the machines of the sandboxes, as nobody should.
    pub fn kill_machines(&self) {
        for machine in leaks::machines_of(self.scratch()) {
            kill(Pid::from_raw(machine.pid), Signal::SIGKILL).expect("kill");
        }
    }

    /// The daemon's log, for messages.
    pub fn log(&self) -> String {
        fs::read_to_string(self.home.join("daemon.log")).unwrap_or_default()
    }

    fn tear_down(&self) -> Vec<String> {
        let all = self.list(&["--all"]);
        let ids: Vec<_> = all.iter().filter_map(|sandbox| sandbox["id"].as_str().map(str::to_owned)).collect();
        let control_groups = leaks::control_groups_of(self.root.path(), &ids);
        for sandbox in all {
            if sandbox["status"] != "removed" {
                self.run(&["rm", "-y", sandbox["id"].as_str().expect("id")]).succeeded();
            }
        }
        let mut left = leaks::left_after_removal(self.root.path(), &self.home);
        self.end_daemon(Signal::SIGTERM);
        left.extend(leaks::left_after_shutdown(self.root.path(), &self.home, &control_groups));
        left.extend(
            leaks::entries(&self.root.path().join("user")).map(|path| format!("{} outside HEYO_HOME", path.display())),
        );
        left
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        let left = if failed {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(60).collect();
            eprintln!("--- end of daemon.log ---");
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
            Vec::new()
        } else if self.daemon().is_some() || self.home.join("heyvm.db").exists() {
            self.tear_down()
        } else {
            Vec::new()
        };
        leaks::end_all(self.root.path());
        assert!(failed || left.is_empty(), "left behind:\n  {}", left.join("\n  "));
    }
}

/// With what it holds and how it is.
fn copy(from: &Path, to: &Path) {
    Ran::of(Command::new("cp").args(["-a", "--reflink=auto"]).arg(from).arg(to), b"").succeeded();
}

/// A directory of the test home without what another test is half-way through making there. The index comes first, so
/// that it names nothing that is not copied.
fn copy_finished(from: &Path, to: &Path) {
    fs::create_dir(to).expect("directory");
    let mut names: Vec<_> =
        fs::read_dir(from).expect("test home").map(|entry| entry.expect("entry").file_name()).collect();
    names.retain(|name| !name.to_string_lossy().contains("half") && !name.to_string_lossy().starts_with(".tmp"));
    if let Some(index) = names.iter().position(|name| name == "index.json") {
        names.swap(0, index);
    }
    for name in names {
        copy(&from.join(&name), &to.join(&name));
    }
}

/// The program under test: HEYVM_BIN, else what `cargo build --release -p heyvm` has made.
pub fn program() -> PathBuf {
    let program = std::env::var_os("HEYVM_BIN").map_or_else(|| project().join("target/release/heyvm"), PathBuf::from);
    assert!(program.exists(), "{} is not built: run ./test", program.display());
    program
}

/// The agent that goes into the guests: HEYVM_AGENT, else what `./test` builds.
fn agent() -> PathBuf {
    let built = || project().join("target/x86_64-unknown-linux-gnu/release/heyvm-agent");
    std::env::var_os("HEYVM_AGENT").map_or_else(built, PathBuf::from)
}

/// The home that `./test` prepares.
pub fn test_home() -> PathBuf {
    let home = std::env::var_os("HEYVM_TEST_HOME").map_or_else(|| project().join("target/test-home"), PathBuf::from);
    assert!(home.join("kernels").exists(), "{} is not prepared: run ./test", home.display());
    home
}

/// The project's directory.
pub fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("project directory")
}
