//! The calls of clients that showed no credentials: any local user reaches `heyvm --api`. They use sandboxes, and never
//! touch the host: no mount, no file of the host as image or kernel, nothing in a sandbox that sees the host's files.
//!
//! [`ALLOWED`] is the whole list; a call that is not on it is refused, so that a new one is closed until it is listed.

use axum::{
    extract::{FromRequestParts, MatchedPath, Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use heyvm_api::{ApiError, ErrorCode, headers, sandbox::CreateRequest};
use heyvm_control_plane::{ControlPlane, Who};
use http::{HeaderMap, Method};

use super::Api;
use crate::problem::Problem;

/// What may be called without credentials.
const ALLOWED: &[(Method, &str)] = &[
    (Method::GET, "/health"),
    (Method::GET, "/openapi.json"),
    (Method::GET, "/docs"),
    (Method::GET, "/doctor"),
    (Method::GET, "/archives"),
    (Method::PUT, "/archives"),
    (Method::DELETE, "/archives/{id}"),
    (Method::GET, "/images"),
    (Method::POST, "/images/pull"),
    (Method::GET, "/routes/{subdomain}"),
    (Method::GET, "/sandboxes"),
    (Method::POST, "/sandboxes"),
    (Method::GET, "/sandboxes/inactive"),
    (Method::GET, SANDBOX),
    (Method::DELETE, SANDBOX),
    (Method::POST, "/sandboxes/{id}/stop"),
    (Method::POST, "/sandboxes/{id}/start"),
    (Method::POST, "/sandboxes/{id}/restart"),
    (Method::POST, "/sandboxes/{id}/ttl"),
    (Method::POST, "/sandboxes/{id}/restart-policy"),
    (Method::POST, "/sandboxes/{id}/resize"),
    (Method::POST, "/sandboxes/{id}/checkpoint"),
    (Method::POST, "/sandboxes/{id}/restore"),
    (Method::POST, "/sandboxes/{id}/replace-mount"),
    (Method::POST, "/sandboxes/{id}/execute"),
    (Method::GET, "/sandboxes/{id}/exec"),
    (Method::GET, "/sandboxes/{id}/logs"),
    (Method::GET, "/sandboxes/{id}/wait"),
    (Method::GET, "/sandboxes/{id}/proxy"),
    (Method::POST, "/sandboxes/{id}/proxy"),
    (Method::DELETE, "/sandboxes/{id}/proxy"),
    (Method::DELETE, "/sandboxes/{id}/proxy/{port}"),
    (Method::GET, "/sandboxes/{id}/ports/{port}"),
    // Each of the files' calls, whatever its method.
    (Method::GET, FILES),
];
const SANDBOX: &str = "/sandboxes/{id}";
const FILES: &str = "/sandboxes/{id}/files";

/// Refuses what a restricted client may not call. Others pass.
pub async fn confine(State(api): State<Api>, request: Request, next: Next) -> Response {
    if !is_restricted(request.headers()) {
        return next.run(request).await;
    }
    let (mut head, body) = request.into_parts();
    let path = head.extensions.get::<MatchedPath>().map(|path| path.as_str().to_owned()).unwrap_or_default();
    if !is_allowed(&head.method, &path) {
        return forbidden("this call").into_response();
    }
    let looks_only = head.method == Method::GET && path == SANDBOX;
    if path.starts_with(SANDBOX) && !looks_only {
        let checked = async {
            let crate::extract::Who(named) = crate::extract::Who::from_request_parts(&mut head, &()).await?;
            may_use(&*api.plane().await?, &named.sandbox)
        };
        if let Err(problem) = checked.await {
            return problem.into_response();
        }
    }
    next.run(Request::from_parts(head, body)).await
}

/// Refuses a create that would touch the host, or end a sandbox that a restricted client may not use.
pub fn check_create(plane: &ControlPlane, headers: &HeaderMap, request: &CreateRequest) -> Result<(), Problem> {
    if !is_restricted(headers) {
        return Ok(());
    }
    if !request.mounts.is_empty() {
        return Err(forbidden("mounting a directory of the host"));
    }
    match request.name.as_deref().filter(|_| request.replace) {
        Some(name) => may_use(plane, name),
        None => Ok(()),
    }
}

/// Whether the caller showed no credentials.
pub fn is_restricted(headers: &HeaderMap) -> bool {
    headers.contains_key(headers::RESTRICTED)
}

fn is_allowed(method: &Method, path: &str) -> bool {
    path.starts_with(FILES) || ALLOWED.iter().any(|(allowed, at)| allowed == method && *at == path)
}

/// What runs in a sandbox with mounts reads and writes the host's files as the owner.
fn may_use(plane: &ControlPlane, sandbox: &str) -> Result<(), Problem> {
    match plane.has_mounts(&Who::owners(sandbox)) {
        true => Err(forbidden("using a sandbox that has directories of the host mounted")),
        // Whether there is such a sandbox is the handler's to say.
        false => Ok(()),
    }
}

fn forbidden(what: &str) -> Problem {
    ApiError::new(ErrorCode::Forbidden, format!("{what} needs the owner's credentials"))
        .hint("send Authorization: Bearer with the token that `heyvm --api` printed, or use the `heyvm` command")
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls that touch the host, or disks and images that somebody else made.
    const NEED_CREDENTIALS: &[&str] = &[
        "GET /orphans",
        "POST /sandboxes/{id}/recover",
        "POST /images/prune",
        "POST /sandboxes/{id}/mounts",
        "POST /images/import",
        "POST /images/prepare",
        "DELETE /images/{name}",
        "POST /kernels/import",
    ];

    #[test]
    fn every_call_is_decided_on() {
        let document = serde_json::to_value(crate::routes::document()).unwrap();
        let mut refused = Vec::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            for method in item.as_object().unwrap().keys() {
                let method: Method = method.to_uppercase().parse().unwrap();
                if !is_allowed(&method, path) {
                    refused.push(format!("{method} {path}"));
                }
            }
        }
        let mut expected = NEED_CREDENTIALS.to_vec();
        refused.sort();
        expected.sort();
        assert_eq!(refused, expected, "decide for each new call whether it may touch the host");
    }
}
