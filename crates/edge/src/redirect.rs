//! The plain port beside TLS: leads to it, and answers a certificate authority's questions.

use bytes::Bytes;
use http::{
    HeaderValue, Request, Response, StatusCode,
    header::{CONTENT_TYPE, LOCATION},
};

use crate::{
    ConnectError, Edge,
    body::AnswerBody,
    host,
    refusal::{Form, Refusal},
    tls::Challenges,
};

impl Edge {
    /// Answers a request of the plain port.
    pub(crate) fn redirect<B>(
        &self,
        request: &Request<B>,
        challenges: &Challenges,
        https: u16,
    ) -> Response<AnswerBody> {
        if let Some(answer) = challenges.answer(request.uri().path()) {
            let mut response = Response::new(AnswerBody::from(Bytes::from(answer)));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
            return response;
        }
        match self.tls_url(request, https) {
            Ok(url) => {
                let mut response = Response::new(AnswerBody::from(Bytes::new()));
                // Keeps the method and the body.
                *response.status_mut() = StatusCode::PERMANENT_REDIRECT;
                response.headers_mut().insert(LOCATION, url);
                response
            }
            Err(refusal) => refusal.response(Form::of(request.headers(), Form::Text)),
        }
    }

    fn tls_url<B>(&self, request: &Request<B>, https: u16) -> Result<HeaderValue, Refusal> {
        let authority = host::authority(request)?;
        let (name, base) = (host::name(&authority), self.settings.base_domain.as_str());
        let is_site = self.site.as_ref().is_some_and(|site| site.has(name));
        if !is_site && name != base && host::subdomain(&authority, base).is_none() {
            return Err(Refusal::NoConnection(ConnectError::UnknownSubdomain));
        }
        let port = if https == 443 { String::new() } else { format!(":{https}") };
        let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
        HeaderValue::from_str(&format!("https://{name}{port}{path}")).map_err(|_| Refusal::BadRequest("has no path"))
    }
}
