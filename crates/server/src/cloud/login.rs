//! The login page: e-mail and password in, a token in a cookie on the base domain out. Works without scripts.
//!
//! | threat | answer |
//! | --- | --- |
//! | another site's page sends the form | a value that both form and cookie carry, and `Origin` |
//! | a link leads from here to elsewhere | back only to the base domain and hosts one label below it |
//! | the page in a frame, a script in it | `frame-ancestors 'none'`, a policy without any script |
//! | a sandbox reads or sets the cookie | `HttpOnly`; the edge takes it out of what comes and goes |

use std::{net::IpAddr, sync::Arc};

use askama::Template;
use async_trait::async_trait;
use axum::{
    Extension, Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, RawQuery, State},
    response::Response,
    routing::get,
};
use heyvm_api::{ApiError, ErrorCode};
use heyvm_edge::{TOKEN_COOKIE, Visitor};
use http::{
    HeaderMap, HeaderName, HeaderValue, StatusCode,
    header::{
        CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, COOKIE, HOST, LOCATION, ORIGIN, REFERRER_POLICY,
        SET_COOKIE, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
    },
};
use subtle::ConstantTimeEq;
use url::{Url, form_urlencoded};

/// Largest form, in bytes.
const FORM: usize = 16 << 10;
/// Where people are led who came from nowhere.
const DEFAULT_PAGE: &str = "/logout";
const COOP: HeaderName = HeaderName::from_static("cross-origin-opener-policy");

/// Knows passwords and tokens.
#[async_trait]
pub trait Accounts: Send + Sync + 'static {
    /// A token for who knows the password.
    async fn log_in(&self, email: &str, password: &str, from: IpAddr) -> Result<Session, ApiError>;
    /// The token's session ends.
    async fn log_out(&self, token: &str) -> Result<(), ApiError>;
}

/// What a login gives.
pub struct Session {
    /// Opens private endpoints.
    pub token: String,
    /// For so many seconds.
    pub expires_in: u64,
}

/// The page.
pub struct LoginPage {
    accounts: Arc<dyn Accounts>,
    base_domain: String,
    url: Url,
}

impl LoginPage {
    /// The page at the public URL `url` (scheme, host and port), for private endpoints below `base_domain`.
    pub fn new(accounts: Arc<dyn Accounts>, base_domain: impl Into<String>, url: Url) -> Arc<Self> {
        Arc::new(Self { accounts, base_domain: base_domain.into(), url })
    }

    /// The URL that leads back to `return_to` after a login.
    pub fn login_url(&self, return_to: &str) -> String {
        let mut url = self.url.clone();
        url.set_path("/login");
        url.query_pairs_mut().append_pair("return_to", return_to);
        url.into()
    }

    /// `/login` and `/logout`. Requests carry a [`Visitor`] as an extension.
    pub fn router(self: &Arc<Self>) -> Router {
        let page = Arc::clone(self);
        Router::new()
            .route("/", get(async || redirect("/login")))
            .route("/login", get(show_login).post(log_in))
            .route("/logout", get(show_logout).post(log_out))
            .route("/login.css", get(style))
            .layer(DefaultBodyLimit::max(FORM))
            .layer(axum::middleware::map_response(move |response| {
                let policy = page.policy();
                async move { guarded(response, policy) }
            }))
            .with_state(Arc::clone(self))
    }

    /// A form's answer may lead back to an endpoint, which browsers hold against `form-action`, too.
    fn policy(&self) -> HeaderValue {
        let (scheme, base) = (self.url.scheme(), &self.base_domain);
        let policy = format!(
            "default-src 'none'; style-src 'self'; form-action 'self' {scheme}://{base}:* {scheme}://*.{base}:*; \
             frame-ancestors 'none'; base-uri 'none'"
        );
        HeaderValue::from_str(&policy).unwrap_or(HeaderValue::from_static("default-src 'none'"))
    }

    /// Where a login leads: the URL asked for if it is one of ours, in the form that a browser will understand it.
    fn destination(&self, return_to: &str) -> Option<String> {
        let url = Url::parse(return_to).ok()?;
        let host = url.host_str()?;
        let label = host.strip_suffix(self.base_domain.as_str())?;
        let label = if label.is_empty() { Some("") } else { label.strip_suffix('.').filter(|label| !label.is_empty()) };
        let ours = label.is_some_and(|label| !label.contains('.'));
        let plain = url.username().is_empty() && url.password().is_none();
        (ours && plain && matches!(url.scheme(), "http" | "https")).then(|| url.into())
    }

    fn token_cookie(&self, token: &str, seconds: u64, visitor: Visitor) -> String {
        let secure = if visitor.secure { "; Secure" } else { "" };
        let domain = &self.base_domain;
        format!("{TOKEN_COOKIE}={token}; Domain={domain}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Lax{secure}")
    }
}

#[derive(Template)]
#[template(path = "login.html")]
struct LoginForm<'a> {
    csrf: &'a str,
    return_to: &'a str,
    email: &'a str,
    error: Option<&'a str>,
}

#[derive(Template)]
#[template(path = "logout.html")]
struct LogoutForm<'a> {
    csrf: &'a str,
    logged_in: bool,
}

/// What a form holds. No `Debug`: it has a password.
#[derive(Default)]
struct Form {
    csrf: String,
    email: String,
    password: String,
    return_to: String,
}

impl Form {
    fn of(body: &[u8]) -> Self {
        let mut form = Self::default();
        for (name, value) in form_urlencoded::parse(body) {
            match name.as_ref() {
                "csrf" => form.csrf = value.into(),
                "email" => form.email = value.into(),
                "password" => form.password = value.into(),
                "return_to" => form.return_to = value.into(),
                _ => {}
            }
        }
        form
    }
}

async fn show_login(Extension(visitor): Extension<Visitor>, headers: HeaderMap, RawQuery(query): RawQuery) -> Response {
    let form = Form::of(query.unwrap_or_default().as_bytes());
    let csrf = Csrf::of(&headers, visitor);
    let page = LoginForm { csrf: &csrf.value, return_to: &form.return_to, email: "", error: None };
    csrf.set_in(html(StatusCode::OK, &page))
}

async fn log_in(
    State(page): State<Arc<LoginPage>>,
    Extension(visitor): Extension<Visitor>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let form = Form::of(&body);
    let csrf = Csrf::of(&headers, visitor);
    let logged_in = match csrf.check(&headers, &form.csrf) {
        Ok(()) => page.accounts.log_in(form.email.trim(), &form.password, visitor.address).await,
        Err(error) => Err(error),
    };
    match logged_in {
        Ok(session) => {
            let back = page.destination(&form.return_to);
            let response = redirect(back.as_deref().unwrap_or(DEFAULT_PAGE));
            with_cookie(response, &page.token_cookie(&session.token, session.expires_in, visitor))
        }
        Err(error) => {
            let (status, text) = told(&error);
            let page = LoginForm {
                csrf: &csrf.value,
                return_to: &form.return_to,
                email: form.email.trim(),
                error: Some(&text),
            };
            csrf.set_in(html(status, &page))
        }
    }
}

async fn show_logout(Extension(visitor): Extension<Visitor>, headers: HeaderMap) -> Response {
    let csrf = Csrf::of(&headers, visitor);
    let logged_in = cookies(&headers, TOKEN_COOKIE).next().is_some();
    csrf.set_in(html(StatusCode::OK, &LogoutForm { csrf: &csrf.value, logged_in }))
}

async fn log_out(
    State(page): State<Arc<LoginPage>>,
    Extension(visitor): Extension<Visitor>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let csrf = Csrf::of(&headers, visitor);
    if csrf.check(&headers, &Form::of(&body).csrf).is_err() {
        let page = LogoutForm { csrf: &csrf.value, logged_in: true };
        return csrf.set_in(html(StatusCode::FORBIDDEN, &page));
    }
    for token in cookies(&headers, TOKEN_COOKIE) {
        // One that has expired needs no end.
        if let Err(error) = page.accounts.log_out(token).await {
            tracing::debug!(code = error.code.as_str(), "a session did not end");
        }
    }
    with_cookie(redirect("/login"), &page.token_cookie("", 0, visitor))
}

async fn style() -> Response {
    let mut response = Response::new(Body::from(include_str!("../../templates/login.css")));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/css; charset=utf-8"));
    response
}

/// The value that form and cookie carry alike.
struct Csrf {
    value: String,
    name: &'static str,
    secure: bool,
}

impl Csrf {
    /// The visitor's, or a new one.
    fn of(headers: &HeaderMap, visitor: Visitor) -> Self {
        // Browsers take a name with this prefix only from the very host, by TLS: no sandbox can set it.
        let name = if visitor.secure { "__Host-heyo_csrf" } else { "heyo_csrf" };
        let own = |value: &&str| value.len() == 32 && value.bytes().all(|byte| byte.is_ascii_hexdigit());
        let value = cookies(headers, name).find(own).map(str::to_owned);
        let value = value.unwrap_or_else(|| format!("{:032x}", rand::random::<u128>()));
        Self { value, name, secure: visitor.secure }
    }

    fn check(&self, headers: &HeaderMap, sent: &str) -> Result<(), ApiError> {
        let same_value: bool = self.value.as_bytes().ct_eq(sent.as_bytes()).into();
        if same_value && is_own_page(headers, self.secure) {
            return Ok(());
        }
        Err(ApiError::new(ErrorCode::Forbidden, "The form was not sent from this page, or was too old. Send it again."))
    }

    fn set_in(&self, response: Response) -> Response {
        let secure = if self.secure { "; Secure" } else { "" };
        with_cookie(response, &format!("{}={}; Path=/; HttpOnly; SameSite=Strict{secure}", self.name, self.value))
    }
}

/// Browsers say from which page a form comes.
fn is_own_page(headers: &HeaderMap, secure: bool) -> bool {
    let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or("null"));
    if text("sec-fetch-site").is_some_and(|site| site != "same-origin") {
        return false;
    }
    let scheme = if secure { "https" } else { "http" };
    let own = format!("{scheme}://{}", text(HOST.as_str()).unwrap_or_default());
    text(ORIGIN.as_str()).is_none_or(|origin| origin.eq_ignore_ascii_case(&own))
}

fn cookies<'a>(headers: &'a HeaderMap, name: &str) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok());
    let pairs = values.flat_map(|value| value.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.filter(move |(own, _)| *own == name).map(|(_, value)| value)
}

/// What people are told: accounts' own errors are theirs to read, others are not.
fn told(error: &ApiError) -> (StatusCode, String) {
    let status = StatusCode::from_u16(error.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    if status.is_server_error() {
        tracing::warn!(code = error.code.as_str(), message = error.message, "a login failed");
        return (status, "Logging in does not work at the moment. Try again later.".into());
    }
    let hint = error.hint.as_deref().map(|hint| format!(" ({hint})")).unwrap_or_default();
    (status, format!("{}{hint}", error.message))
}

fn html(status: StatusCode, page: &impl Template) -> Response {
    // A template that compiles fails on a broken writer alone, and a string is none.
    let mut response = Response::new(Body::from(page.render().unwrap_or_default()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    response
}

fn redirect(to: &str) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SEE_OTHER;
    let to = HeaderValue::from_str(to).unwrap_or(HeaderValue::from_static(DEFAULT_PAGE));
    response.headers_mut().insert(LOCATION, to);
    response
}

fn with_cookie(mut response: Response, cookie: &str) -> Response {
    match HeaderValue::from_str(cookie) {
        Ok(cookie) => {
            response.headers_mut().append(SET_COOKIE, cookie);
        }
        Err(_) => tracing::error!("a token that fits into no header was not set as a cookie"),
    }
    response
}

fn guarded(mut response: Response, policy: HeaderValue) -> Response {
    let headers = response.headers_mut();
    headers.insert(CONTENT_SECURITY_POLICY, policy);
    for (name, value) in [
        (CACHE_CONTROL, "no-store"),
        // With no-referrer, browsers send `Origin: null` along with our own forms.
        (REFERRER_POLICY, "same-origin"),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (X_FRAME_OPTIONS, "DENY"),
        (COOP, "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nobody;

    #[async_trait]
    impl Accounts for Nobody {
        async fn log_in(&self, _: &str, _: &str, _: IpAddr) -> Result<Session, ApiError> {
            Err(ApiError::new(ErrorCode::Unauthorized, "nobody"))
        }

        async fn log_out(&self, _: &str) -> Result<(), ApiError> {
            Ok(())
        }
    }

    #[test]
    fn a_login_leads_back_to_our_own_hosts_alone() {
        let page =
            LoginPage::new(Arc::new(Nobody), "apps.example.org", "https://login.apps.example.org".parse().unwrap());
        for ours in
            ["https://apps.example.org/", "https://a.apps.example.org/x?y=z#w", "http://a.apps.example.org:8480/"]
        {
            assert_eq!(page.destination(ours).as_deref(), Some(ours));
        }
        assert_eq!(page.destination("HTTPS://A.APPS.example.org").as_deref(), Some("https://a.apps.example.org/"));
        for other in [
            "",
            "/x",
            "//evil.org",
            "https://evil.org/",
            "https://evil.org/apps.example.org",
            "https://evilapps.example.org/",
            "https://apps.example.org.evil.org/",
            "https://a.b.apps.example.org/",
            "https://.apps.example.org/",
            "https://apps.example.org@evil.org/",
            "https://user@a.apps.example.org/",
            "https://evil.org\\.apps.example.org/",
            "https:evil.org",
            "https:///evil.org/",
            "\thttps://evil.org/",
            "javascript://a.apps.example.org/%0aalert(1)",
            "data:text/html,x",
            "ftp://a.apps.example.org/",
        ] {
            assert_eq!(page.destination(other), None, "{other}");
        }
        let url = page.login_url("https://a.apps.example.org/?a=b&c=d");
        assert_eq!(
            url,
            "https://login.apps.example.org/login?return_to=https%3A%2F%2Fa.apps.example.org%2F%3Fa%3Db%26c%3Dd"
        );
    }

    #[test]
    fn a_form_comes_from_our_own_page_or_from_none() {
        let own = |pairs: &[(&'static str, &str)]| {
            let mut headers: HeaderMap = [(HOST, HeaderValue::from_static("login.example.org"))].into_iter().collect();
            for (name, value) in pairs {
                headers.insert(*name, value.parse().unwrap());
            }
            is_own_page(&headers, true)
        };
        assert!(own(&[]));
        assert!(own(&[("origin", "https://login.example.org"), ("sec-fetch-site", "same-origin")]));
        for foreign in ["https://a.example.org", "http://login.example.org", "https://login.example.org:444", "null"] {
            assert!(!own(&[("origin", foreign)]), "{foreign}");
        }
        assert!(!own(&[("sec-fetch-site", "same-site")]));
    }
}
