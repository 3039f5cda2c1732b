//! Pages of our own, on hosts of our own: the login page, say. They share listeners and certificates with sandboxes.

use async_trait::async_trait;
use bytes::Bytes;
use http::{
    HeaderValue, Request, Response, Uri,
    header::{HOST, STRICT_TRANSPORT_SECURITY},
};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;

use crate::{Visitor, body::AnswerBody, refusal::Refusal};

/// Browsers come back by TLS for a year.
const HSTS: HeaderValue = HeaderValue::from_static("max-age=31536000");

/// What a body may fail with.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;
/// The body of a site's answer.
pub type SiteBody = UnsyncBoxBody<Bytes, BodyError>;

/// Answers on hosts of its own.
#[async_trait]
pub trait Site: Send + Sync + 'static {
    /// Whether a host (lower case, without its port) is the site's. It goes before sandboxes.
    fn has(&self, host: &str) -> bool;
    /// Answers a request, whose extensions have a [`Visitor`] and whose `Host` is set, in lower case.
    async fn answer(&self, request: Request<Incoming>) -> Response<SiteBody>;
}

/// The site's answer to a visitor who asked for `authority`.
pub async fn answer(
    site: &dyn Site,
    mut request: Request<Incoming>,
    authority: &str,
    visitor: Visitor,
) -> Result<Response<AnswerBody>, Refusal> {
    check_path(request.uri())?;
    request.extensions_mut().insert(visitor);
    // HTTP/2 has it in the URI.
    if let Ok(host) = HeaderValue::from_str(authority) {
        request.headers_mut().insert(HOST, host);
    }
    let mut response = site.answer(request).await.map(AnswerBody::Site);
    if visitor.secure {
        response.headers_mut().entry(STRICT_TRANSPORT_SECURITY).or_insert(HSTS);
    }
    Ok(response)
}

/// Refuses what no address of ours has: zero bytes, which end a text for some of what stands behind, and segments that
/// lead elsewhere.
fn check_path(uri: &Uri) -> Result<(), Refusal> {
    if uri.path_and_query().is_some_and(|path| path.as_str().contains("%00")) {
        return Err(Refusal::BadRequest("has a zero byte in its path"));
    }
    let leads_elsewhere =
        |segment: &str| matches!(segment.to_ascii_lowercase().replace("%2e", ".").as_str(), "." | "..");
    if uri.path().split('/').any(leads_elsewhere) {
        return Err(Refusal::BadRequest("has a path with `.` or `..` in it"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_our_own_are_plain() {
        let is_taken = |path: &'static str| check_path(&Uri::from_static(path)).is_ok();
        for plain in ["/", "/sandboxes/web.1/files?file_path=../a", "/a/.../b", "/.well-known/jwks.json", "/%2520"] {
            assert!(is_taken(plain), "{plain}");
        }
        for odd in ["/a/../b", "/..", "/a/./b", "/%2e%2E/a", "/.%2e", "/a%00b", "/a?name=%00"] {
            assert!(!is_taken(odd), "{odd}");
        }
    }
}
