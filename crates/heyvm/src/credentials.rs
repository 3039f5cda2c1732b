//! Whom commands ask, and as whom: this machine's daemon, or a heyvm server with the credentials of a login.
//!
//! | credentials, the first that is there | server, the first that is there |
//! | --- | --- |
//! | `--token`, `HEYO_ARCHIVE_TOKEN` | `--cloud-url`, `HEYO_CLOUD_URL`, `HEYO_BASE_URL` |
//! | `HEYO_API_KEY` | where `heyvm login` logged in |
//! | what `heyvm login` kept in `token.json` | |
//!
//! Without a server everything runs on this machine.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use chrono::{DateTime, Utc};
use heyvm_api::{
    ApiError, ErrorCode,
    accounts::{RefreshRequest, Tokens},
    client::{Client, Remote, Server},
};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use url::Url;

use crate::cli::Global;

/// A token that ends sooner is renewed before it is used.
const MARGIN: chrono::Duration = chrono::Duration::seconds(60);

/// What `heyvm login` keeps, in `token.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Login {
    /// A token, or an API key.
    pub access_token: String,
    /// Gets the next token; absent for an API key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refresh_token: Option<String>,
    /// When the token ends; absent: never by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<DateTime<Utc>>,
    /// The server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cloud_url: Option<Url>,
    /// The server to log in at, where it is another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auth_url: Option<Url>,
    /// The account.
    #[serde(default)]
    pub account_id: String,
    /// Who logged in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub email: Option<String>,
}

impl Login {
    /// What a server gave.
    pub fn of(tokens: Tokens, cloud_url: Url, auth_url: Option<Url>) -> Self {
        let lifetime = i64::try_from(tokens.expires_in).ok().and_then(chrono::Duration::try_seconds);
        Self {
            expires_at: lifetime.and_then(|lifetime| Utc::now().checked_add_signed(lifetime)),
            access_token: tokens.access_token,
            refresh_token: Some(tokens.refresh_token),
            cloud_url: Some(cloud_url),
            auth_url,
            account_id: tokens.account_id,
            email: tokens.email,
        }
    }

    fn ends_soon(&self) -> bool {
        self.expires_at.is_some_and(|at| at - Utc::now() < MARGIN)
    }
}

/// A server, and who we are to it.
#[derive(Debug, Clone)]
pub struct Cloud {
    /// Where it is.
    pub url: Url,
    /// Where to log in.
    pub auth_url: Url,
    token: Option<String>,
}

impl Cloud {
    /// The server that a command is for; `None`: this machine.
    pub fn of(global: &Global, home: &Path) -> Result<Option<Self>, ApiError> {
        if global.local {
            return Ok(None);
        }
        let kept = kept(home)?;
        let from_environment = ["HEYO_CLOUD_URL", "HEYO_BASE_URL"].iter().find_map(|name| std::env::var(name).ok());
        let named = global.cloud_url.clone().or(from_environment.filter(|url| !url.is_empty()));
        let named = named.map(|url| server_url(&url)).transpose()?;
        let Some(url) = named.or_else(|| kept.as_ref().and_then(|login| login.cloud_url.clone())) else {
            return Ok(None);
        };
        let auth_url = match &global.auth_url {
            Some(url) => server_url(url)?,
            None => kept.and_then(|login| login.auth_url).unwrap_or_else(|| url.clone()),
        };
        let given = |text: Option<String>| text.filter(|token| !token.is_empty());
        let token = given(global.token.clone()).or_else(|| given(std::env::var("HEYO_API_KEY").ok()));
        Ok(Some(Self { url, auth_url, token }))
    }

    /// A client with the credentials that were given, or those of the login, renewed where that is due.
    pub async fn client(&self, home: &Path) -> Result<Client, ApiError> {
        let token = match &self.token {
            Some(token) => token.clone(),
            None => self.login(home).await?.access_token,
        };
        server(&self.url).with_bearer(&token)
    }

    async fn login(&self, home: &Path) -> Result<Login, ApiError> {
        let login = kept(home)?.filter(|login| login.cloud_url.as_ref() == Some(&self.url)).ok_or_else(|| {
            ApiError::new(ErrorCode::Unauthorized, format!("there are no credentials for {}", self.url))
                .hint(format!("heyvm login --cloud-url {}, or set HEYO_API_KEY", self.url))
        })?;
        if !login.ends_soon() {
            return Ok(login);
        }
        // Of many commands at once one renews it: a refresh token counts once.
        let _one_at_a_time = lock(home)?;
        match kept(home)?.filter(|login| !login.ends_soon()) {
            Some(renewed) => Ok(renewed),
            None => self.renew(home, login).await,
        }
    }

    async fn renew(&self, home: &Path, login: Login) -> Result<Login, ApiError> {
        let Some(refresh_token) = login.refresh_token else { return Ok(login) };
        let asked = server(&self.auth_url).post("/api/auth/refresh", &RefreshRequest { refresh_token }).await;
        let tokens: Tokens = asked.map_err(|error: ApiError| match error.code {
            ErrorCode::Unauthorized => ApiError::new(ErrorCode::Unauthorized, "the login has ended")
                .hint(format!("heyvm login --cloud-url {}", self.url)),
            _ => error,
        })?;
        let renewed = Login::of(tokens, self.url.clone(), login.auth_url);
        keep(home, &renewed)?;
        Ok(renewed)
    }
}

/// A client of a server that does not know us yet.
pub fn server(url: &Url) -> Client {
    Client::new(Server::Remote(Remote { url: url.clone(), tls: None }))
}

/// `http` or `https`, without a password in it.
pub fn server_url(text: &str) -> Result<Url, ApiError> {
    let url = Url::parse(text).ok().filter(|url| ["http", "https"].contains(&url.scheme()) && url.has_host());
    let url = url.filter(|url| url.password().is_none() && url.username().is_empty());
    url.ok_or_else(|| {
        ApiError::new(ErrorCode::InvalidArgument, "the server's address is no URL of one")
            .hint("for example --cloud-url https://api.example.org")
    })
}

fn path(home: &Path) -> PathBuf {
    home.join("token.json")
}

/// What the last login left.
pub fn kept(home: &Path) -> Result<Option<Login>, ApiError> {
    match fs::read(path(home)) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|_| {
            // The parser's own text could show a piece of the token.
            ApiError::new(ErrorCode::Unauthorized, format!("{} cannot be read", path(home).display()))
                .hint("heyvm login writes it anew, heyvm logout removes it")
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unusable(home, &error)),
    }
}

/// Keeps a login for the next command, readable by its owner alone: written aside, then put in place.
pub fn keep(home: &Path, login: &Login) -> Result<(), ApiError> {
    let write = || {
        fs::create_dir_all(home)?;
        let aside = home.join(format!(".token.json.{}", std::process::id()));
        let mut file = File::options().create(true).truncate(true).write(true).mode(0o600).open(&aside)?;
        file.write_all(&serde_json::to_vec_pretty(login)?)?;
        file.sync_all()?;
        fs::rename(&aside, path(home))
    };
    write().map_err(|error| unusable(home, &error))
}

/// Forgets it.
pub fn forget(home: &Path) -> Result<(), ApiError> {
    match fs::remove_file(path(home)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(unusable(home, &error)),
        _ => Ok(()),
    }
}

fn lock(home: &Path) -> Result<Flock<File>, ApiError> {
    let file = File::options().create(true).truncate(false).write(true).mode(0o600).open(home.join("token.lock"));
    let file = file.map_err(|error| unusable(home, &error))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| unusable(home, &errno.into()))
}

fn unusable(home: &Path, error: &io::Error) -> ApiError {
    ApiError::new(ErrorCode::HostNotReady, format!("{} cannot be used: {error}", path(home).display()))
        .hint("set HEYO_HOME to a directory of yours")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn login(expires_in: i64) -> Login {
        Login {
            access_token: "secret".into(),
            refresh_token: None,
            expires_at: Some(Utc::now() + chrono::Duration::seconds(expires_in)),
            cloud_url: Some(Url::parse("https://api.example.org").unwrap()),
            auth_url: None,
            account_id: "a".into(),
            email: None,
        }
    }

    #[test]
    fn a_login_is_its_owners_alone_and_can_be_forgotten() {
        let home = tempfile::tempdir().unwrap();
        assert!(kept(home.path()).unwrap().is_none());
        keep(home.path(), &login(3600)).unwrap();
        let mode = fs::metadata(path(home.path())).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(kept(home.path()).unwrap().unwrap().access_token, "secret");
        forget(home.path()).unwrap();
        forget(home.path()).unwrap();
        assert!(kept(home.path()).unwrap().is_none());
    }

    #[test]
    fn a_broken_file_is_told_of_without_its_content() {
        let home = tempfile::tempdir().unwrap();
        fs::write(path(home.path()), "{\"access_token\": \"secret").unwrap();
        let error = kept(home.path()).unwrap_err();
        assert!(!error.message.contains("secret") && error.hint.is_some(), "{error:?}");
    }

    #[test]
    fn a_token_is_renewed_before_it_ends() {
        assert!(login(30).ends_soon() && !login(3600).ends_soon());
        assert!(!Login { expires_at: None, ..login(0) }.ends_soon());
    }

    #[test]
    fn a_servers_address_is_http_and_holds_no_password() {
        for bad in ["", "api.example.org", "ftp://a", "https://", "https://user:secret@a"] {
            let error = server_url(bad).unwrap_err();
            assert!(!error.message.contains("secret"), "{bad}");
        }
        server_url("http://127.0.0.1:4445").unwrap();
    }
}
