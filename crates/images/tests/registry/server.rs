//! A docker-registry on a loopback port of its own; it ends with the test, whatever becomes of that.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use tempfile::TempDir;

/// Name and password of those who may use a [`Server::with_password`].
pub const USER: &str = "frodo";
pub const PASSWORD: &str = "mellon-not-secret";
/// bcrypt of [`PASSWORD`], which is all that docker-registry takes.
const HTPASSWD: &str = "frodo:$2b$04$pxJEDWPW3o/25JjmHYOfouCSTX6l3pdiPOgoUSkkMxMRrzQeH0Kw2\n";

pub struct Server {
    process: Child,
    dir: TempDir,
    /// `127.0.0.1:PORT`.
    pub host: String,
    credentials: bool,
}

impl Server {
    pub fn start() -> Self {
        Self::run("", false)
    }

    pub fn with_password() -> Self {
        Self::run("auth: {htpasswd: {realm: test, path: HTPASSWD}}\n", true)
    }

    fn run(extra: &str, credentials: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let htpasswd = dir.path().join("htpasswd");
        fs::write(&htpasswd, HTPASSWD).unwrap();
        let config = format!(
            "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '127.0.0.1:0'}}\n{}",
            dir.path().join("data").display(),
            extra.replace("HTPASSWD", htpasswd.to_str().unwrap()),
        );
        fs::write(dir.path().join("config.yml"), config).unwrap();
        // Also when this process is killed, and no destructor runs.
        let mut process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "docker-registry", "serve"])
            .arg(dir.path().join("config.yml"))
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(process.stderr.take().unwrap());
        let mut said = String::new();
        let host = loop {
            let mut line = String::new();
            if log.read_line(&mut line).unwrap() == 0 {
                process.kill().ok();
                process.wait().ok();
                panic!("docker-registry did not start: {said}");
            }
            if let Some((_, rest)) = line.split_once("listening on ") {
                break rest.split(['"', ',', ' ', '\n']).next().unwrap().to_owned();
            }
            said.push_str(&line);
        };
        // Nobody reads on: a full pipe would stop the registry.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Self { process, dir, host, credentials }
    }

    /// Copies an OCI layout here; answers `127.0.0.1:PORT/NAME`.
    pub fn push(&self, layout: &Path, name: &str) -> String {
        let mut command = Command::new("skopeo");
        command.args([
            "--insecure-policy",
            "copy",
            "--quiet",
            "--all",
            "--preserve-digests",
            "--dest-tls-verify=false",
        ]);
        if self.credentials {
            command.arg(format!("--dest-creds={USER}:{PASSWORD}"));
        }
        let reference = format!("{}/{name}", self.host);
        command.arg(format!("oci:{}", layout.display())).arg(format!("docker://{reference}"));
        let output = command.output().unwrap();
        assert!(output.status.success(), "skopeo: {}", String::from_utf8_lossy(&output.stderr));
        reference
    }

    /// The file in which the registry keeps a blob.
    pub fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").unwrap();
        self.dir.path().join("data/docker/registry/v2/blobs/sha256").join(&hex[..2]).join(hex).join("data")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}
