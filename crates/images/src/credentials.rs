//! What the user says about registries: mirrors and credentials, from the configuration or from where Docker keeps them.
//! Format of the latter: config.json, `{"auths": {"registry.example.com": {"auth": base64 of "user:password"}}}`.

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde::Deserialize;

use crate::{Error, Requester};

/// Where images come from when nothing else is said.
const DOCKER: &str = "docker.io";
/// Registries that a server's accounts may pull from when the operator does not say which.
pub const ALLOWED: [&str; 9] = [
    DOCKER,
    "ghcr.io",
    "quay.io",
    "gcr.io",
    "mcr.microsoft.com",
    "public.ecr.aws",
    "registry.gitlab.com",
    "registry.k8s.io",
    "registry.access.redhat.com",
];
/// Allows every registry at a public address.
const ANY: &str = "*";

/// What the user says about registries, by registry name (`docker.io`).
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(transparent)]
pub struct RegistryConfig {
    registries: BTreeMap<String, Registry>,
    /// Docker's config.json; where it is for this user when not set.
    #[serde(skip)]
    docker_config: Option<PathBuf>,
    /// Registries for accounts; [`ALLOWED`] when not set.
    #[serde(skip)]
    allowed: Option<Vec<String>>,
}

/// One registry.
#[derive(Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Registry {
    /// Asked first, in order; `http://host:port` or `https://host`.
    mirrors: Vec<String>,
    /// Speak plain HTTP to the registry itself.
    insecure: bool,
    /// Hosts of its token service, where that is at another site.
    realms: Vec<String>,
    /// Name to log in with; Docker's own credentials are used where none is given.
    username: Option<String>,
    /// The password or access token that goes with it.
    password: Option<String>,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hosts: Vec<_> = self.mirrors.iter().map(|mirror| mirror.rsplit('@').next()).collect();
        f.debug_struct("Registry").field("mirrors", &hosts).field("insecure", &self.insecure).finish_non_exhaustive()
    }
}

/// A host that may have an image.
#[derive(Debug, PartialEq, Eq)]
pub struct Host {
    /// Name, and port where it is an unusual one.
    pub name: String,
    /// Whether it speaks HTTP without TLS.
    pub plain: bool,
    /// Whether the operator has named it: then it may be in a private network.
    pub trusted: bool,
}

/// Name and password at a registry.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The user's name there.
    pub user: String,
    /// A password or an access token.
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

impl RegistryConfig {
    /// Reads Docker's credentials from this file instead of the user's own.
    #[must_use]
    pub fn with_docker_config(mut self, path: impl Into<PathBuf>) -> Self {
        self.docker_config = Some(path.into());
        self
    }

    /// Lets accounts pull from these registries alone; `*` allows all at public addresses.
    #[must_use]
    pub fn allowing(mut self, registries: Vec<String>) -> Self {
        self.allowed = Some(registries);
        self
    }

    /// A sentence for the user when passwords of this configuration, which was read from `file`, are open to others.
    pub fn exposed_by(&self, file: &Path) -> Option<String> {
        let secret = self.registries.values().any(|registry| registry.password.is_some());
        if secret { exposed(file) } else { None }
    }

    /// The mirrors of a registry in their order, then the registry itself.
    pub fn hosts(&self, registry: &str, requester: Requester) -> Result<Vec<Host>, Error> {
        let known = self.registries.get(registry);
        let listed = self.is_allowed(registry);
        if requester == Requester::Tenant && !listed && !self.is_allowed(ANY) {
            return Err(Error::RegistryNotAllowed(registry.to_owned()));
        }
        let mirrors = known.map(|known| known.mirrors.as_slice()).unwrap_or_default();
        let mut hosts = mirrors.iter().map(|mirror| mirror_host(registry, mirror)).collect::<Result<Vec<_>, _>>()?;
        let plain = known.is_some_and(|known| known.insecure);
        hosts.push(Host { name: registry.to_owned(), plain, trusted: listed || known.is_some() });
        Ok(hosts)
    }

    fn is_allowed(&self, registry: &str) -> bool {
        match &self.allowed {
            Some(allowed) => allowed.iter().any(|known| known == registry),
            None => ALLOWED.contains(&registry),
        }
    }

    /// Hosts at other sites that a registry's token service may be at: those named for it, and registries that accounts
    /// may pull from.
    pub fn realms(&self, registry: &str) -> Vec<String> {
        let named = self.registries.get(registry).map(|known| known.realms.clone()).unwrap_or_default();
        let allowed = self.allowed.clone().unwrap_or_else(|| ALLOWED.map(str::to_owned).to_vec());
        named.into_iter().chain(allowed).collect()
    }

    /// What we are known by at a host, be it a registry or a mirror: a registry's password is for itself alone. Blocks
    /// where Docker's file is read.
    pub fn credentials(&self, host: &str) -> Option<Credentials> {
        let own = self.registries.get(host).and_then(|registry| {
            Some(Credentials { user: registry.username.clone()?, password: registry.password.clone()? })
        });
        own.or_else(|| from_docker(&self.docker_config.clone().or_else(docker_config)?, host))
    }
}

fn mirror_host(registry: &str, mirror: &str) -> Result<Host, Error> {
    let plain = mirror.starts_with("http://");
    let name = mirror.trim_start_matches("http://").trim_start_matches("https://").trim_end_matches('/');
    if name.contains('@') {
        // Not repeated: it holds a password.
        return Err(Error::invalid(format!(
            "a mirror of {registry} holds credentials: give them as username and password of a registry of its name"
        )));
    }
    if name.is_empty() || name.contains(['/', '?', '#']) {
        return Err(Error::invalid(format!("{mirror:?} is no mirror: write http://HOST:PORT or https://HOST")));
    }
    Ok(Host { name: name.to_owned(), plain, trusted: true })
}

/// Where Docker's own program looks.
fn docker_config() -> Option<PathBuf> {
    let dir = std::env::var_os("DOCKER_CONFIG").map(PathBuf::from);
    let dir = dir.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".docker")))?;
    Some(dir.join("config.json"))
}

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, DockerAuth>,
}

#[derive(Deserialize)]
struct DockerAuth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
}

/// A broken file is no reason not to pull what everybody may.
#[expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]
fn from_docker(path: &Path, host: &str) -> Option<Credentials> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "registry credentials cannot be read");
            return None;
        }
        Ok(bytes) => bytes,
    };
    let config: DockerConfig = match serde_json::from_slice(&bytes) {
        Ok(config) => config,
        Err(error) => {
            // The place alone: the words might quote a password.
            let (line, column) = (error.line(), error.column());
            tracing::warn!(path = %path.display(), line, column, "registry credentials cannot be read");
            return None;
        }
    };
    let auth = config.auths.into_iter().find(|(key, _)| docker_host(key) == host)?.1;
    let credentials = auth.credentials();
    if credentials.is_some()
        && let Some(problem) = exposed(path)
    {
        tracing::warn!("{problem}");
    }
    credentials
}

impl DockerAuth {
    fn credentials(self) -> Option<Credentials> {
        let pair = self.auth.filter(|auth| !auth.is_empty()).and_then(|auth| {
            let text = String::from_utf8(BASE64_STANDARD.decode(auth.trim()).ok()?).ok()?;
            let (user, password) = text.split_once(':')?;
            Some((user.to_owned(), password.trim_end_matches('\0').to_owned()))
        });
        let (user, password) = pair.or_else(|| Some((self.username?, self.password?)))?;
        Some(Credentials { user, password })
    }
}

/// `https://index.docker.io/v1/` → `docker.io`.
fn docker_host(key: &str) -> &str {
    let host = key.trim_start_matches("https://").trim_start_matches("http://");
    match host.split('/').next().unwrap_or(host) {
        "index.docker.io" | "registry-1.docker.io" => DOCKER,
        host => host,
    }
}

#[expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]
fn exposed(file: &Path) -> Option<String> {
    let mode = fs::metadata(file).ok()?.permissions().mode();
    let open = mode & 0o077 != 0;
    open.then(|| format!("{file} holds passwords and is open to others: chmod 600 {file}", file = file.display()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SECRET: &str = "hush-hush";

    fn config(value: serde_json::Value) -> RegistryConfig {
        serde_json::from_value(value).unwrap()
    }

    fn docker(text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        (dir, path)
    }

    #[test]
    fn credentials_are_for_the_host_they_are_given_for() {
        let auth = BASE64_STANDARD.encode("me:pass:word");
        let (_dir, path) = docker(
            &json!({"auths": {
                "https://index.docker.io/v1/": {"auth": auth},
                "registry.example.com": {"auth": BASE64_STANDARD.encode("other:x")},
                "plain.example.com": {"username": "u", "password": "p"},
                "store.example.com": {},
                "broken.example.com": {"auth": "!!!"},
            }})
            .to_string(),
        );
        let config = config(json!({
            "registry.example.com": {"username": "me", "password": SECRET},
            "docker.io": {"mirrors": ["https://mirror.example.com/"]},
        }))
        .with_docker_config(&path);
        let known = |host: &str| config.credentials(host).map(|known| (known.user, known.password));
        let pair = |user: &str, password: &str| Some((user.to_owned(), password.to_owned()));
        assert_eq!(known("registry.example.com"), pair("me", SECRET), "the configuration comes first");
        assert_eq!(known("docker.io"), pair("me", "pass:word"));
        assert_eq!(known("plain.example.com"), pair("u", "p"));
        for host in ["mirror.example.com", "store.example.com", "broken.example.com", "example.com"] {
            assert_eq!(known(host), None, "{host}");
        }
        let hosts = config.hosts("docker.io", Requester::Operator).unwrap();
        let host = |name: &str| Host { name: name.into(), plain: false, trusted: true };
        assert_eq!(hosts, [host("mirror.example.com"), host("docker.io")]);
    }

    #[test]
    fn accounts_pull_from_allowed_registries_alone() {
        let names = |config: &RegistryConfig, registry: &str| config.hosts(registry, Requester::Tenant).is_ok();
        let config = config(json!({"10.0.0.5:5000": {"insecure": true}}));
        assert!(names(&config, "docker.io") && names(&config, "ghcr.io"));
        for other in ["10.0.0.5:5000", "169.254.169.254", "localhost:5000", "evil.example.com", "*"] {
            assert!(!names(&config, other), "{other}");
            assert!(config.hosts(other, Requester::Operator).is_ok(), "{other}");
        }
        let own = config.clone().allowing(vec!["10.0.0.5:5000".into()]);
        assert!(names(&own, "10.0.0.5:5000") && !names(&own, "docker.io"));
        let any = config.allowing(vec!["*".into()]);
        assert!(names(&any, "evil.example.com"));
        assert!(!any.hosts("127.0.0.1:22", Requester::Tenant).unwrap()[0].trusted, "its address is still checked");
    }

    #[test]
    fn a_broken_file_of_docker_is_no_obstacle() {
        for text in ["", "{", "[]", r#"{"auths": {"a": "hush"}}"#, r#"{"credsStore": "desktop"}"#] {
            let (_dir, path) = docker(text);
            assert_eq!(RegistryConfig::default().with_docker_config(path).credentials("a"), None);
        }
        assert_eq!(RegistryConfig::default().with_docker_config("/nowhere/config.json").credentials("a"), None);
    }

    #[test]
    fn secrets_are_shown_to_nobody() {
        let mirror = format!("https://user:{SECRET}@mirror.example.com");
        let config =
            config(json!({"registry.example.com": {"username": "me", "password": SECRET, "mirrors": [mirror]}}));
        let refused = config.hosts("registry.example.com", Requester::Operator).unwrap_err();
        let known = config.credentials("registry.example.com").unwrap();
        for shown in [format!("{config:?}"), format!("{refused} {refused:?}"), format!("{known:?}")] {
            assert!(!shown.contains(SECRET) && !shown.contains("me:"), "{shown}");
        }
    }

    #[test]
    fn a_mirror_is_a_host() {
        for bad in ["", "https://", "https://mirror.example.com/path", "ftp://mirror.example.com"] {
            assert!(mirror_host("docker.io", bad).is_err(), "{bad}");
        }
        assert!(mirror_host("docker.io", "http://127.0.0.1:5000").unwrap().plain);
    }

    #[test]
    fn a_file_with_passwords_that_others_can_read_is_told_of() {
        let (_dir, path) = docker("");
        let config = config(json!({"registry.example.com": {"username": "me", "password": SECRET}}));
        assert_eq!(config.exposed_by(&path), None);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let told = config.exposed_by(&path).unwrap();
        assert!(told.contains("chmod 600") && !told.contains(SECRET), "{told}");
        assert_eq!(RegistryConfig::default().exposed_by(&path), None);
    }
}
