//! Who asks: the other end of the connection, or whom a proxy in front of us names, if we trust it.

use std::net::IpAddr;

use http::HeaderMap;
use ipnet::IpNet;

/// Who asks, and how. Requests that a [`Site`](crate::Site) gets carry it as an extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visitor {
    /// Where the visitor is.
    pub address: IpAddr,
    /// Whether the visitor came by TLS.
    pub secure: bool,
}

impl Visitor {
    /// The visitor behind trusted proxies, each of which has added to `X-Forwarded-For` whom it serves; the last hop
    /// that is none of them is the visitor. What others claim is not looked at.
    pub(crate) fn behind(self, trusted: &[IpNet], headers: &HeaderMap) -> Self {
        let is_trusted = |address: &IpAddr| trusted.iter().any(|range| range.contains(address));
        let mut address = self.address.to_canonical();
        if !is_trusted(&address) {
            return Self { address, ..self };
        }
        for hop in last_first(headers, "x-forwarded-for") {
            // "unknown", or nonsense: the proxy itself is the last whom we know.
            let Some(hop) = address_of(hop) else { break };
            address = hop;
            if !is_trusted(&address) {
                break;
            }
        }
        let scheme = last_first(headers, "x-forwarded-proto").next();
        let secure = scheme.map_or(self.secure, |scheme| scheme.eq_ignore_ascii_case("https"));
        Self { address, secure }
    }

    /// `http` or `https`.
    pub fn scheme(self) -> &'static str {
        if self.secure { "https" } else { "http" }
    }

    /// The port that a URL without one means.
    pub(crate) fn default_port(self) -> u16 {
        if self.secure { 443 } else { 80 }
    }
}

fn last_first<'a>(headers: &'a HeaderMap, name: &str) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(name).iter().rev().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.rsplit(',')).map(str::trim)
}

fn address_of(hop: &str) -> Option<IpAddr> {
    let bare = hop.trim_start_matches('[').trim_end_matches(']');
    let address = bare.parse().ok().or_else(|| hop.parse::<std::net::SocketAddr>().ok().map(|address| address.ip()));
    address.map(|address: IpAddr| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(peer: &str, forwarded: &[&'static str], scheme: Option<&'static str>) -> (String, bool) {
        let mut headers = HeaderMap::new();
        for value in forwarded {
            headers.append("x-forwarded-for", value.parse().unwrap());
        }
        if let Some(scheme) = scheme {
            headers.insert("x-forwarded-proto", scheme.parse().unwrap());
        }
        let trusted = ["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()];
        let visitor = Visitor { address: peer.parse().unwrap(), secure: false }.behind(&trusted, &headers);
        (visitor.address.to_string(), visitor.secure)
    }

    #[test]
    fn only_trusted_proxies_are_believed_and_of_what_they_say_only_what_they_know() {
        assert_eq!(seen("1.2.3.4", &["6.6.6.6"], Some("https")), ("1.2.3.4".into(), false));
        assert_eq!(seen("10.0.0.1", &[], None), ("10.0.0.1".into(), false));
        assert_eq!(seen("::ffff:10.0.0.1", &["6.6.6.6, 1.2.3.4"], Some("https")), ("1.2.3.4".into(), true));
        assert_eq!(seen("10.0.0.1", &["6.6.6.6, 1.2.3.4", "10.0.0.2"], None), ("1.2.3.4".into(), false));
        assert_eq!(seen("10.0.0.1", &["6.6.6.6, unknown"], None), ("10.0.0.1".into(), false));
        assert_eq!(seen("fd00::1", &["[2001:db8::1]:4711"], Some("http, https")), ("2001:db8::1".into(), true));
    }
}
