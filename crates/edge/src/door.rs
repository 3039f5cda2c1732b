//! Private endpoints: who may come in is the doorkeeper's to say. What opens the door stays at it: neither the token nor
//! its cookie reaches a sandbox, at public endpoints neither.
//!
//! | who asks at a private endpoint | answer |
//! | --- | --- |
//! | a browser without a token | 303 to the login page |
//! | a program without a token; a token that is not valid | 401 |
//! | a token of another account | 403 |
//! | a cookie that another site's page sends along | 403, but for following a link |

use async_trait::async_trait;
use http::{
    HeaderMap, HeaderValue, Method,
    header::{AUTHORIZATION, ORIGIN},
    request,
};

use crate::{
    Edge, cookies,
    refusal::{Form, Refusal},
};

/// The cookie on the base domain that holds a visitor's token.
pub const TOKEN_COOKIE: &str = "__heyo_token";
/// A page may set further cookies of that name, for its own host or path; the right one is looked for among so many.
const MOST_COOKIES: usize = 4;

/// Who may use an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Access {
    /// Everyone.
    Public,
    /// Those whose credential belongs to the account.
    Members {
        /// The account's id.
        account: String,
    },
}

/// What the doorkeeper says of a credential.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Nobody's, or no longer: 401.
    Unknown,
    /// Another account's: 403.
    Stranger,
    /// It belongs to the account.
    Welcome,
}

/// Knows credentials and the page at which people get one.
#[async_trait]
pub trait Doorkeeper: Send + Sync + 'static {
    /// Whether a token or API key opens the doors of `account`.
    async fn admit(&self, credential: &str, account: &str) -> Verdict;
    /// Whether this is a credential of ours, valid or not, rather than one that an app has given out itself: ours never
    /// reach a sandbox.
    fn is_ours(&self, credential: &str) -> bool;
    /// The login page that leads back to the URL; `None` where there is none.
    fn login_url(&self, return_to: &str) -> Option<String>;
}

/// What a visitor shows at the door.
struct Shown {
    /// In `Authorization`, ours by its form.
    ours: Option<String>,
    /// In `Authorization`, an app's own by its form.
    foreign: Option<String>,
    cookies: Vec<String>,
    authorization: bool,
}

impl Edge {
    /// Lets a visitor in, or says why not. Afterwards the head holds no credential of ours. `origin` is the endpoint's
    /// own: scheme, host and port.
    pub(crate) async fn admit(&self, access: &Access, head: &mut request::Parts, origin: &str) -> Result<(), Refusal> {
        let shown = self.take_credentials(&mut head.headers);
        let Access::Members { account } = access else { return Ok(()) };
        if let Some(ours) = &shown.ours {
            return self.judged(self.verdict([ours], account).await, head, origin);
        }
        let by_cookie = self.verdict(&shown.cookies, account).await;
        if by_cookie == Verdict::Welcome {
            return if is_foreign_page(head, origin) { Err(Refusal::ForeignPage) } else { Ok(()) };
        }
        let by_other = self.verdict(&shown.foreign, account).await;
        if by_other == Verdict::Welcome {
            head.headers.remove(AUTHORIZATION);
        }
        if !shown.authorization && shown.cookies.is_empty() {
            return Err(self.without_token(head, origin));
        }
        self.judged(by_cookie.max(by_other), head, origin)
    }

    fn take_credentials(&self, headers: &mut HeaderMap) -> Shown {
        let cookies = cookies::take(headers, TOKEN_COOKIE);
        let values: Vec<HeaderValue> = headers.get_all(AUTHORIZATION).iter().cloned().collect();
        let is_ours = |token: &str| self.doorkeeper.as_ref().is_some_and(|keeper| keeper.is_ours(token));
        let (ours, others): (Vec<_>, Vec<_>) =
            values.into_iter().partition(|value| credential(value).is_some_and(is_ours));
        let shown = Shown {
            authorization: !ours.is_empty() || !others.is_empty(),
            ours: ours.first().and_then(credential).map(str::to_owned),
            foreign: others.first().and_then(bearer).map(str::to_owned),
            cookies: cookies.into_iter().take(MOST_COOKIES).collect(),
        };
        if !ours.is_empty() {
            headers.remove(AUTHORIZATION);
            for value in others {
                headers.append(AUTHORIZATION, value);
            }
        }
        shown
    }

    async fn verdict(&self, credentials: impl IntoIterator<Item = &String>, account: &str) -> Verdict {
        let mut best = Verdict::Unknown;
        let Some(keeper) = &self.doorkeeper else { return best };
        for credential in credentials {
            best = best.max(keeper.admit(credential, account).await);
            if best == Verdict::Welcome {
                break;
            }
        }
        best
    }

    fn judged(&self, verdict: Verdict, head: &request::Parts, origin: &str) -> Result<(), Refusal> {
        match verdict {
            Verdict::Welcome => Ok(()),
            Verdict::Stranger => Err(Refusal::Forbidden),
            Verdict::Unknown => Err(Refusal::Unauthorized { shown: true, login: self.login(head, origin) }),
        }
    }

    fn without_token(&self, head: &request::Parts, origin: &str) -> Refusal {
        let is_browser =
            matches!(head.method, Method::GET | Method::HEAD) && Form::of(&head.headers, Form::Text) == Form::Page;
        match self.login(head, origin) {
            Some(login) if is_browser => Refusal::LoginNeeded(login),
            login => Refusal::Unauthorized { shown: false, login },
        }
    }

    fn login(&self, head: &request::Parts, origin: &str) -> Option<String> {
        let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
        self.doorkeeper.as_ref()?.login_url(&format!("{origin}{path}"))
    }
}

/// What stands after the scheme.
fn credential(value: &HeaderValue) -> Option<&str> {
    let (_, credential) = value.to_str().ok()?.trim_start().split_once(' ')?;
    Some(credential.trim())
}

fn bearer(value: &HeaderValue) -> Option<&str> {
    let (scheme, _) = value.to_str().ok()?.trim_start().split_once(' ')?;
    credential(value).filter(|_| scheme.eq_ignore_ascii_case("bearer"))
}

/// Whether a page of another origin makes the browser send this. All sandboxes are one site to browsers, so `SameSite`
/// does not keep one sandbox's page from using its visitor's cookie at another's door. Following a link is allowed.
fn is_foreign_page(head: &request::Parts, origin: &str) -> bool {
    let header = |name: &str| head.headers.get(name).map(|value| value.to_str().unwrap_or_default());
    if head.headers.get(ORIGIN).is_some_and(|from| !from.as_bytes().eq_ignore_ascii_case(origin.as_bytes())) {
        return true;
    }
    let follows_link = matches!(head.method, Method::GET | Method::HEAD)
        && header("sec-fetch-mode") == Some("navigate")
        && header("sec-fetch-dest") == Some("document");
    let from_elsewhere = header("sec-fetch-site").is_some_and(|site| site != "same-origin" && site != "none");
    from_elsewhere && !follows_link
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn head(method: &str, headers: &[(&str, &str)]) -> request::Parts {
        let mut request = Request::builder().method(method).uri("/");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn the_credential_is_what_stands_after_the_scheme() {
        let of = |text: &'static str| bearer(&HeaderValue::from_static(text)).map(str::to_owned);
        assert_eq!(of("Bearer abc"), Some("abc".into()));
        assert_eq!(of(" bEaReR   abc "), Some("abc".into()));
        assert_eq!(of("Basic abc"), None);
        assert_eq!(of("abc"), None);
        assert_eq!(credential(&HeaderValue::from_static("Token abc")), Some("abc"));
    }

    #[test]
    fn another_origins_page_may_only_be_a_link() {
        let origin = "https://a.example.org";
        let foreign = |method, headers: &[(&str, &str)]| is_foreign_page(&head(method, headers), origin);
        assert!(!foreign("GET", &[]), "programs name no origin");
        assert!(!foreign("POST", &[("origin", "https://a.example.org"), ("sec-fetch-site", "same-origin")]));
        assert!(foreign("POST", &[("origin", "https://b.example.org")]));
        assert!(foreign("GET", &[("origin", "null")]));
        assert!(foreign("GET", &[("origin", "http://a.example.org")]));
        let link = [("sec-fetch-site", "same-site"), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")];
        assert!(!foreign("GET", &link));
        assert!(foreign("POST", &link));
        assert!(foreign("GET", &[link[0], link[1], ("sec-fetch-dest", "iframe")]));
        assert!(foreign("GET", &[link[0], ("sec-fetch-mode", "no-cors"), ("sec-fetch-dest", "image")]));
    }
}
