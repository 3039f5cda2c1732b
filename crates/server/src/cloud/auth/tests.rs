use std::net::{IpAddr, Ipv4Addr};

use axum::{Extension, Router, body::Body};
use heyvm_accounts::{NewUser, Settings};
use heyvm_edge::Visitor;
use heyvm_store::Store;
use http::Request;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

use super::*;

const EMAIL: &str = "ada@example.com";
const PASSWORD: &str = "correct horse";

/// The routes over a store with two users of accounts of their own.
struct Server {
    router: Router,
    _directory: tempfile::TempDir,
}

/// What came back.
struct Answer {
    status: u16,
    headers: HeaderMap,
    body: Value,
}

impl Server {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("heyvm.db")).await.unwrap();
        let accounts = Accounts::open(store, Settings::default()).await.unwrap();
        for email in [EMAIL, "bob@example.com"] {
            let new = NewUser { email, password: PASSWORD, account: None, scope: Scope::Admin };
            accounts.add_user(new).await.unwrap();
        }
        let (router, _) = routes::<Arc<Accounts>>().split_for_parts();
        let visitor = Visitor { address: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 7)), secure: true };
        Self { router: router.layer(Extension(visitor)).with_state(accounts), _directory: directory }
    }

    async fn send(&self, request: Request<Body>) -> Answer {
        let (parts, body) = self.router.clone().oneshot(request).await.unwrap().into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
        Answer { status: parts.status.as_u16(), headers: parts.headers, body }
    }

    async fn ask(&self, call: &str, token: &str, body: Value) -> Answer {
        let (method, path) = call.split_once(' ').unwrap();
        let mut request = Request::builder().method(method).uri(path);
        if !token.is_empty() {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let body = match body {
            Value::Null => Body::empty(),
            body => {
                request = request.header("content-type", "application/json");
                Body::from(body.to_string())
            }
        };
        self.send(request.body(body).unwrap()).await
    }

    async fn log_in(&self, email: &str) -> Value {
        let answer = self.ask("POST /api/auth/login", "", json!({"email": email, "password": PASSWORD})).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.body
    }

    async fn key(&self, token: &str, request: Value) -> Value {
        let answer = self.ask("POST /api/api-keys", token, request).await;
        assert_eq!(answer.status, 201, "{}", answer.body);
        answer.body
    }
}

impl Answer {
    fn is(&self, status: u16, code: &str) {
        assert_eq!((self.status, self.body["error"]["code"].as_str()), (status, Some(code)), "{}", self.body);
        assert!(self.body["error"]["hint"].is_string(), "{}", self.body);
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}"))
}

#[tokio::test]
async fn a_session_from_login_to_logout() {
    let server = Server::new().await;
    let login = json!({"email": "Ada@Example.com", "password": PASSWORD});
    let answer = server.ask("POST /api/auth/login", "", login).await;
    assert_eq!((answer.status, &answer.headers["cache-control"]), (200, &HeaderValue::from_static("no-store")));
    let first = answer.body;
    assert_eq!((text(&first["token_type"]), first["expires_in"].as_u64()), ("Bearer", Some(3600)));
    let who = server.ask("GET /api/auth/whoami", text(&first["access_token"]), Value::Null).await;
    assert_eq!((who.status, &who.body["email"], &who.body["scope"]), (200, &json!(EMAIL), &json!("admin")));
    assert_eq!(who.body["account_id"], first["account_id"]);
    let refresh = json!({"refresh_token": first["refresh_token"]});
    let next = server.ask("POST /api/auth/refresh", "", refresh.clone()).await;
    assert_eq!(next.status, 200, "{}", next.body);
    let token = text(&next.body["access_token"]);
    assert_eq!(server.ask("POST /api/auth/logout", token, Value::Null).await.status, 204);
    server.ask("GET /api/auth/whoami", token, Value::Null).await.is(401, "unauthorized");
    server.ask("POST /api/auth/refresh", "", refresh).await.is(401, "unauthorized");
    let other = server.log_in(EMAIL).await;
    let body = json!({"refresh_token": other["refresh_token"]});
    assert_eq!(server.ask("POST /api/auth/logout", "", body).await.status, 204);
    server.ask("GET /api/auth/whoami", text(&other["access_token"]), Value::Null).await.is(401, "unauthorized");
}

#[tokio::test]
async fn a_key_from_making_to_revoking() {
    let server = Server::new().await;
    let token = server.log_in(EMAIL).await["access_token"].clone();
    let token = text(&token);
    let made = server.key(token, json!({"name": "CI", "scope": "exec", "expires_in_seconds": 3600})).await;
    let (id, key) = (text(&made["id"]), text(&made["api_key"]));
    assert_eq!((text(&made["name"]), text(&made["scope"]), &made["revoked"]), ("CI", "exec", &json!(false)));
    let who = server.ask("GET /api/auth/whoami", key, Value::Null).await;
    assert_eq!((who.status, text(&who.body["scope"])), (200, "exec"));
    let tokens = server.ask("POST /api/api-keys/exchange", "", json!({"api_key": key})).await;
    let who = server.ask("GET /api/auth/whoami", text(&tokens.body["access_token"]), Value::Null).await;
    assert_eq!((who.status, text(&who.body["scope"])), (200, "exec"));
    let listed = server.ask("GET /api/api-keys", token, Value::Null).await.body;
    assert_eq!((listed.as_array().unwrap().len(), text(&listed[0]["id"])), (1, id));
    assert!(listed[0]["last_used_at"].is_string() && !listed.to_string().contains(key));
    let gone = format!("DELETE /api/api-keys/{id}");
    server.ask(&gone, key, Value::Null).await.is(403, "forbidden");
    let bobs = server.log_in("bob@example.com").await["access_token"].clone();
    server.ask(&gone, text(&bobs), Value::Null).await.is(403, "forbidden");
    assert_eq!(server.ask(&gone, token, Value::Null).await.status, 204);
    for credential in [key, text(&tokens.body["access_token"])] {
        server.ask("GET /api/auth/whoami", credential, Value::Null).await.is(401, "unauthorized");
    }
    server.ask("POST /api/api-keys/exchange", "", json!({"api_key": key})).await.is(401, "unauthorized");
    server.ask("DELETE /api/api-keys/nonsense", token, Value::Null).await.is(404, "not_found");
}

#[tokio::test]
async fn what_needs_admin_is_forbidden_to_less() {
    let server = Server::new().await;
    let token = server.log_in(EMAIL).await["access_token"].clone();
    for scope in ["read", "exec", "deploy"] {
        let key = server.key(text(&token), json!({"scope": scope})).await;
        let key = text(&key["api_key"]);
        for call in ["GET /api/api-keys", "GET /api/audit", "DELETE /api/api-keys/x"] {
            server.ask(call, key, Value::Null).await.is(403, "forbidden");
        }
        server.ask("POST /api/api-keys", key, json!({})).await.is(403, "forbidden");
    }
    for call in ["GET /api/api-keys", "GET /api/audit", "GET /api/auth/whoami", "POST /api/auth/logout"] {
        let answer = server.ask(call, "", Value::Null).await;
        answer.is(401, "unauthorized");
        assert_eq!(answer.headers["www-authenticate"], "Bearer");
    }
}

#[tokio::test]
async fn bad_bodies_are_told_which_field() {
    let server = Server::new().await;
    let token = server.log_in(EMAIL).await["access_token"].clone();
    let token = text(&token);
    for (call, body, field) in [
        ("POST /api/auth/login", json!({"email": EMAIL}), "password"),
        ("POST /api/auth/login", json!({"email": 7, "password": "x"}), "email"),
        ("POST /api/auth/refresh", json!({}), "refresh_token"),
        ("POST /api/auth/logout", json!({"refresh": 1}), "refresh"),
        ("POST /api/api-keys/exchange", json!({"api_key": null}), "api_key"),
        ("POST /api/api-keys", json!({"scope": "root"}), "scope"),
        ("POST /api/api-keys", json!({"expires_in_seconds": -1}), "expires_in_seconds"),
        ("POST /api/api-keys", json!({"expires_in_seconds": 0}), "expires_in_seconds"),
        ("POST /api/api-keys", json!({"colour": "red"}), "colour"),
        ("POST /api/api-keys", json!({"name": ""}), "name"),
    ] {
        let answer = server.ask(call, token, body).await;
        answer.is(400, "invalid_argument");
        assert!(text(&answer.body["error"]["message"]).contains(field), "{field}: {}", answer.body);
    }
    server.ask("GET /api/audit?limit=many", token, Value::Null).await.is(400, "invalid_argument");
    let bare = Request::post("/api/auth/login").body(Body::from("{}")).unwrap();
    server.send(bare).await.is(415, "invalid_argument");
}

#[tokio::test]
async fn too_many_attempts_are_told_to_wait() {
    let server = Server::new().await;
    let wrong = json!({"email": EMAIL, "password": "wrong horse"});
    for _ in 0..10 {
        server.ask("POST /api/auth/login", "", wrong.clone()).await.is(401, "unauthorized");
    }
    let answer = server.ask("POST /api/auth/login", "", json!({"email": EMAIL, "password": PASSWORD})).await;
    answer.is(429, "rate_limited");
    let seconds: u64 = answer.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=7).contains(&seconds) && answer.body["error"]["retry_after_seconds"] == seconds);
    server.log_in("bob@example.com").await;
}

#[tokio::test]
async fn the_audit_log_says_who_and_from_where() {
    let server = Server::new().await;
    let token = server.log_in(EMAIL).await["access_token"].clone();
    server.key(text(&token), json!({})).await;
    let page = server.ask("GET /api/audit?limit=2", text(&token), Value::Null).await.body;
    let entries = page["entries"].as_array().unwrap();
    assert_eq!((text(&entries[0]["action"]), text(&entries[1]["action"])), ("key.create", "session.login"));
    assert_eq!((text(&entries[1]["actor"]), text(&entries[1]["ip"])), (EMAIL, "192.0.2.7"));
    let rest = format!("GET /api/audit?before={}", page["next"]);
    let rest = server.ask(&rest, text(&token), Value::Null).await.body;
    assert_eq!((rest["entries"].as_array().unwrap().len(), &rest["next"]), (1, &Value::Null));
}

#[tokio::test]
async fn public_keys_are_public() {
    let server = Server::new().await;
    let answer = server.ask("GET /.well-known/jwks.json", "", Value::Null).await;
    assert_eq!((answer.status, answer.headers["cache-control"].to_str().unwrap()), (200, "public, max-age=300"));
    let key = &answer.body["keys"][0];
    assert_eq!((text(&key["kty"]), text(&key["crv"]), text(&key["alg"])), ("OKP", "Ed25519", "EdDSA"));
    assert!(key["d"].is_null(), "the private half is not told");
}
