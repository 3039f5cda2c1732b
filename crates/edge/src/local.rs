//! A listener on loopback that leads to one port of one sandbox: for programs that cannot resolve `*.localhost`.
//!
//! Its address is easy to guess, and browsers send the cookies of one port of 127.0.0.1 to all others. So it answers to
//! its own address alone (a page of another name that resolves to loopback gets nothing), and leads browsers to the URL
//! with the subdomain, where pages of different sandboxes are different sites.

use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode,
    header::{CACHE_CONTROL, LOCATION},
};

use crate::{body::AnswerBody, host, refusal::Refusal};

/// Where a listener on loopback leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalPort {
    /// The endpoint's subdomain.
    pub subdomain: String,
    /// The endpoint's URL with the subdomain, without a path.
    pub url: String,
    /// The port that is listened on.
    pub port: u16,
}

impl LocalPort {
    /// An answer that takes the place of the sandbox's, if the request is none for it.
    pub(crate) fn instead<B>(
        &self,
        request: &Request<B>,
        authority: &str,
    ) -> Result<Option<Response<AnswerBody>>, Refusal> {
        if !["127.0.0.1", "localhost"].contains(&host::name(authority)) || host::port(authority) != Some(self.port) {
            return Err(Refusal::BadHost("another host than the address that it came to"));
        }
        match sent_by(request.headers()) {
            Sender::Program => Ok(None),
            Sender::Person if request.method() == Method::GET => {
                let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
                let mut response = Response::new(AnswerBody::from(bytes::Bytes::new()));
                *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
                if let Ok(url) = HeaderValue::from_str(&format!("{}{path}", self.url)) {
                    response.headers_mut().insert(LOCATION, url);
                }
                response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
                Ok(Some(response))
            }
            Sender::Person | Sender::Page => Err(Refusal::PageAtLocalPort),
        }
    }
}

enum Sender {
    /// No browser.
    Program,
    /// A browser whose person opens a page.
    Person,
    /// A browser, for a page that it shows.
    Page,
}

/// Every browser of these years says where a request comes from.
fn sent_by(headers: &HeaderMap) -> Sender {
    match (headers.get("sec-fetch-site"), headers.get("sec-fetch-mode")) {
        (None, _) => Sender::Program,
        (Some(_), Some(mode)) if mode == "navigate" => Sender::Person,
        _ => Sender::Page,
    }
}
