//! PostgreSQL for tests: one server per test binary, on a Unix socket alone, one database per test.
//!
//! ```text
//! test binary ──pipe──▶ sh (keeper) ──▶ postgres
//! ```
//! The keeper waits for the end of the pipe, which comes with the end of the test binary, be it killed; then it ends the
//! server and removes its directory.

use std::{
    fs, io,
    os::unix::{
        fs::{PermissionsExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::unistd::{Uid, User};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor, postgres::PgConnectOptions};

/// The superuser's password: with one, tests can tell that it is shown nowhere.
pub const PASSWORD: &str = "s3cret-of-tests";

const START: Duration = Duration::from_secs(60);
const KEEPER: &str = r#"
"$1/postgres" -D "$2/data" -k "$2" -c listen_addresses= -c fsync=off -c max_connections=200 >"$2/log" 2>&1 &
server=$!
cat >/dev/null
kill -INT $server
wait $server
rm -rf "$2"
"#;

struct Server {
    directory: PathBuf,
    // Its standard input is the pipe whose end ends the server.
    _keeper: Child,
}

/// The URL of a new, empty database of its own, with user and password in it.
///
/// # Panics
/// Where PostgreSQL is not installed (`setup/host.sh` installs what tests need) or does not start.
pub async fn database() -> String {
    static SERVER: OnceLock<Server> = OnceLock::new();
    static NUMBER: AtomicU32 = AtomicU32::new(1);
    let server = SERVER.get_or_init(|| start().unwrap_or_else(|error| panic!("PostgreSQL does not start: {error}")));
    let name = format!("test_{}", NUMBER.fetch_add(1, Ordering::Relaxed));
    server.create(&name).await.unwrap_or_else(|error| panic!("no database for this test: {error}"));
    server.url(&name)
}

impl Server {
    fn url(&self, database: &str) -> String {
        format!("postgres://postgres:{PASSWORD}@localhost/{database}?host={}", self.directory.display())
    }

    async fn create(&self, database: &str) -> Result<(), sqlx::Error> {
        let options = PgConnectOptions::new().socket(&self.directory).username("postgres").password(PASSWORD);
        let mut connection = options.database("postgres").connect().await?;
        connection.execute(AssertSqlSafe(format!("CREATE DATABASE {database}"))).await?;
        connection.close().await
    }
}

fn start() -> io::Result<Server> {
    let programs = programs()?;
    let directory = tempfile::Builder::new().prefix("heyvm-postgres-").tempdir_in("/tmp")?.keep();
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o700))?;
    let password = directory.join("password");
    fs::write(&password, PASSWORD)?;
    let owner = owner()?;
    if let Some(user) = &owner {
        for path in [&directory, &password] {
            chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw()))?;
        }
    }
    let mut initdb = as_user(&programs.join("initdb"), owner.as_ref());
    initdb.args(["--auth=scram-sha-256", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync"]);
    let made = initdb.arg("--pgdata").arg(directory.join("data")).arg("--pwfile").arg(&password).output()?;
    if !made.status.success() {
        return Err(io::Error::other(String::from_utf8_lossy(&made.stderr).into_owned()));
    }
    let mut keeper = as_user(Path::new("/bin/sh"), owner.as_ref());
    keeper.args(["-c", KEEPER, "sh"]).arg(&programs).arg(&directory);
    let keeper = keeper.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0).spawn()?;
    wait_for(&directory)?;
    Ok(Server { directory, _keeper: keeper })
}

/// The server's readiness stands in its log; a socket alone may refuse for a moment still.
fn wait_for(directory: &Path) -> io::Result<()> {
    let deadline = Instant::now() + START;
    loop {
        let log = fs::read_to_string(directory.join("log")).unwrap_or_default();
        if log.contains("ready to accept connections") {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(io::Error::other(log));
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Debian keeps the server's programs out of the search path, by version.
fn programs() -> io::Result<PathBuf> {
    let packaged = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut found: Vec<_> = packaged.map(|entry| entry.path().join("bin")).collect();
    found.sort();
    found.push("/usr/bin".into());
    found.into_iter().find(|directory| directory.join("initdb").exists()).ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, "no initdb; the package postgresql has it, see setup/host.sh")
    })
}

/// PostgreSQL refuses to run as root; the package brings a user for it.
fn owner() -> io::Result<Option<User>> {
    if !Uid::effective().is_root() {
        return Ok(None);
    }
    let user = User::from_name("postgres")?;
    user.map(Some).ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no user postgres to run the server as"))
}

fn as_user(program: &Path, owner: Option<&User>) -> Command {
    let mut command = Command::new(program);
    command.current_dir("/tmp").env("LC_ALL", "C");
    if let Some(user) = owner {
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    }
    command
}
