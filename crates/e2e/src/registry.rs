//! A real OCI registry (Debian's docker-registry) on loopback, filled with skopeo.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use crate::{Ran, eventually};

/// A registry that ends with its test.
pub struct Registry {
    process: Child,
    directory: PathBuf,
    /// `127.0.0.1:PORT`.
    pub address: String,
}

impl Registry {
    /// Starts an empty one below `directory`.
    pub fn start(directory: &Path) -> Self {
        let directory = directory.join("registry");
        fs::create_dir_all(directory.join("data")).expect("directory");
        let port = free_port();
        let address = format!("127.0.0.1:{port}");
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}/data}}}}\nhttp: {{addr: \"{address}\"}}\n",
            directory.display()
        );
        fs::write(directory.join("config.yml"), config).expect("configuration");
        let process = Command::new("docker-registry")
            .args(["serve"])
            .arg(directory.join("config.yml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry (installed by ./test)");
        let registry = Self { process, directory, address };
        eventually("the registry answers", || std::net::TcpStream::connect(&registry.address).ok());
        registry
    }

    /// Puts an image with one layer of these files into it and gives its reference.
    pub fn push(&self, name: &str, root: &Path) -> String {
        self.push_configured(name, root, &[])
    }

    /// The same with a configuration, as arguments of `umoci config`.
    pub fn push_configured(&self, name: &str, root: &Path, configuration: &[&str]) -> String {
        let layout = oci_layout(&self.directory, root);
        if !configuration.is_empty() {
            let image = format!("{}:latest", layout.display());
            Ran::of(Command::new("umoci").args(["config", "--image", &image]).args(configuration), b"").succeeded();
        }
        let reference = format!("{}/{name}", self.address);
        Ran::of(
            Command::new("skopeo")
                .args(["copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false"])
                .arg(format!("oci:{}:latest", layout.display()))
                .arg(format!("docker://{reference}")),
            b"",
        )
        .succeeded();
        reference
    }

    /// Files of the registry's storage whose content is a layer or a manifest: to be tampered with.
    pub fn blobs(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut directories = vec![self.directory.join("data")];
        while let Some(directory) = directories.pop() {
            for path in crate::leaks::entries(&directory) {
                if path.is_dir() {
                    directories.push(path);
                } else if path.file_name().is_some_and(|name| name == "data") {
                    found.push(path);
                }
            }
        }
        found
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// An OCI layout (tag `latest`) with one layer that holds a directory's files, made by umoci.
pub fn oci_layout(below: &Path, root: &Path) -> PathBuf {
    let layout = below.join("layout");
    let bundle = below.join("bundle");
    heyvm_trees::remove(&layout).ok();
    heyvm_trees::remove(&bundle).ok();
    let image = format!("{}:latest", layout.display());
    let umoci = |arguments: &[&str]| Ran::of(Command::new("umoci").args(arguments), b"").succeeded();
    umoci(&["init", "--layout", layout.to_str().expect("UTF-8")]);
    umoci(&["new", "--image", &image]);
    umoci(&["insert", "--image", &image, root.to_str().expect("UTF-8"), "/"]);
    layout
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port()
}
