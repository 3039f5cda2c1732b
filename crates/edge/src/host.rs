//! Which subdomain a request means.

use http::{HeaderMap, Request, header::HOST, uri::Authority};

use crate::refusal::Refusal;

/// The host (and port) a request is for, in lower case: the `:authority` or absolute URI where there is one, else the
/// `Host` header. Where there are both they are the same: a proxy that goes by the other one means another host.
pub fn authority<B>(request: &Request<B>) -> Result<String, Refusal> {
    let header = host_header(request.headers())?;
    let text = match (request.uri().authority(), header) {
        (Some(authority), Some(header)) if !header.eq_ignore_ascii_case(authority.as_str()) => {
            return Err(Refusal::BadHost("two different hosts"));
        }
        (Some(authority), _) => authority.as_str(),
        (None, Some(header)) => header,
        (None, None) => return Err(Refusal::BadHost("no Host header")),
    };
    checked(text)
}

/// The host without its port and without the dot that may end it.
pub fn name(authority: &str) -> &str {
    let host = if authority.starts_with('[') { authority } else { authority.split(':').next().unwrap_or_default() };
    host.strip_suffix('.').unwrap_or(host)
}

/// The port, where one is named.
pub fn port(authority: &str) -> Option<u16> {
    authority.rsplit_once(':').and_then(|(_, port)| port.parse().ok())
}

/// The label below the base domain; `None` when the host is not exactly one label below it.
pub fn subdomain<'a>(authority: &'a str, base_domain: &str) -> Option<&'a str> {
    let label = name(authority).strip_suffix(base_domain)?.strip_suffix('.')?;
    (!label.is_empty() && !label.contains('.')).then_some(label)
}

fn host_header(headers: &HeaderMap) -> Result<Option<&str>, Refusal> {
    let mut values = headers.get_all(HOST).iter();
    let Some(first) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Refusal::BadHost("more than one Host header"));
    }
    first.to_str().map(Some).map_err(|_| Refusal::BadHost("a Host header that is no text"))
}

fn checked(text: &str) -> Result<String, Refusal> {
    let bad = Refusal::BadHost("a host that is no host name");
    let Ok(authority) = text.parse::<Authority>() else { return Err(bad) };
    let port = text.strip_prefix(authority.host()).map(|rest| rest.strip_prefix(':').unwrap_or(rest));
    let port_is_one = port.is_some_and(|port| port.is_empty() || port.parse::<u16>().is_ok());
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c) || "[:]".contains(c);
    if authority.host().is_empty() || !port_is_one || !text.chars().all(allowed) {
        return Err(bad);
    }
    Ok(text.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(uri: &str, hosts: &[&str]) -> Result<String, Refusal> {
        let mut request = Request::get(uri);
        for host in hosts {
            request = request.header(HOST, *host);
        }
        authority(&request.body(()).unwrap())
    }

    #[test]
    fn the_host_is_taken_from_where_it_stands() {
        assert_eq!(of("/", &["ABC.localhost:8480"]).unwrap(), "abc.localhost:8480");
        assert_eq!(of("http://abc.localhost/x", &["Abc.localhost"]).unwrap(), "abc.localhost");
        assert_eq!(of("http://abc.localhost/x", &[]).unwrap(), "abc.localhost");
        assert!(of("http://abc.localhost/x", &["other.localhost"]).is_err());
        assert_eq!(of("/", &["[::1]:80"]).unwrap(), "[::1]:80");
        for bad in ["", "a b", "user@abc.localhost", "abc.localhost:x", "abc.localhost:70000", "a\"b.localhost", "a/b"]
        {
            assert!(of("/", &[bad]).is_err(), "{bad}");
        }
        assert!(of("/", &[]).is_err());
        assert!(of("/", &["a.localhost", "a.localhost"]).is_err());
    }

    #[test]
    fn one_label_below_the_base_domain() {
        assert_eq!(subdomain("abc.localhost:8480", "localhost"), Some("abc"));
        assert_eq!(subdomain("abc.localhost.", "localhost"), Some("abc"));
        assert_eq!(subdomain("abc.apps.example.org", "apps.example.org"), Some("abc"));
        for other in
            ["localhost", "a.b.localhost", "abclocalhost", "abc.example.org", "127.0.0.1:80", "[::1]", ".localhost"]
        {
            assert_eq!(subdomain(other, "localhost"), None, "{other}");
        }
    }
}
