//! Finding the daemon, or starting one: commands need no set-up.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::unix::{
        fs::{DirBuilderExt, OpenOptionsExt},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use heyvm_api::{
    ApiError, ErrorCode,
    client::{Client, Server},
    system::{COMPATIBILITY, Health},
};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

/// A daemon that does not say how it is for this long stands still.
const HEALTH_DEADLINE: Duration = Duration::from_secs(20);
/// A daemon that is not there after this will not come.
const START_DEADLINE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);
/// Where distributions keep what administrators need.
const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin";
/// Lines of its log that are shown when it does not come.
const LOG_LINES: usize = 10;

/// `~/.heyo`, or what `HEYO_HOME` says.
pub fn home() -> Result<PathBuf, ApiError> {
    if let Some(home) = std::env::var_os("HEYO_HOME").filter(|home| !home.is_empty()) {
        return std::path::absolute(home).map_err(|error| unusable(Path::new("HEYO_HOME"), &error));
    }
    let home = std::env::var_os("HOME").filter(|home| !home.is_empty()).ok_or_else(|| {
        ApiError::new(ErrorCode::HostNotReady, "neither HEYO_HOME nor HOME is set")
            .hint("set HEYO_HOME to a directory of yours")
    })?;
    Ok(PathBuf::from(home).join(".heyo"))
}

fn unusable(path: &Path, error: &io::Error) -> ApiError {
    ApiError::new(ErrorCode::HostNotReady, format!("{} cannot be used: {error}", path.display()))
        .hint("set HEYO_HOME to a directory of yours")
}

/// Where the daemon listens.
pub fn socket(home: &Path) -> PathBuf {
    home.join("run/daemon.sock")
}

/// What is known of the daemon.
pub enum Daemon {
    /// It answers.
    Running {
        /// A client of it.
        client: Box<Client>,
        /// What it says of itself.
        health: Health,
    },
    /// It takes connections and does not answer.
    Silent,
    /// There is none.
    Absent,
}

/// Asks the daemon how it is.
pub async fn daemon(home: &Path) -> Daemon {
    let client = Client::new(Server::Socket(socket(home)));
    match tokio::time::timeout(HEALTH_DEADLINE, client.get::<Health>("/health")).await {
        Ok(Ok(health)) => Daemon::Running { client: Box::new(client), health },
        Ok(Err(_)) => Daemon::Absent,
        Err(_) => Daemon::Silent,
    }
}

/// The error for a daemon that does not answer.
pub fn silent(home: &Path) -> ApiError {
    let (process, hint) = match pid(home) {
        Some(pid) => (
            format!(" (process {pid})"),
            format!("Run `kill -9 {pid}` to end it: sandboxes keep running, and the next command starts another."),
        ),
        None => (String::new(), "Run `heyvm daemon status`.".into()),
    };
    ApiError::new(ErrorCode::DaemonUnavailable, format!("the daemon{process} does not answer")).hint(hint)
}

/// A client of the daemon, which is started when there is none.
pub async fn ensure(home: &Path, debug: bool) -> Result<Client, ApiError> {
    if let Fit::Ours(client) = fitting(home).await? {
        say(debug, || format!("the daemon runs at {}", socket(home).display()));
        return Ok(*client);
    }
    start(home, debug).await
}

/// Whether a daemon runs that this program can use.
enum Fit {
    /// One that speaks our API, whatever its version.
    Ours(Box<Client>),
    /// One that does not.
    Other(Health),
    None,
}

async fn fitting(home: &Path) -> Result<Fit, ApiError> {
    Ok(match daemon(home).await {
        Daemon::Running { client, health } if health.compatibility == COMPATIBILITY => Fit::Ours(client),
        Daemon::Running { health, .. } => Fit::Other(health),
        Daemon::Silent => return Err(silent(home)),
        Daemon::Absent => Fit::None,
    })
}

/// What is being done, where `--debug` asks for it.
fn say(debug: bool, text: impl FnOnce() -> String) {
    if debug {
        eprintln!("debug: {}", text());
    }
}

async fn start(home: &Path, debug: bool) -> Result<Client, ApiError> {
    let run = home.join("run");
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&run).map_err(|error| unusable(&run, &error))?;
    // Of many commands at once one starts the daemon; the others find it running.
    let lock = File::create(run.join("start.lock")).map_err(|error| unusable(&run, &error))?;
    let _lock = exclusive(lock, &run).await?;
    match fitting(home).await? {
        Fit::Ours(client) => return Ok(*client),
        Fit::Other(health) => {
            let own = env!("CARGO_PKG_VERSION");
            say(debug, || format!("ending the daemon of version {}, whose API is not that of {own}", health.version));
            stop(home)?;
        }
        Fit::None => {}
    }
    say(debug, || format!("starting the daemon; its log is {}", home.join("daemon.log").display()));
    let log_path = home.join("daemon.log");
    let log = File::options()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&log_path)
        .map_err(|error| unusable(&log_path, &error))?;
    let before = log.metadata().map_or(0, |meta| meta.len());
    let mut child = spawn(home, log, debug).map_err(cannot_start)?;
    let deadline = Instant::now() + START_DEADLINE;
    loop {
        if let Daemon::Running { client, .. } = daemon(home).await {
            return Ok(*client);
        }
        let ended = child.try_wait().map_err(cannot_start)?;
        if ended.is_some() || Instant::now() > deadline {
            let what = if ended.is_some() { "ended at its start" } else { "does not answer" };
            return Err(ApiError::new(ErrorCode::DaemonUnavailable, format!("the daemon {what}"))
                .hint(format!("{} may say why", log_path.display()))
                .log_tail(log_tail(&log_path, before)));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Waits for a lock that another command holds while it starts the daemon, no longer than that may take.
async fn exclusive(mut lock: File, run: &Path) -> Result<Flock<File>, ApiError> {
    let deadline = Instant::now() + 2 * START_DEADLINE;
    loop {
        lock = match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
            Ok(held) => return Ok(held),
            Err((lock, Errno::EWOULDBLOCK)) if Instant::now() < deadline => lock,
            Err((_, Errno::EWOULDBLOCK)) => {
                return Err(ApiError::new(
                    ErrorCode::DaemonUnavailable,
                    "another command does not finish starting the daemon",
                )
                .hint(format!("End the process that holds {}.", run.join("start.lock").display())));
            }
            Err((_, errno)) => return Err(unusable(run, &errno.into())),
        };
        tokio::time::sleep(POLL).await;
    }
}

fn cannot_start(error: io::Error) -> ApiError {
    ApiError::new(ErrorCode::DaemonUnavailable, format!("the daemon cannot be started: {error}"))
        .hint("has heyvm been moved or removed, or is the machine out of memory or processes?")
}

fn spawn(home: &Path, log: File, debug: bool) -> io::Result<Child> {
    let own_path = std::env::var_os("PATH").unwrap_or_default();
    let mut command = daemon_command(home, &std::env::current_exe()?, &own_path, debug);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()
}

fn daemon_command(home: &Path, program: &Path, own_path: impl AsRef<OsStr>, debug: bool) -> Command {
    let mut command = Command::new(program);
    heyvm_jail::environment::keep(command.env_clear(), is_for_the_daemon);
    command.args(["daemon", "run"]).env("HEYO_HOME", home).current_dir("/").process_group(0);
    // mkfs.ext4, nft and modprobe lie where an ordinary user's PATH does not lead.
    let mut path = own_path.as_ref().to_owned();
    if !path.is_empty() {
        path.push(":");
    }
    path.push(SYSTEM_PATH);
    command.env("PATH", path);
    if debug && std::env::var_os("HEYVM_LOG").is_none() {
        command.env("HEYVM_LOG", "debug");
    }
    command
}

/// What the daemon reads of the environment, and what programs that it runs do. It outlives the command that starts it,
/// whose secrets (`JWT_SECRET`, tokens, those of other programs) are not for it.
fn is_for_the_daemon(name: &str) -> bool {
    const OWN: [&str; 4] = ["DOCKER_CONFIG", "HEYVM_AGENT", "HEYVM_LOG", "RUST_BACKTRACE"];
    const SYSTEM: [&str; 9] =
        ["HOME", "LANG", "LANGUAGE", "LOGNAME", "PATH", "TMPDIR", "TZ", "USER", "XDG_RUNTIME_DIR"];
    const TRUST: [&str; 5] =
        ["CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS", "REQUESTS_CA_BUNDLE", "SSL_CERT_DIR", "SSL_CERT_FILE"];
    const PROXIES: [&str; 4] = ["all_proxy", "http_proxy", "https_proxy", "no_proxy"];
    [&OWN[..], &SYSTEM, &TRUST].iter().any(|names| names.contains(&name))
        || PROXIES.contains(&name.to_ascii_lowercase().as_str())
        || ["LC_", "HEYVM_TEST_"].iter().any(|prefix| name.starts_with(prefix))
}

fn log_tail(path: &Path, from: u64) -> Vec<String> {
    let mut text = String::new();
    File::open(path)
        .and_then(|mut log| {
            log.seek(SeekFrom::Start(from))?;
            log.take(64 << 10).read_to_string(&mut text)
        })
        .ok();
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].to_vec()
}

/// Ends the daemon, if one runs; sandboxes keep running.
pub fn stop(home: &Path) -> Result<(), ApiError> {
    let Some(pid) = pid(home) else { return Ok(()) };
    let process = heyvm_jail::process::ProcessId::of(pid).ok();
    let signalled = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM);
    signalled
        .map_err(|error| ApiError::new(ErrorCode::DaemonUnavailable, format!("the daemon cannot be ended: {error}")))?;
    let deadline = Instant::now() + START_DEADLINE;
    while process.is_some_and(|process| process.is_alive()) {
        if Instant::now() > deadline {
            return Err(ApiError::new(ErrorCode::Timeout, format!("the daemon (process {pid}) does not end"))
                .hint(format!("kill -9 {pid} ends it; sandboxes keep running")));
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// Process id of the daemon that holds the lock.
pub fn pid(home: &Path) -> Option<i32> {
    let lock = File::open(home.join("run/daemon.lock")).ok()?;
    // Shared: of several who ask none takes another for the daemon, and a dead daemon's id for a living process.
    let Err((mut held, Errno::EWOULDBLOCK)) = Flock::lock(lock, FlockArg::LockSharedNonblock) else { return None };
    let mut text = String::new();
    held.read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::fs::PermissionsExt};

    use super::*;

    /// A daemon of another version that answers `/health` as often as it is asked.
    fn answering(home: &Path, health: &'static str) {
        fs::create_dir_all(home.join("run")).unwrap();
        let listener = std::os::unix::net::UnixListener::bind(socket(home)).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
                let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close";
                write!(stream, "{head}\r\nContent-Length: {}\r\n\r\n{health}", health.len()).ok();
            }
        });
    }

    #[tokio::test]
    async fn daemons_of_other_versions_are_left_alone_where_they_speak_our_api() {
        for (health, fits) in [
            (r#"{"status":"ok","version":"9.9.9","compatibility":1}"#, true),
            (r#"{"status":"ok","version":"9.9.9","compatibility":2}"#, false),
            (r#"{"status":"ok","version":"0.0.1"}"#, false),
        ] {
            let home = tempfile::tempdir().unwrap();
            answering(home.path(), health);
            match fitting(home.path()).await.unwrap() {
                Fit::Ours(_) => assert!(fits, "{health}"),
                Fit::Other(_) => assert!(!fits, "{health}"),
                Fit::None => panic!("{health}"),
            }
        }
        assert!(matches!(fitting(tempfile::tempdir().unwrap().path()).await, Ok(Fit::None)));
    }

    #[test]
    fn whoever_asks_for_the_daemon_is_not_taken_for_it() {
        let home = tempfile::tempdir().unwrap();
        assert_eq!(pid(home.path()), None);
        let path = home.path().join("run/daemon.lock");
        fs::create_dir(home.path().join("run")).unwrap();
        fs::write(&path, "4711\n").unwrap();
        let lock = |how| Flock::lock(File::open(&path).unwrap(), how).unwrap();
        let asking = lock(FlockArg::LockShared);
        assert_eq!(pid(home.path()), None);
        drop(asking);
        let _daemon = lock(FlockArg::LockExclusive);
        assert_eq!(pid(home.path()), Some(4711));
    }

    #[tokio::test]
    async fn daemon_that_stands_still_is_no_absent_one() {
        let home = tempfile::tempdir().unwrap();
        assert!(matches!(daemon(home.path()).await, Daemon::Absent));
        fs::create_dir(home.path().join("run")).unwrap();
        // Takes connections, as a stopped process does, and says nothing.
        let _listener = std::os::unix::net::UnixListener::bind(socket(home.path())).unwrap();
        let error = ensure(home.path(), false).await.err().unwrap();
        assert!(error.code == ErrorCode::DaemonUnavailable && error.message.contains("does not answer"), "{error}");
    }

    #[test]
    fn secrets_of_the_command_are_not_for_the_daemon() {
        for name in ["PATH", "HOME", "LC_ALL", "HTTPS_PROXY", "no_proxy", "HEYVM_LOG", "HEYVM_AGENT"] {
            assert!(is_for_the_daemon(name), "{name}");
        }
        for name in [
            "JWT_SECRET",
            "HEYO_API_KEY",
            "HEYO_ARCHIVE_TOKEN",
            "HEYVM_SERVER_SECRET",
            "HEYVM_STORE",
            "AWS_SECRET_ACCESS_KEY",
        ] {
            assert!(!is_for_the_daemon(name), "{name}");
        }
        let home = tempfile::tempdir().unwrap();
        let program = home.path().join("show");
        fs::write(&program, "#!/bin/sh\nenv\n").unwrap();
        fs::set_permissions(&program, PermissionsExt::from_mode(0o700)).unwrap();
        let printed = daemon_command(home.path(), &program, "/bin", false).output().unwrap();
        let names = String::from_utf8(printed.stdout).unwrap();
        // What cargo gives a test is there to be left out.
        assert!(!names.contains("CARGO_") && names.contains("PATH="), "{names}");
    }

    #[test]
    fn the_daemon_finds_what_administrators_have() {
        let home = tempfile::tempdir().unwrap();
        for (own, expected) in
            [("/home/me/bin:/bin", format!("/home/me/bin:/bin:{SYSTEM_PATH}")), ("", SYSTEM_PATH.into())]
        {
            let command = daemon_command(home.path(), Path::new("/heyvm"), own, false);
            let path = command.get_envs().find(|(name, _)| *name == "PATH").and_then(|(_, value)| value);
            assert_eq!(path, Some(OsStr::new(&expected)));
        }
    }
}
