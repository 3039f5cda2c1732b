//! Calls of the local API that mean the same in a cloud: they go to the sandbox's region as they are.

use axum::{
    body::Body,
    extract::{Path, Request, State},
    response::{IntoResponse, Response},
};
use heyvm_api::{ApiError, ErrorCode};
use heyvm_cloud::Place;
use http::{HeaderMap, HeaderName, Uri, header};
use http_body_util::BodyExt;

use super::{Served, identity::Caller};
use crate::{problem::Problem, relay};

/// Headers of a client that are between it and us.
const OURS: [HeaderName; 3] = [header::AUTHORIZATION, header::COOKIE, header::HOST];

/// Sends the request to the region of the sandbox in its path, with the id in place of the name.
pub async fn forward(
    State(served): State<Served>,
    Caller(identity): Caller,
    Path(parts): Path<Vec<(String, String)>>,
    request: Request,
) -> Response {
    let who = parts.iter().find(|(name, _)| name == "id").map(|(_, who)| who.clone()).unwrap_or_default();
    let sent = async {
        let place = served.cloud.find(&identity.account_id, &who).await?;
        let (accounts, credentials) = (served.accounts.clone(), identity.clone());
        let lapsed = async move { accounts.lapsed(&credentials).await };
        to(&place, &rest(request.uri()), request, lapsed).await
    };
    sent.await.unwrap_or_else(Problem::into_response)
}

/// Sends a request to a sandbox's region, as one for `rest` below the sandbox's own path. A connection that it upgrades
/// ends when `until` comes.
pub(super) async fn to(
    place: &Place<'_>,
    rest: &str,
    mut request: Request,
    until: impl Future<Output = ()> + Send + 'static,
) -> Result<Response, Problem> {
    *request.uri_mut() = place.path(rest).parse().map_err(|_| {
        ApiError::new(ErrorCode::InvalidArgument, "the path names no sandbox")
            .hint("GET /openapi.json describes every path")
    })?;
    clean(request.headers_mut());
    let visitor = relay::wants_upgrade(request.headers()).then(|| hyper::upgrade::on(&mut request));
    let (head, body) = request.into_parts();
    let (body, broken) = relay::Passing::new(body);
    let request = Request::from_parts(head, body.map_err(Into::into).boxed_unsync());
    let sent = place.client()?.send(request).await;
    let mut response = sent.map_err(|error| broken.explain(place.region.explain(error).into()))?;
    if let Some(visitor) = visitor {
        relay::upgraded(visitor, &mut response, until);
    }
    Ok(response.map(Body::new))
}

/// What a client says of itself to us is nothing to a region, and what only we may say, it may not.
fn clean(headers: &mut HeaderMap) {
    for name in OURS {
        headers.remove(name);
    }
    let trusted: Vec<_> = headers.keys().filter(|name| name.as_str().starts_with("heyvm-")).cloned().collect();
    for name in trusted {
        headers.remove(name);
    }
}

/// What stands behind the name in `/sandboxes/NAME/rest?query`.
fn rest(uri: &Uri) -> String {
    let path = uri.path().trim_start_matches('/');
    let rest = path.split_once('/').and_then(|(_, rest)| rest.split_once('/')).map_or("", |(_, rest)| rest);
    let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    format!("/{rest}{query}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_behind_the_name_stays() {
        let rest = |uri: &'static str| rest(&Uri::from_static(uri));
        assert_eq!(rest("/sandboxes/web/execute"), "/execute");
        assert_eq!(rest("/sandboxes/w%2Fb/files/download?file_path=a%2Fb"), "/files/download?file_path=a%2Fb");
    }

    #[test]
    fn what_only_a_server_may_say_does_not_pass() {
        let mut headers: HeaderMap = [
            (header::AUTHORIZATION, "Bearer x"),
            (header::COOKIE, "__heyo_token=x"),
            (HeaderName::from_static("heyvm-account"), "other"),
            (HeaderName::from_static("heyvm-sandbox-id"), "other"),
            (header::ACCEPT, "application/json"),
        ]
        .map(|(name, value)| (name, value.parse().unwrap()))
        .into_iter()
        .collect();
        clean(&mut headers);
        assert_eq!(headers.len(), 1);
    }
}
