//! What of a message's head goes on: hop-by-hop headers stay behind, the visitor's address is added.

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{CONNECTION, CONTENT_TYPE, COOKIE, EXPECT, FORWARDED, HOST, SET_COOKIE, TE, TRANSFER_ENCODING, UPGRADE},
    request,
};

use crate::{Visitor, cookies, host};

const HOP_BY_HOP: [&str; 10] = [
    "connection",
    "http2-settings",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "transfer-encoding",
    "upgrade",
    "x-real-ip",
];

/// Whether a body's framing is one that is passed on: `chunked`, once, and nothing else. Another coding would get lost,
/// since each connection has its own framing.
pub fn is_framing_known(headers: &HeaderMap) -> bool {
    let mut values = headers.get_all(TRANSFER_ENCODING).iter();
    values.next().is_none_or(|value| value.as_bytes().eq_ignore_ascii_case(b"chunked")) && values.next().is_none()
}

/// The protocol a request wants to change to; `h2c` is not offered.
pub fn upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let named = tokens(headers, &CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade"));
    let value = headers.get(UPGRADE).filter(|_| named)?;
    let clear_text_http2 = value.to_str().is_ok_and(|text| text.to_ascii_lowercase().contains("h2c"));
    (!clear_text_http2).then(|| value.clone())
}

/// Whether the request is a gRPC call, which needs HTTP/2 all the way.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).is_some_and(|value| {
        value.strip_prefix("application/grpc").is_some_and(|rest| rest.is_empty() || rest.starts_with(['+', ';']))
    })
}

/// Makes a visitor's headers those that the sandbox gets; `authority` is the host and port the visitor asked for.
pub fn to_sandbox(head: &mut request::Parts, visitor: Visitor, authority: &str, upgrade: Option<HeaderValue>) {
    let wants_trailers = tokens(&head.headers, &TE).any(|token| token.eq_ignore_ascii_case("trailers"));
    strip(&mut head.headers);
    join_cookies(&mut head.headers);
    if wants_trailers {
        head.headers.insert(TE, HeaderValue::from_static("trailers"));
        head.headers.insert(CONNECTION, HeaderValue::from_static("TE"));
    }
    if let Some(protocol) = upgrade {
        head.headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        head.headers.insert(UPGRADE, protocol);
    }
    tell_of(&mut head.headers, visitor, authority);
    if let Ok(host) = HeaderValue::from_str(authority) {
        head.headers.insert(HOST, host);
    }
}

/// Makes a sandbox's headers those that the visitor gets; `authority` is the sandbox's host as the visitor knows it.
pub fn to_visitor(headers: &mut HeaderMap, authority: &str, upgraded: bool) {
    cookies::confine(headers, host::name(authority));
    let protocol = headers.get(UPGRADE).filter(|_| upgraded).cloned();
    strip(headers);
    if let Some(protocol) = protocol {
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, protocol);
    }
}

/// Whether the client waits for "100 Continue" before it sends its body. The edge says it when the app has.
pub fn expects_continue(headers: &HeaderMap) -> bool {
    headers.get(EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// The head of "103 Early Hints" as a client by HTTP/1.1 gets it.
pub fn early_hints(headers: &HeaderMap) -> Vec<u8> {
    let mut headers = headers.clone();
    strip(&mut headers);
    headers.remove(SET_COOKIE);
    let mut head = b"HTTP/1.1 103 Early Hints\r\n".to_vec();
    for (name, value) in &headers {
        head.extend([name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"].concat());
    }
    head.extend(b"\r\n");
    head
}

/// HTTP/2 knows no connection headers, but keeps `te: trailers`.
pub fn for_http2(headers: &mut HeaderMap) {
    headers.remove(CONNECTION);
    headers.remove(HOST);
}

fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> =
        tokens(headers, &CONNECTION).filter_map(|token| HeaderName::from_bytes(token.as_bytes()).ok()).collect();
    for name in named {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
}

fn tell_of(headers: &mut HeaderMap, visitor: Visitor, host: &str) {
    let claimed: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with("x-forwarded-")).cloned().collect();
    for name in claimed {
        headers.remove(name);
    }
    let (address, scheme) = (visitor.address.to_canonical(), visitor.scheme());
    let node = if address.is_ipv6() { format!("\"[{address}]\"") } else { address.to_string() };
    let port = host::port(host).unwrap_or(visitor.default_port());
    let told = [
        (HeaderName::from_static("x-forwarded-for"), address.to_string()),
        (HeaderName::from_static("x-forwarded-proto"), scheme.to_owned()),
        (HeaderName::from_static("x-forwarded-host"), host.to_owned()),
        (HeaderName::from_static("x-forwarded-port"), port.to_string()),
        (FORWARDED, format!("for={node};host=\"{host}\";proto={scheme}")),
    ];
    for (name, value) in told {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(name, value);
        }
    }
}

/// HTTP/2 may send cookies one by one; HTTP/1.1 wants one header.
fn join_cookies(headers: &mut HeaderMap) {
    let all: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if all.len() < 2 {
        return;
    }
    if let Ok(joined) = HeaderValue::from_bytes(&all.join(&b"; "[..])) {
        headers.insert(COOKIE, joined);
    }
}

fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|token| !token.is_empty())
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn sent(headers: &[(&str, &str)], upgrade: Option<HeaderValue>) -> HeaderMap {
        let mut request = Request::get("/");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let (mut head, ()) = request.body(()).unwrap().into_parts();
        let visitor = Visitor { address: "::ffff:127.0.0.1".parse().unwrap(), secure: false };
        to_sandbox(&mut head, visitor, "abc.localhost:8480", upgrade);
        head.headers
    }

    #[test]
    fn hop_by_hop_headers_stay_behind_and_claims_are_replaced() {
        let headers = sent(
            &[
                ("connection", "x-secret, keep-alive"),
                ("x-secret", "1"),
                ("te", "gzip"),
                ("transfer-encoding", "chunked"),
                ("x-forwarded-for", "6.6.6.6"),
                ("x-forwarded-port", "1"),
                ("forwarded", "for=6.6.6.6"),
                ("x-real-ip", "6.6.6.6"),
                ("expect", "100-continue"),
                ("x-mine", "yes"),
            ],
            None,
        );
        let mut names: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(
            names,
            [
                "expect",
                "forwarded",
                "host",
                "x-forwarded-for",
                "x-forwarded-host",
                "x-forwarded-port",
                "x-forwarded-proto",
                "x-mine"
            ]
        );
        assert_eq!(headers["x-forwarded-port"], "8480");
        assert_eq!(headers["x-forwarded-for"], "127.0.0.1");
        assert_eq!(headers["forwarded"], "for=127.0.0.1;host=\"abc.localhost:8480\";proto=http");
    }

    #[test]
    fn trailers_upgrades_and_cookies() {
        let headers = sent(&[("te", "trailers, deflate"), ("cookie", "a=1"), ("cookie", "b=2")], None);
        assert_eq!((&headers["te"], &headers["cookie"]), (&"trailers".parse().unwrap(), &"a=1; b=2".parse().unwrap()));
        let asked = |connection: &str, protocol: &str| {
            let headers = [("connection", connection), ("upgrade", protocol)];
            let map = headers.iter().map(|(n, v)| (n.parse().unwrap(), v.parse().unwrap())).collect();
            upgrade(&map)
        };
        assert_eq!(asked("keep-alive, Upgrade", "websocket"), Some(HeaderValue::from_static("websocket")));
        assert_eq!(asked("keep-alive", "websocket"), None);
        assert_eq!(asked("upgrade, http2-settings", "h2c"), None);
    }
}
