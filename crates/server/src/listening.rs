//! Where the processes of a home listen, for `heyvm daemon status`: the proxy's URLs in `run/edge.listening`, and those of
//! each `heyvm --api` in `run/api-PORT.listening`. Files and no call of the API, since `--api` is a process of its own, and
//! since `/health` answers everyone. Synchronous: some small files, once in a process's life.
#![expect(
    clippy::disallowed_methods,
    reason = "written and removed as a process begins and ends, read by the command line"
)]

use std::{
    fs::{self, File, TryLockError},
    io::{self, Read, Write},
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// The proxy.
const EDGE: &str = "edge";
/// `heyvm --api`.
const API: &str = "api";
const EXTENSION: &str = "listening";

/// The URLs of those that listen now.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Listening {
    /// Of the proxy: sandboxes' host names lead there.
    pub edge: Vec<String>,
    /// Of the REST API.
    pub api: Vec<String>,
}

impl Listening {
    /// What the processes of `home` have announced. One that ended without removing its file holds no lock on it.
    pub fn of(home: &Path) -> Self {
        let mut all = Self::default();
        let mut paths: Vec<PathBuf> =
            fs::read_dir(home.join("run")).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths.iter().filter(|path| path.extension().is_some_and(|extension| extension == EXTENSION)) {
            let name = path.file_stem().unwrap_or_default().to_string_lossy();
            let Some(urls) = announced(path) else { continue };
            match name.split('-').next() {
                Some(EDGE) => all.edge.extend(urls),
                Some(API) => all.api.extend(urls),
                _ => {}
            }
        }
        all
    }
}

fn announced(path: &Path) -> Option<Vec<String>> {
    let mut file = File::open(path).ok()?;
    let Err(TryLockError::WouldBlock) = file.try_lock_shared() else { return None };
    let mut text = String::new();
    file.read_to_string(&mut text).ok()?;
    Some(text.lines().map(str::to_owned).collect())
}

/// Says for as long as it is kept where this process listens.
#[derive(Debug)]
pub struct Announcement {
    path: PathBuf,
    _lock: File,
}

impl Announcement {
    /// For the proxy.
    pub fn of_edge(home: &Path, addresses: &[SocketAddr]) -> Option<Self> {
        Self::made(home, EDGE, addresses)
    }

    /// For one `heyvm --api`.
    pub fn of_api(home: &Path, address: SocketAddr) -> Option<Self> {
        Self::made(home, &format!("{API}-{}", address.port()), &[address])
    }

    /// None where it cannot be written: that is no reason not to serve.
    fn made(home: &Path, name: &str, addresses: &[SocketAddr]) -> Option<Self> {
        let path = home.join("run").join(format!("{name}.{EXTENSION}"));
        let made = Self::write(&path, addresses);
        made.inspect_err(|error| tracing::warn!(%error, ?path, "could not say where this listens")).ok()
    }

    fn write(path: &Path, addresses: &[SocketAddr]) -> io::Result<Self> {
        // Its former owner held the port that is ours now, or the home's lock.
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
        file.lock()?;
        addresses.iter().try_for_each(|address| writeln!(file, "http://{address}"))?;
        Ok(Self { path: path.to_owned(), _lock: file })
    }
}

impl Drop for Announcement {
    fn drop(&mut self) {
        // A file that stays behind holds no lock.
        fs::remove_file(&self.path).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_listens_is_known_until_it_ends() {
        let home = tempfile::tempdir().unwrap();
        assert_eq!(Listening::of(home.path()), Listening::default());
        fs::create_dir(home.path().join("run")).unwrap();
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        let edge = Announcement::of_edge(home.path(), &[address("127.0.0.1:8480"), address("[::1]:8480")]).unwrap();
        let first = Announcement::of_api(home.path(), address("127.0.0.1:3000")).unwrap();
        let _second = Announcement::of_api(home.path(), address("0.0.0.0:3001")).unwrap();
        let all = Listening::of(home.path());
        assert_eq!(all.edge, ["http://127.0.0.1:8480", "http://[::1]:8480"]);
        assert_eq!(all.api, ["http://127.0.0.1:3000", "http://0.0.0.0:3001"]);
        drop((edge, first));
        let all = Listening::of(home.path());
        assert_eq!((all.edge.len(), all.api), (0, vec!["http://0.0.0.0:3001".to_owned()]));
    }

    #[test]
    fn killed_process_listens_no_more_and_the_next_takes_its_place() {
        let home = tempfile::tempdir().unwrap();
        fs::create_dir(home.path().join("run")).unwrap();
        fs::write(home.path().join("run/edge.listening"), "http://127.0.0.1:8480\n").unwrap();
        assert_eq!(Listening::of(home.path()), Listening::default());
        let _edge = Announcement::of_edge(home.path(), &["127.0.0.1:8481".parse().unwrap()]).unwrap();
        assert_eq!(Listening::of(home.path()).edge, ["http://127.0.0.1:8481"]);
    }
}
