//! Who asks, whether they may, and what is written down of it. Every call goes through here first.

use axum::{
    RequestExt,
    extract::{MatchedPath, Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use chrono::Utc;
use heyvm_accounts::Identity;
use heyvm_api::{
    ApiError, ErrorCode,
    accounts::{AuditEntry, Scope},
};
use http::{HeaderMap, Method, StatusCode};

use super::{
    Served,
    identity::{Caller, ClientAddress, bearer},
};
use crate::problem::Problem;

/// Calls that need no credentials: they give them out, or say nothing that is anybody's.
const OPEN: [&str; 8] = [
    "/health",
    "/openapi.json",
    "/docs",
    "/.well-known/jwks.json",
    "/api/auth/login",
    "/api/auth/refresh",
    "/api/auth/logout",
    "/api/api-keys/exchange",
];
/// Calls that carry their own proof.
const SIGNED: [&str; 1] = ["/sandbox-archives/{id}/content"];
/// What runs commands in a sandbox, or reads or writes its files, whatever the method.
const EXEC: [&str; 11] = [
    "/sandboxes/{id}/execute",
    "/sandboxes/{id}/exec",
    "/sandboxes/{id}/files",
    "/sandboxes/{id}/files/download",
    "/sandboxes/{id}/files/upload",
    "/sandboxes/{id}/files/tar",
    "/sandbox/{id}/exec",
    "/sandbox/{id}/read-file",
    "/sandbox/{id}/write-file",
    "/deployed-sandboxes/{id}/shell-stream",
    "/sandboxes/{id}/ports/{port}",
];
/// GETs that do what they are asked, as WebSockets and byte streams.
const ACTING: [&str; 3] =
    ["/sandboxes/{id}/exec", "/deployed-sandboxes/{id}/shell-stream", "/sandboxes/{id}/ports/{port}"];
/// What concerns the account itself.
const ADMIN: [&str; 3] = ["/api/api-keys", "/api/api-keys/{id}", "/api/audit"];

/// Whether a call changes nothing.
fn only_reads(method: &Method, path: &str) -> bool {
    (method == Method::GET || method == Method::HEAD) && !ACTING.contains(&path)
}

/// What a credential must be good for, to make this call.
pub fn scope_of(method: &Method, path: &str) -> Scope {
    let reads = only_reads(method, path);
    if ADMIN.contains(&path) {
        Scope::Admin
    } else if EXEC.contains(&path) {
        Scope::Exec
    } else if reads {
        Scope::Read
    } else {
        Scope::Deploy
    }
}

/// Lets a call through with its [`Caller`], or answers 401 or 403; writes down what changed something.
pub async fn guard(State(served): State<Served>, mut request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned()).unwrap_or_default();
    let method = request.method().clone();
    if OPEN.contains(&path.as_str()) || SIGNED.contains(&path.as_str()) {
        return next.run(request).await;
    }
    let identity = match admit(&served, request.headers(), &method, &path).await {
        Ok(identity) => identity,
        Err(problem) => return problem.into_response(),
    };
    let actor = identity.actor();
    let changes = !only_reads(&method, &path);
    let target = request.uri().path().to_owned();
    let peer = request.extract_parts::<ClientAddress>().await.ok().map(|address| address.0.to_string());
    request.extensions_mut().insert(Caller(identity.clone()));
    let response = next.run(request).await;
    // What is not there was not changed: made-up names fill no log.
    if changes && response.status() != StatusCode::NOT_FOUND {
        let entry = AuditEntry {
            at: Utc::now(),
            account_id: identity.account_id,
            actor,
            action: format!("{method} {path}"),
            target,
            status: response.status().as_u16(),
            request_id: None,
            ip: peer,
        };
        // In its own time: the caller does not wait for it, and it is not lost where the caller goes away.
        let accounts = served.accounts.clone();
        tokio::spawn(async move {
            if let Err(error) = accounts.audit(&entry).await {
                tracing::error!(%error, "what a call did could not be written down");
            }
        });
    }
    response
}

async fn admit(served: &Served, headers: &HeaderMap, method: &Method, path: &str) -> Result<Identity, Problem> {
    let credential = bearer(headers)?;
    let identity = served.accounts.identify(credential).await?;
    let needed = scope_of(method, path);
    if identity.scope < needed {
        let message = format!("this needs credentials of scope {needed}; these are of scope {}", identity.scope);
        return Err(ApiError::new(ErrorCode::Forbidden, message)
            .hint("use a login, or an API key of that scope")
            .into());
    }
    Ok(identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The calls that credentials of scope `read` are good for: a new one is decided on here.
    const READS: [&str; 19] = [
        "/.well-known/jwks.json",
        "/api/auth/whoami",
        "/archives",
        "/deployed-sandboxes",
        "/deployed-sandboxes/{id}",
        "/docs",
        "/health",
        "/images",
        "/openapi.json",
        "/public-images",
        "/sandbox-archives",
        "/sandbox-archives/{id}",
        "/sandbox/{id}/status",
        "/sandboxes",
        "/sandboxes/inactive",
        "/sandboxes/{id}",
        "/sandboxes/{id}/logs",
        "/sandboxes/{id}/proxy",
        "/sandboxes/{id}/wait",
    ];

    #[test]
    fn reading_reaches_no_more_than_what_is_listed() {
        let document = serde_json::to_value(crate::cloud::document()).unwrap();
        let mut reads = Vec::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            for method in item.as_object().unwrap().keys() {
                let method: Method = method.to_uppercase().parse().unwrap();
                if scope_of(&method, path) == Scope::Read {
                    reads.push(path.clone());
                }
            }
        }
        let mut expected: Vec<_> = READS.map(str::to_owned).to_vec();
        reads.sort();
        expected.sort();
        assert_eq!(reads, expected);
    }

    #[test]
    fn what_changes_something_needs_more_than_reading() {
        assert_eq!(scope_of(&Method::GET, "/sandboxes"), Scope::Read);
        for path in ["/sandboxes/{id}/files", "/sandboxes/{id}/files/download", "/sandboxes/{id}/files/tar"] {
            assert_eq!(scope_of(&Method::GET, path), Scope::Exec, "{path}");
        }
        assert_eq!(scope_of(&Method::GET, "/sandboxes/{id}/logs"), Scope::Read);
        assert_eq!(scope_of(&Method::GET, "/sandboxes/{id}/exec"), Scope::Exec);
        assert_eq!(scope_of(&Method::DELETE, "/sandboxes/{id}/files"), Scope::Exec);
        assert_eq!(scope_of(&Method::POST, "/sandbox/{id}/read-file"), Scope::Exec);
        assert_eq!(scope_of(&Method::DELETE, "/sandboxes/{id}"), Scope::Deploy);
        assert_eq!(scope_of(&Method::POST, "/no/such/path"), Scope::Deploy);
        assert_eq!(scope_of(&Method::GET, "/api/audit"), Scope::Admin);
    }
}
