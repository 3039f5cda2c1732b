//! Requests to one registry: redirects hop by hop, and the token that it asks for. Format: OCI distribution
//! specification; the token service is Docker's ("Token Authentication Specification").

use std::time::Duration;

use base64::{Engine, prelude::BASE64_STANDARD};
use reqwest::{
    Response, StatusCode, Url,
    header::{ACCEPT, AUTHORIZATION, HeaderValue, LOCATION, WWW_AUTHENTICATE},
};
use serde::Deserialize;

use crate::{
    credentials::{Credentials, Host},
    reach::{self, Forbidden, Reach, Requester},
};

/// A registry that accepts a connection and stays silent this long is not there.
const HEAD_DEADLINE: Duration = Duration::from_secs(30);
const MAX_REDIRECTS: usize = 5;
/// Bytes of a token service's answer.
const MAX_TOKEN: u64 = 1 << 20;

/// Why a registry did not give what was asked for.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    #[error("it has no such image")]
    Missing,
    #[error("it refuses the user name and password that are configured for it")]
    Credentials,
    #[error("it wants a user name and password, or has no such image")]
    Anonymous,
    #[error("it answers with HTTP {0}")]
    Status(u16),
    #[error("{0}")]
    Forbidden(#[from] Forbidden),
    #[error("its token service is at another site; name that under realms of this registry in config.toml to trust it")]
    ForeignRealm,
    #[error("its token service gives no token")]
    NoToken,
    #[error("it redirects without end")]
    Redirects,
    #[error("it does not answer within {} s", HEAD_DEADLINE.as_secs())]
    Silent,
    #[error("its answer is longer than {0} bytes")]
    TooLong(u64),
    #[error(transparent)]
    Http(reqwest::Error),
}

impl From<reqwest::Error> for Refused {
    fn from(error: reqwest::Error) -> Self {
        if reach::is_private(&error) {
            return Self::Forbidden(Forbidden::Private);
        }
        // The address may carry a signature.
        Self::Http(error.without_url())
    }
}

/// A conversation about one repository of a registry.
pub(super) struct Session {
    reach: Reach,
    base: Url,
    repository: String,
    credentials: Option<Credentials>,
    realms: Vec<String>,
    authorization: tokio::sync::Mutex<Option<HeaderValue>>,
}

impl Session {
    /// `None` for a host that is no part of a URL.
    pub fn new(
        host: &Host,
        repository: &str,
        credentials: Option<Credentials>,
        realms: Vec<String>,
        requester: Requester,
    ) -> Option<Self> {
        let scheme = if host.plain { "http" } else { "https" };
        let name = if host.name == "docker.io" { "registry-1.docker.io" } else { &host.name };
        let base: Url = format!("{scheme}://{name}/v2/{repository}/").parse().ok()?;
        let reach = Reach::new(&base, host.trusted, requester).ok()?;
        Some(Self {
            reach,
            base,
            repository: repository.to_owned(),
            credentials,
            realms,
            authorization: tokio::sync::Mutex::default(),
        })
    }

    /// Whether the operator's credentials are used.
    pub fn has_credentials(&self) -> bool {
        self.credentials.is_some()
    }

    /// Asks for a path below the repository.
    pub async fn get(&self, path: &str, accept: &str) -> Result<Response, Refused> {
        let url = self.base.join(path).map_err(|_| Refused::Missing)?;
        let known = self.authorization.lock().await.clone();
        let response = self.follow(url.clone(), accept, known.as_ref()).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return checked(response);
        }
        // A token may have run out.
        let fresh = self.authorize(&response).await?;
        *self.authorization.lock().await = Some(fresh.clone());
        let response = self.follow(url, accept, Some(&fresh)).await?;
        match response.status() {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(self.unauthorized()),
            _ => checked(response),
        }
    }

    fn unauthorized(&self) -> Refused {
        if self.credentials.is_some() { Refused::Credentials } else { Refused::Anonymous }
    }

    /// Follows redirects. What authorizes is for the registry itself alone.
    async fn follow(
        &self,
        mut url: Url,
        accept: &str,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, Refused> {
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.reach.client_for(&url)?.get(url.clone()).header(ACCEPT, accept);
            if let Some(value) = authorization.filter(|_| url.origin() == self.base.origin()) {
                request = request.header(AUTHORIZATION, value);
            }
            let response = head(request).await?;
            let next = response.headers().get(LOCATION).filter(|_| response.status().is_redirection());
            let Some(next) = next else { return Ok(response) };
            url = next.to_str().ok().and_then(|next| url.join(next).ok()).ok_or(Refused::Redirects)?;
        }
        Err(Refused::Redirects)
    }

    /// Answers the challenge of a 401.
    async fn authorize(&self, response: &Response) -> Result<HeaderValue, Refused> {
        let mut challenges =
            response.headers().get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        let Some(challenge) = challenges.find_map(Challenge::from_header) else { return Err(self.unauthorized()) };
        let credentials = self.credentials.as_ref();
        match challenge {
            Challenge::Basic => credentials.and_then(basic).ok_or_else(|| self.unauthorized()),
            Challenge::Bearer { realm, service } => self.token(&realm, service.as_deref()).await,
        }
    }

    async fn token(&self, realm: &str, service: Option<&str>) -> Result<HeaderValue, Refused> {
        let mut url: Url = realm.parse().map_err(|_| Refused::NoToken)?;
        self.check_realm(&url)?;
        url.query_pairs_mut().append_pair("scope", &format!("repository:{}:pull", self.repository));
        if let Some(service) = service {
            url.query_pairs_mut().append_pair("service", service);
        }
        let mut request = self.reach.client_for(&url)?.get(url).header(ACCEPT, "application/json");
        if let Some(value) = self.credentials.as_ref().and_then(basic) {
            request = request.header(AUTHORIZATION, value);
        }
        // No redirect is followed: the credentials are for the token service that was checked.
        let response = head(request).await?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return Err(self.unauthorized()),
            _ => return Err(Refused::NoToken),
        }
        let token: Token = serde_json::from_slice(&body(response, MAX_TOKEN).await?).map_err(|_| Refused::NoToken)?;
        let token = token.token.or(token.access_token).filter(|token| !token.is_empty()).ok_or(Refused::NoToken)?;
        secret(format!("Bearer {token}")).ok_or(Refused::NoToken)
    }

    /// A token service belongs to the registry's own site, or the operator has named it. One without TLS belongs to a
    /// registry without TLS, and is on the same host.
    fn check_realm(&self, realm: &Url) -> Result<(), Refused> {
        let (Some(host), Some(own)) = (realm.host_str(), self.base.host_str()) else { return Err(Refused::NoToken) };
        if realm.scheme() != "https" && (self.base.scheme() == "https" || host != own) {
            return Err(Refused::Forbidden(Forbidden::Plain));
        }
        if same_site(host, own) || self.realms.iter().any(|trusted| trusted == host) {
            return Ok(());
        }
        Err(Refused::ForeignRealm)
    }
}

/// Whether a host is the registry's, one below it, or one below the domain that the registry is in:
/// `auth.example.com` for `registry.example.com`.
fn same_site(host: &str, registry: &str) -> bool {
    let below = |domain: &str| host == domain || host.strip_suffix(domain).is_some_and(|front| front.ends_with('.'));
    let is_name = |host: &str| host.contains(|c: char| c.is_ascii_alphabetic()) && !host.starts_with('[');
    let parent = registry.split_once('.').map(|(_, parent)| parent).filter(|parent| parent.contains('.'));
    below(registry) || (is_name(registry) && parent.is_some_and(below))
}

enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String> },
}

impl Challenge {
    fn from_header(value: &str) -> Option<Self> {
        let challenges = http_auth::parse_challenges(value).ok()?;
        let scheme = |name: &str| challenges.iter().find(|challenge| challenge.scheme.eq_ignore_ascii_case(name));
        let Some(bearer) = scheme("bearer") else { return scheme("basic").map(|_| Self::Basic) };
        let parameter = |name: &str| {
            let (_, value) = bearer.params.iter().find(|(known, _)| known.eq_ignore_ascii_case(name))?;
            Some(value.to_unescaped())
        };
        Some(Self::Bearer { realm: parameter("realm")?, service: parameter("service") })
    }
}

#[derive(Deserialize)]
struct Token {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
}

fn basic(known: &Credentials) -> Option<HeaderValue> {
    secret(format!("Basic {}", BASE64_STANDARD.encode(format!("{}:{}", known.user, known.password))))
}

fn secret(text: String) -> Option<HeaderValue> {
    let mut value = HeaderValue::try_from(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

async fn head(request: reqwest::RequestBuilder) -> Result<Response, Refused> {
    Ok(tokio::time::timeout(HEAD_DEADLINE, request.send()).await.map_err(|_| Refused::Silent)??)
}

fn checked(response: Response) -> Result<Response, Refused> {
    match response.status() {
        StatusCode::OK => Ok(response),
        StatusCode::NOT_FOUND => Err(Refused::Missing),
        status => Err(Refused::Status(status.as_u16())),
    }
}

/// The whole of a short answer.
pub(super) async fn body(mut response: Response, most: u64) -> Result<Vec<u8>, Refused> {
    let mut all = Vec::new();
    while let Some(piece) = response.chunk().await? {
        if (all.len() + piece.len()) as u64 > most {
            return Err(Refused::TooLong(most));
        }
        all.extend_from_slice(&piece);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(host: &str, plain: bool, realms: &[&str]) -> Session {
        let host = Host { name: host.into(), plain, trusted: true };
        let realms = realms.iter().map(|realm| (*realm).to_owned()).collect();
        Session::new(&host, "team/app", None, realms, Requester::Operator).unwrap()
    }

    #[test]
    fn a_token_service_is_of_the_registrys_site() {
        let good = [
            ("docker.io", "https://auth.docker.io/token"),
            ("ghcr.io", "https://ghcr.io/token"),
            ("registry.gitlab.com", "https://gitlab.com/jwt/auth"),
            ("registry.example.com", "https://auth.example.com/token"),
            ("registry.example.com:5000", "https://registry.example.com:5001/token"),
        ];
        for (registry, realm) in good {
            assert!(session(registry, false, &[]).check_realm(&realm.parse().unwrap()).is_ok(), "{registry} {realm}");
        }
        let foreign = [
            ("ghcr.io", "https://evil.io/token"),
            ("ghcr.io", "https://xghcr.io/token"),
            ("registry.example.com", "https://example.org/token"),
            ("registry.example.com", "https://evilexample.com/token"),
            ("registry.example.com", "https://10.0.0.1/token"),
            ("10.1.2.3:5000", "https://10.7.2.3/token"),
        ];
        for (registry, realm) in foreign {
            let refused = session(registry, false, &[]).check_realm(&realm.parse().unwrap());
            assert!(matches!(refused, Err(Refused::ForeignRealm)), "{registry} {realm}");
        }
        let listed = session("mirror.example.com", false, &["ghcr.io"]);
        assert!(listed.check_realm(&"https://ghcr.io/token".parse().unwrap()).is_ok());
    }

    #[test]
    fn a_token_service_without_tls_is_on_a_host_without_tls() {
        let refused = |registry: &Session, realm: &str| registry.check_realm(&realm.parse().unwrap()).is_err();
        assert!(refused(&session("registry.example.com", false, &[]), "http://registry.example.com/token"));
        let plain = session("127.0.0.1:5000", true, &[]);
        assert!(!refused(&plain, "http://127.0.0.1:5001/token"));
        assert!(refused(&plain, "http://169.254.169.254/token"));
    }
}
