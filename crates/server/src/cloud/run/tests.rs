//! The whole API as it is served, over a real store and a daemon without VMs.

use axum::body::Body;
use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use heyvm_accounts::NewUser;
use heyvm_api::accounts::{CreateKeyRequest, Scope, Tokens};
use heyvm_store::placements;
use http_body_util::BodyExt;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};
use tower::ServiceExt;

use super::*;
use crate::trials::{Daemon, bodies, hostile};

const PASSWORD: &str = "correct horse";

/// A server whose one region is a daemon without VMs. Its store knows of one sandbox, of which the region does not.
struct Server {
    config: ServerConfig,
    accounts: Arc<Accounts>,
    store: Store,
    routes: Router,
    ada: Tokens,
    sandbox: String,
    _daemon: Daemon,
}

impl Server {
    async fn start() -> Self {
        let daemon = Daemon::start().await;
        let (home, config) = (daemon.home.path(), ServerConfig::default());
        let any = || async { listen(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap() };
        let places = Places::of(&config, &any().await, &any().await).unwrap();
        let served = open(home, &config, &places).await.unwrap();
        let accounts = Arc::clone(&served.accounts);
        let store = Store::connect(&config.store_location(home)).await.unwrap();
        let ada = log_in_anew(&accounts, "ada@example.org").await;
        let sandbox = place(&store, &ada.account_id).await;
        Self { config, accounts, store, routes: router(served), ada, sandbox, _daemon: daemon }
    }

    async fn ask(&self, call: &str, authorization: &str) -> (u16, http::HeaderMap, Value) {
        let (method, path) = call.split_once(' ').unwrap();
        let request = Request::builder().method(method).uri(path.replace("{id}", &self.sandbox));
        let request = request.header(header::AUTHORIZATION, authorization).body(Body::empty()).unwrap();
        let (head, body) = self.routes.clone().oneshot(request).await.unwrap().into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        (head.status.as_u16(), head.headers, serde_json::from_slice(&body).unwrap_or_default())
    }
}

async fn log_in_anew(accounts: &Accounts, email: &str) -> Tokens {
    accounts.add_user(NewUser { email, password: PASSWORD, account: None, scope: Scope::Admin }).await.unwrap();
    accounts.log_in(email, PASSWORD, std::net::Ipv4Addr::LOCALHOST.into()).await.unwrap()
}

async fn place(store: &Store, account: &str) -> String {
    let id = uuid::Uuid::new_v4().to_string();
    let row = placements::PlacementRow {
        id: id.clone(),
        account_id: account.to_owned(),
        region: "US".into(),
        name: "web".into(),
        slug: "web".into(),
        holds_name: true,
        running: true,
        gone: false,
        failed: false,
        created_at: 0,
        changed_at: 0,
        vcpu_millis: 1000,
        memory_mib: 512,
        disk_gb: 10,
        archive_id: None,
        info: "{}".into(),
    };
    let placed = store.place(&row, &placements::Limits::default(), None).await.unwrap();
    assert_eq!(placed, placements::Placed::Added);
    id
}

#[tokio::test]
async fn every_wrong_body_is_refused_by_the_name_of_its_field() {
    let server = Server::start().await;
    let document = serde_json::to_value(super::super::document()).unwrap();
    let credentials = format!("Bearer {}", server.ada.access_token);
    let (sent, taken) = bodies::try_all(&document, &server.routes, &credentials, &server.sandbox).await;
    assert!(sent > 600, "{sent}");
    assert!(taken.is_empty(), "{} of {sent}:\n{}", taken.len(), taken.join("\n"));
}

#[tokio::test]
async fn hostile_requests_get_nowhere() {
    let server = Server::start().await;
    let listener = listen(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
    let address = listener.local_addr().unwrap();
    let edge = api_edge(&server.config, server.routes.clone());
    tokio::spawn(async move { edge.serve(listener, CancellationToken::new()).await });
    hostile::is_stood(address, "/api/auth/login").await;
}

/// One or more of each router.
const CALLS: [&str; 10] = [
    "GET /api/auth/whoami",
    "POST /api/api-keys",
    "GET /sandboxes",
    "POST /sandboxes",
    "GET /sandboxes/{id}/logs",
    "POST /sandboxes/{id}/execute",
    "GET /deployed-sandboxes",
    "POST /sandbox-deploy",
    "GET /deployed-sandboxes/{id}/shell-stream",
    "GET /sandbox-archives",
];

/// Tokens that are like a good one but for something.
struct Forger {
    kid: String,
    public: String,
    key: EncodingKey,
    good: String,
}

impl Forger {
    async fn new(server: &Server) -> Self {
        let row = server.store.signing_keys().await.unwrap().remove(0);
        let seed = STANDARD.decode(row.private_key.strip_prefix("plain:").unwrap()).unwrap();
        // What stands before an Ed25519 key in PKCS #8 (RFC 8410, section 7).
        let pkcs8 = [&hex::decode("302e020100300506032b657004220420").unwrap()[..], &seed].concat();
        let good = server.ada.access_token.clone();
        Self { kid: row.kid, public: row.public_key, key: EncodingKey::from_ed_der(&pkcs8), good }
    }

    fn claims(&self) -> Value {
        let claims = self.good.split('.').nth(1).unwrap();
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).unwrap()).unwrap()
    }

    fn signed(&self, header: Header, claims: &Value) -> String {
        jsonwebtoken::encode(&header, claims, &self.key).unwrap()
    }

    fn header(&self) -> Header {
        Header { kid: Some(self.kid.clone()), ..Header::new(Algorithm::EdDSA) }
    }

    /// With another claim, or without it.
    fn claiming(&self, name: &str, value: Value) -> String {
        let mut claims = self.claims();
        match value {
            Value::Null => drop(claims.as_object_mut().unwrap().remove(name)),
            value => claims[name] = value,
        }
        self.signed(self.header(), &claims)
    }

    /// With one letter of one part changed.
    fn tampered(&self, part: usize) -> String {
        let mut parts: Vec<String> = self.good.split('.').map(str::to_owned).collect();
        let middle = parts[part].len() / 2;
        let other = if parts[part].as_bytes()[middle] == b'A' { "B" } else { "A" };
        parts[part].replace_range(middle..=middle, other);
        parts.join(".")
    }

    fn unsigned(&self, algorithm: &str) -> String {
        let header = json!({"typ": "JWT", "alg": algorithm, "kid": self.kid});
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        format!("{}.{}.", part(&header), part(&self.claims()))
    }

    /// The public key, which everybody has, as if it were a shared secret.
    fn confused(&self, secret: &[u8]) -> String {
        let header = Header { kid: Some(self.kid.clone()), ..Header::new(Algorithm::HS256) };
        jsonwebtoken::encode(&header, &self.claims(), &EncodingKey::from_secret(secret)).unwrap()
    }

    fn all(&self, now: i64, other_account: &str) -> Vec<(&'static str, String)> {
        let raw = URL_SAFE_NO_PAD.decode(&self.public).unwrap();
        let unknown = Header { kid: Some("0123456789abcdef".into()), ..self.header() };
        vec![
            ("expired", self.claiming("exp", json!(now - 1))),
            ("expiring never", self.claiming("exp", Value::Null)),
            ("a tampered header", self.tampered(0)),
            ("tampered claims", self.tampered(1)),
            ("a tampered signature", self.tampered(2)),
            ("no signature", self.good.rsplit_once('.').unwrap().0.to_owned()),
            ("alg none", self.unsigned("none")),
            ("alg None", self.unsigned("None")),
            ("alg EdDSA and no signature", self.unsigned("EdDSA")),
            ("signed with the public key as text", self.confused(self.public.as_bytes())),
            ("signed with the public key", self.confused(&raw)),
            ("another audience", self.claiming("aud", json!("another"))),
            ("no audience", self.claiming("aud", Value::Null)),
            ("another issuer", self.claiming("iss", json!("https://evil.example"))),
            ("no issuer", self.claiming("iss", Value::Null)),
            ("an unknown key", self.signed(unknown, &self.claims())),
            ("no key", self.signed(Header { kid: None, ..self.header() }, &self.claims())),
            ("an unknown session", self.claiming("sid", json!(uuid::Uuid::new_v4().to_string()))),
            ("another account", self.claiming("account_id", json!(other_account))),
        ]
    }
}

/// Credentials that were good once, or are for something else.
async fn spent(accounts: &Accounts, ada: &Tokens) -> Vec<(&'static str, String)> {
    let ended = log_in_anew(accounts, "ended@example.org").await;
    accounts.log_out(&ended.access_token).await.unwrap();
    let disabled = log_in_anew(accounts, "disabled@example.org").await;
    let owner = accounts.identify(&disabled.access_token).await.unwrap();
    let their_key = accounts.create_key(&owner, &CreateKeyRequest::default()).await.unwrap().api_key;
    accounts.disable_user("disabled@example.org").await.unwrap();
    let caller = accounts.identify(&ada.access_token).await.unwrap();
    let revoked = accounts.create_key(&caller, &CreateKeyRequest::default()).await.unwrap();
    accounts.revoke_key(Some(&caller), &revoked.info.id).await.unwrap();
    vec![
        ("an ended session", ended.access_token),
        ("a disabled user", disabled.access_token),
        ("a disabled user's key", their_key),
        ("a revoked key", revoked.api_key),
        ("a refresh token", ada.refresh_token.clone()),
        ("nothing", String::new()),
        ("nonsense", "nonsense".into()),
        ("a key that is none", "heyo_api_nonsense".into()),
        ("10 KiB", "x".repeat(10 << 10)),
        ("10 KiB of a key", format!("heyo_api_{}", "x".repeat(10 << 10))),
    ]
}

#[tokio::test]
async fn bad_credentials_are_good_for_nothing() {
    let server = Server::start().await;
    let forger = Forger::new(&server).await;
    let bob = log_in_anew(&server.accounts, "bob@example.org").await;
    let mut bad = forger.all(chrono::Utc::now().timestamp(), &bob.account_id);
    bad.extend(spent(&server.accounts, &server.ada).await);
    let mut taken = Vec::new();
    for call in CALLS {
        for good in [&forger.good, &forger.signed(forger.header(), &forger.claims())] {
            let (status, _, answer) = server.ask(call, &format!("Bearer {good}")).await;
            assert!(status != 401 && status < 500, "{call}: {status} {answer}");
        }
        let mut headers: Vec<_> = bad.iter().map(|(what, token)| (*what, format!("Bearer {token}"))).collect();
        headers.push(("another scheme", format!("Basic {}", forger.good)));
        headers.push(("no scheme", forger.good.clone()));
        for (what, authorization) in headers {
            let (status, headers, answer) = server.ask(call, &authorization).await;
            let told = answer["error"]["code"] == "unauthorized" && answer["error"]["hint"].is_string();
            if status != 401 || !told || headers.get(header::WWW_AUTHENTICATE).is_none() {
                taken.push(format!("{call} with {what}: {status} {answer}"));
            }
        }
    }
    assert!(taken.is_empty(), "{}", taken.join("\n"));
}
