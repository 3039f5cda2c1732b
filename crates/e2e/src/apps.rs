//! Directories to deploy.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use flate2::{Compression, write::GzEncoder};

use crate::{Host, Ran, host::project};

/// One server with everything the tests ask of an app: see the file itself.
const WEB: &str = include_str!("../apps/web.py");

impl Host {
    /// A directory with these files.
    pub fn app(&self, name: &str, files: &[(&str, &str)]) -> PathBuf {
        let directory = self.scratch().join(name);
        for (path, content) in files {
            let path = directory.join(path);
            fs::create_dir_all(path.parent().expect("parent")).expect("directory");
            fs::write(path, content).expect("file");
        }
        directory
    }

    /// The tests' web server: start command `python3 web.py`, port 8080, health at /health.
    pub fn web_app(&self) -> PathBuf {
        self.app("web", &[("web.py", WEB)])
    }

    /// A copy of directories below examples/, laid over one another.
    pub fn example(&self, name: &str, examples: &[&str]) -> PathBuf {
        let directory = self.scratch().join(name);
        fs::create_dir_all(&directory).expect("directory");
        for example in examples {
            let from = project().join("examples").join(example).join(".");
            Ran::of(Command::new("cp").arg("-a").arg(from).arg(&directory), b"").succeeded();
        }
        directory
    }
}

/// The flags that deploy [`Host::web_app`].
pub const WEB_FLAGS: [&str; 6] = ["--port", "8080", "--start-command", "python3 web.py", "--health-path", "/health"];

/// A directory as a tar.gz whose files are named from `path`.
pub fn packed(path: &str, directory: &Path) -> Vec<u8> {
    let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    tar.append_dir_all(path, directory).expect("tar");
    tar.into_inner().and_then(GzEncoder::finish).expect("gzip")
}

/// The project's examples directory.
pub fn examples() -> PathBuf {
    Path::new(&project()).join("examples")
}
