//! Cookies at the boundary between sandboxes: ours never goes in, none of theirs goes beyond its own host.
//!
//! To a browser all sandboxes are one site. A cookie that one of them sets for the base domain would be sent to all
//! others ("cookie tossing"), so a `Domain` above the sandbox's own host is taken out: the cookie stays, for its own host.

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{COOKIE, SET_COOKIE},
};

use crate::door::TOKEN_COOKIE;

const CLEAR_SITE_DATA: HeaderName = HeaderName::from_static("clear-site-data");

/// Takes all cookies of a name out of a request; the others stay as they are, byte for byte.
pub fn take(headers: &mut HeaderMap, name: &str) -> Vec<String> {
    let mut taken = Vec::new();
    let values: Vec<HeaderValue> = headers.get_all(COOKIE).iter().cloned().collect();
    let others: Vec<HeaderValue> = values.iter().filter_map(|value| without(value, name, &mut taken)).collect();
    if !taken.is_empty() {
        headers.remove(COOKIE);
        for value in others {
            headers.append(COOKIE, value);
        }
    }
    taken
}

fn without(value: &HeaderValue, name: &str, taken: &mut Vec<String>) -> Option<HeaderValue> {
    let is_it = |pair: &&[u8]| pair_of(pair).0 == name.as_bytes();
    let (ours, others): (Vec<&[u8]>, Vec<&[u8]>) = value.as_bytes().split(|byte| *byte == b';').partition(is_it);
    if ours.is_empty() {
        return Some(value.clone());
    }
    taken.extend(ours.iter().map(|pair| String::from_utf8_lossy(pair_of(pair).1).into_owned()));
    let rest = others.join(&b';');
    let rest = rest.trim_ascii_start();
    HeaderValue::from_bytes(rest).ok().filter(|rest| !rest.is_empty())
}

fn pair_of(pair: &[u8]) -> (&[u8], &[u8]) {
    match pair.iter().position(|byte| *byte == b'=') {
        Some(at) => (pair[..at].trim_ascii(), pair[at + 1..].trim_ascii()),
        // As browsers do: a cookie without a name.
        None => (b"", pair.trim_ascii()),
    }
}

/// Keeps what a sandbox's answer does to cookies within its own host.
pub fn confine(headers: &mut HeaderMap, host: &str) {
    let values: Vec<HeaderValue> = headers.get_all(SET_COOKIE).iter().cloned().collect();
    if values.iter().any(|value| confined(value, host).as_ref() != Some(value)) {
        headers.remove(SET_COOKIE);
        for value in values.iter().filter_map(|value| confined(value, host)) {
            headers.append(SET_COOKIE, value);
        }
    }
    // Browsers forget the cookies of the whole site, the visitor's token among them.
    let clears_cookies = |value: &HeaderValue| {
        let text = value.as_bytes().to_ascii_lowercase();
        text.contains(&b'*') || text.windows(7).any(|word| word == b"cookies")
    };
    if headers.get_all(CLEAR_SITE_DATA).iter().any(clears_cookies) {
        headers.remove(CLEAR_SITE_DATA);
    }
}

fn confined(value: &HeaderValue, host: &str) -> Option<HeaderValue> {
    let mut parts = value.as_bytes().split(|byte| *byte == b';');
    let pair = parts.next().unwrap_or_default();
    let (name, content) = pair_of(pair);
    // A cookie without a name is sent back as its value alone, which may look like ours.
    if name == TOKEN_COOKIE.as_bytes() || (name.is_empty() && content.starts_with(TOKEN_COOKIE.as_bytes())) {
        return None;
    }
    let (wide, mut kept): (Vec<&[u8]>, Vec<&[u8]>) = parts.partition(|attribute| is_wider(attribute, host));
    if wide.is_empty() {
        return Some(value.clone());
    }
    kept.insert(0, pair);
    HeaderValue::from_bytes(&kept.join(&b';')).ok()
}

fn is_wider(attribute: &[u8], host: &str) -> bool {
    let (name, domain) = pair_of(attribute);
    if !name.eq_ignore_ascii_case(b"domain") {
        return false;
    }
    let domain = domain.strip_prefix(b".").unwrap_or(domain).to_ascii_lowercase();
    let domain = domain.strip_suffix(b".").unwrap_or(&domain);
    let above = host.as_bytes().strip_suffix(domain).is_some_and(|label| label.ends_with(b"."));
    above && !domain.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(cookies: &[&'static str]) -> (Vec<String>, Vec<String>) {
        let mut headers = HeaderMap::new();
        for value in cookies {
            headers.append(COOKIE, HeaderValue::from_static(value));
        }
        let taken = take(&mut headers, TOKEN_COOKIE);
        (taken, headers.get_all(COOKIE).iter().map(|value| value.to_str().unwrap().to_owned()).collect())
    }

    #[test]
    fn ours_is_taken_and_the_others_stay_as_they_are() {
        let cases: [(&[&str], &[&str], &[&str]); 8] = [
            (&["a=1; __heyo_token=t; b=\"x y\""], &["t"], &["a=1; b=\"x y\""]),
            (&["__heyo_token=t; a=1"], &["t"], &["a=1"]),
            (&["a=1;__heyo_token=t"], &["t"], &["a=1"]),
            (&["__heyo_token=t"], &["t"], &[]),
            (&["a=1", "__heyo_token=t", "c=3"], &["t"], &["a=1", "c=3"]),
            (&["__heyo_token=t; x=1; __heyo_token = u"], &["t", "u"], &["x=1"]),
            (&["a=1;  b=2 ;c"], &[], &["a=1;  b=2 ;c"]),
            (&["x__heyo_token=t; __heyo_token2=u"], &[], &["x__heyo_token=t; __heyo_token2=u"]),
        ];
        for (cookies, ours, others) in cases {
            let (taken, kept) = taken(cookies);
            assert_eq!(
                (taken, kept),
                (ours.iter().map(ToString::to_string).collect(), others.iter().map(ToString::to_string).collect()),
                "{cookies:?}"
            );
        }
    }

    fn set(value: &'static str) -> Option<String> {
        let mut headers: HeaderMap = [(SET_COOKIE, HeaderValue::from_static(value))].into_iter().collect();
        confine(&mut headers, "app.apps.example.org");
        headers.get(SET_COOKIE).map(|value| value.to_str().unwrap().to_owned())
    }

    #[test]
    fn a_sandbox_sets_cookies_for_its_own_host_alone() {
        for own in ["a=1", "a=1; Path=/; Domain=app.apps.example.org; Secure", "a=1; domain=else.org", "a=1; Domain="] {
            assert_eq!(set(own).as_deref(), Some(own));
        }
        for wide in ["apps.example.org", ".apps.example.org", "example.org", "ORG", "Apps.Example.Org."] {
            let value: &'static str = format!("a=1; Path=/; Domain={wide}; Secure").leak();
            assert_eq!(set(value).as_deref(), Some("a=1; Path=/; Secure"), "{wide}");
        }
        assert_eq!(set("a=1; domain = example.org;DOMAIN=example.org").as_deref(), Some("a=1"));
        for ours in [
            "__heyo_token=t; Domain=apps.example.org",
            "__heyo_token=; Max-Age=0",
            " __heyo_token =t",
            "=__heyo_token=t",
            "__heyo_token",
        ] {
            assert_eq!(set(ours), None, "{ours}");
        }
    }

    #[test]
    fn a_sandbox_does_not_log_its_visitors_out() {
        for (value, stays) in
            [("\"cookies\"", false), ("\"*\"", false), ("\"cache\", \"Cookies\"", false), ("\"cache\"", true)]
        {
            let mut headers: HeaderMap = [(CLEAR_SITE_DATA, HeaderValue::from_static(value))].into_iter().collect();
            confine(&mut headers, "app.example.org");
            assert_eq!(headers.contains_key(CLEAR_SITE_DATA), stays, "{value}");
        }
    }
}
