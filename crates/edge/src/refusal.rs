//! What is answered where no sandbox does: a status, a code, a sentence and a hint, in the form that was asked for.

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Response, StatusCode,
    header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE, LOCATION, RETRY_AFTER, VARY, WWW_AUTHENTICATE},
};

use crate::{ConnectError, body::AnswerBody};

/// Why a request was not answered by a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The request names no host; says what is wrong.
    BadHost(&'static str),
    /// The request is nothing a proxy passes on; says why.
    BadRequest(&'static str),
    /// A private endpoint, a browser, no token: the login page.
    LoginNeeded(String),
    /// A private endpoint and no token, or one that is not valid.
    Unauthorized {
        /// Whether there was one.
        shown: bool,
        /// The login page, for people.
        login: Option<String>,
    },
    /// A private endpoint of another account.
    Forbidden,
    /// A private endpoint, and another site's page that uses its visitor's cookie.
    ForeignPage,
    /// A page in a browser that uses the address for programs.
    PageAtLocalPort,
    /// No way to the sandbox.
    NoConnection(ConnectError),
    /// The sandbox has as many requests as it may.
    Busy,
    /// There are as many connections as there may be.
    Full,
    /// The sandbox took too long.
    TimedOut,
    /// The visitor took too long.
    SlowVisitor,
    /// The sandbox broke the connection off or did not speak HTTP; says how.
    BadAnswer(String),
}

impl From<ConnectError> for Refusal {
    fn from(error: ConnectError) -> Self {
        Self::NoConnection(error)
    }
}

/// The form of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `application/json` is asked for.
    Json,
    /// `text/html` is asked for.
    Page,
    /// Anything goes, as curl says: a line or two.
    Text,
}

impl Form {
    /// What a request's `Accept` asks for; `unasked` where it asks for none of them. JSON goes before a page only where it
    /// is named first.
    pub fn of(headers: &HeaderMap, unasked: Self) -> Self {
        let accepts = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
        for kind in accepts.flat_map(|value| value.split(',')) {
            match kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase().as_str() {
                "application/json" => return Self::Json,
                json if json.ends_with("+json") => return Self::Json,
                "text/html" | "application/xhtml+xml" => return Self::Page,
                _ => {}
            }
        }
        unasked
    }
}

impl Refusal {
    fn told(&self) -> (StatusCode, &'static str, String, &'static str) {
        use ConnectError::*;
        let sentence = |text: &str| text.to_owned();
        match self {
            Self::BadHost(why) => {
                let hint = "the host is the one of the URL; `heyvm list` shows those of sandboxes";
                (StatusCode::BAD_REQUEST, "bad_host", format!("The request has {why}."), hint)
            }
            Self::BadRequest(why) => {
                let hint = "plain HTTP requests and upgrades are passed on";
                (StatusCode::BAD_REQUEST, "bad_request", format!("The request {why}."), hint)
            }
            Self::LoginNeeded(_) => {
                let hint = "log in, and you are led back";
                (StatusCode::SEE_OTHER, "login_needed", sentence("This address is private."), hint)
            }
            Self::Unauthorized { shown, .. } => {
                let hint = "send Authorization: Bearer with a token or an API key of the account that owns the sandbox";
                let text =
                    if *shown { "The credentials are not valid, or have expired." } else { "This address is private." };
                (StatusCode::UNAUTHORIZED, "unauthorized", sentence(text), hint)
            }
            Self::Forbidden => {
                let hint = "log in as a member of the account that owns the sandbox";
                (StatusCode::FORBIDDEN, "forbidden", sentence("This address is another account's."), hint)
            }
            Self::ForeignPage => {
                let hint = "a page of another address may link here; for more it needs Authorization: Bearer";
                let text = "A page of another address asked for this private one.";
                (StatusCode::FORBIDDEN, "foreign_page", sentence(text), hint)
            }
            Self::PageAtLocalPort => {
                let hint = "use the sandbox's URL in browsers; `heyvm get` shows it";
                let text = "This address is for programs: pages of all ports of 127.0.0.1 share their cookies.";
                (StatusCode::FORBIDDEN, "page_at_local_port", sentence(text), hint)
            }
            Self::NoConnection(UnknownSubdomain) => {
                let hint = "`heyvm list` shows every sandbox with its URLs";
                (StatusCode::NOT_FOUND, "unknown_subdomain", sentence("No sandbox has this address."), hint)
            }
            Self::NoConnection(NotRunning(status)) => {
                let hint = "`heyvm get` says why, `heyvm start` starts it again";
                (StatusCode::BAD_GATEWAY, "not_running", format!("The sandbox behind this address is {status}."), hint)
            }
            Self::NoConnection(NothingListens(port)) => {
                let hint = "has the app started, and does it listen on this port? `heyvm logs` shows what it printed";
                let text = format!("Nothing listens on port {port} in the sandbox.");
                (StatusCode::BAD_GATEWAY, "nothing_listens", text, hint)
            }
            Self::NoConnection(Unreachable(why)) => {
                let hint = "`heyvm get` says how the sandbox is; `heyvm restart` starts it afresh";
                (StatusCode::BAD_GATEWAY, "unreachable", format!("The sandbox does not answer: {why}."), hint)
            }
            Self::Busy => {
                let hint = "try again in a moment";
                (StatusCode::SERVICE_UNAVAILABLE, "busy", sentence("The sandbox has too many requests at once."), hint)
            }
            Self::Full => {
                let hint = "try again in a moment";
                (StatusCode::SERVICE_UNAVAILABLE, "too_many_connections", sentence("Too many clients at once."), hint)
            }
            Self::TimedOut => {
                let hint = "`heyvm logs` shows what the app is doing";
                (StatusCode::GATEWAY_TIMEOUT, "timeout", sentence("The app did not answer in time."), hint)
            }
            Self::SlowVisitor => {
                let hint = "send the request again";
                let text = sentence("Nothing more of the request's body came for a long time.");
                (StatusCode::REQUEST_TIMEOUT, "request_timeout", text, hint)
            }
            Self::BadAnswer(how) => {
                let hint = "does the app speak HTTP on this port? `heyvm logs` shows what it printed";
                (StatusCode::BAD_GATEWAY, "bad_answer", format!("The app's answer is not valid: {how}."), hint)
            }
        }
    }

    /// The stable code. What a refusal says may name a URL, which is the visitor's own matter; the code is not.
    pub fn code(&self) -> &'static str {
        self.told().1
    }

    /// The answer.
    pub fn response(&self, form: Form) -> Response<AnswerBody> {
        let (status, code, message, hint) = self.told();
        let (kind, body) = match form {
            Form::Json => {
                let error = serde_json::json!({"code": code, "message": message, "hint": hint});
                let error = serde_json::json!({"error": error, "message": message});
                ("application/json", format!("{error}\n"))
            }
            Form::Page => ("text/html; charset=utf-8", page(status, &message, hint, self.login())),
            Form::Text => ("text/plain; charset=utf-8", format!("{message}\n{hint}\n")),
        };
        let mut response = Response::new(AnswerBody::from(Bytes::from(body)));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert("heyvm-error", HeaderValue::from_static(code));
        match self {
            Self::Busy | Self::Full => {
                headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
            }
            Self::Unauthorized { shown, .. } => {
                // RFC 6750, section 3.
                let challenge =
                    if *shown { "Bearer realm=\"heyvm\", error=\"invalid_token\"" } else { "Bearer realm=\"heyvm\"" };
                headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
            }
            Self::LoginNeeded(login) => {
                headers.insert(VARY, HeaderValue::from_static("Accept, Authorization, Cookie"));
                if let Ok(login) = HeaderValue::from_str(login) {
                    headers.insert(LOCATION, login);
                }
            }
            _ => {}
        }
        response
    }

    fn login(&self) -> Option<&str> {
        match self {
            Self::LoginNeeded(login) | Self::Unauthorized { login: Some(login), .. } => Some(login),
            _ => None,
        }
    }
}

fn page(status: StatusCode, message: &str, hint: &str, login: Option<&str>) -> String {
    let (title, message, hint) = (escape(status.as_str()), escape(message), escape(hint));
    let login = login.map(|login| format!("<p><a href=\"{}\">Log in</a></p>", escape(login))).unwrap_or_default();
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title><style>\
         body{{font:16px/1.5 system-ui,sans-serif;max-width:34em;margin:15vh auto;padding:0 1em;color:#222}}\
         small{{color:#777}}</style></head><body><h1>{title}</h1><p>{message}</p><p>{hint}</p>{login}<small>heyvm</small>\
         </body></html>\n"
    )
}

fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            _ => safe.push(c),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(accept: &str) -> Form {
        Form::of(&[(ACCEPT, accept.parse().unwrap())].into_iter().collect(), Form::Text)
    }

    #[test]
    fn the_form_follows_accept() {
        assert_eq!(form("application/json"), Form::Json);
        assert_eq!(form("application/problem+json, */*"), Form::Json);
        assert_eq!(form("text/html,application/xhtml+xml,application/json;q=0.9"), Form::Page);
        assert_eq!(form("*/*"), Form::Text);
        assert_eq!(Form::of(&HeaderMap::new(), Form::Text), Form::Text);
        assert_eq!(Form::of(&HeaderMap::new(), Form::Json), Form::Json);
    }

    #[test]
    fn a_page_escapes_what_the_guest_wrote() {
        let page = page(StatusCode::BAD_GATEWAY, "<script>alert('x')</script> & \"more\"", "hint", None);
        assert!(page.contains("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &quot;more&quot;"));
        assert!(!page.contains("<script>"));
    }
}
