//! The whole of it on both databases, with a clock that the tests set.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::atomic::{AtomicI64, Ordering},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use heyvm_api::{
    ErrorCode,
    accounts::{CreateKeyRequest, Tokens},
};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::{Value, json};

use super::*;
use crate::{errors::internal, token::Claims};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const EMAIL: &str = "ada@example.com";
const PASSWORD: &str = "correct horse";
const HOUR: i64 = 3_600_000;
const DAY: i64 = 24 * HOUR;

/// A store with one user, and as many servers over it as a test wants.
struct Place {
    location: String,
    clock: Arc<AtomicI64>,
    _directory: Option<tempfile::TempDir>,
}

impl Place {
    fn at(location: String, directory: Option<tempfile::TempDir>) -> Self {
        let clock = Arc::new(AtomicI64::new(Utc::now().timestamp_millis()));
        Self { location, clock, _directory: directory }
    }

    fn sqlite() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self::at(directory.path().join("heyvm.db").to_str().unwrap().into(), Some(directory))
    }

    async fn postgres() -> Self {
        Self::at(heyvm_test_services::postgres::database().await, None)
    }

    fn settings(&self) -> Settings {
        let clock = self.clock.clone();
        let clock = Clock(Arc::new(move || clock.load(Ordering::Relaxed)));
        Settings { issuer: "https://heyvm.example".into(), clock, ..Settings::default() }
    }

    fn pass(&self, millis: i64) {
        self.clock.fetch_add(millis, Ordering::Relaxed);
    }

    async fn server(&self) -> Arc<Accounts> {
        self.server_with(self.settings()).await.unwrap()
    }

    async fn server_with(&self, settings: Settings) -> Result<Arc<Accounts>, ApiError> {
        Accounts::open(Store::connect(&self.location).await.unwrap(), settings).await
    }

    async fn with_user(&self) -> Arc<Accounts> {
        let server = self.server().await;
        add(&server, EMAIL, Scope::Admin).await;
        server
    }
}

async fn add(server: &Accounts, email: &str, scope: Scope) -> String {
    let new = NewUser { email, password: PASSWORD, account: None, scope };
    server.add_user(new).await.unwrap().account_id
}

async fn log_in(server: &Accounts) -> Tokens {
    server.log_in(EMAIL, PASSWORD, HERE).await.unwrap()
}

fn code<T>(outcome: Result<T, ApiError>) -> ErrorCode {
    let error = outcome.err().expect("this was to be refused");
    assert!(error.hint.is_some(), "no hint: {error:?}");
    error.code
}

heyvm_test_services::on_both!(
    a_password_gives_tokens_and_nothing_else_does,
    attempts_are_limited,
    a_disabled_user_is_out_at_once_on_every_server,
    another_password_ends_what_the_old_one_began,
    an_api_key_is_good_until_it_is_revoked_or_expires,
    a_key_is_no_wider_than_its_maker_and_of_its_account,
    the_last_use_is_noted_once_a_minute,
    a_refresh_token_is_good_once,
    of_many_refreshes_at_once_one_succeeds,
    logging_out_ends_the_tokens,
    forged_tokens_are_refused,
    keys_rotate_without_logging_anyone_out,
    servers_that_start_together_agree_on_a_key,
    sealed_keys_need_the_secret,
    what_is_done_is_in_the_audit_log,
    the_audit_log_cannot_be_filled,
    what_goes_on_ends_with_its_credentials,
    the_store_holds_no_secret_in_the_clear,
    what_has_ended_is_forgotten,
    users_are_told_apart,
);

async fn a_password_gives_tokens_and_nothing_else_does(place: Place) {
    let server = place.with_user().await;
    let tokens = server.log_in(" ADA@example.com", PASSWORD, HERE).await.unwrap();
    assert_eq!((tokens.token_type.as_str(), tokens.expires_in), ("Bearer", 3600));
    let who = server.identify(&tokens.access_token).await.unwrap();
    assert_eq!((who.email.as_deref(), who.scope), (Some(EMAIL), Scope::Admin));
    assert_eq!(who.account_id, tokens.account_id);
    let mut told = Vec::new();
    for (email, password) in [(EMAIL, "wrong horse"), ("eve@example.com", PASSWORD), (EMAIL, ""), ("ada", PASSWORD)] {
        let refused = server.log_in(email, password, HERE).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::Unauthorized);
        told.push(refused.message);
    }
    told.dedup();
    assert_eq!(told.len(), 1, "which of the two is wrong is not told: {told:?}");
    let long = "x".repeat(100_000);
    for junk in ["", "x", "a.b.c", "heyo_api_", "heyo_api_nonsense", &tokens.refresh_token, &long] {
        assert_eq!(code(server.identify(junk).await), ErrorCode::Unauthorized, "{junk}");
    }
}

async fn attempts_are_limited(place: Place) {
    let settings = Settings { logins_per_minute: NonZeroU32::new(2).unwrap(), ..place.settings() };
    let server = place.server_with(settings).await.unwrap();
    add(&server, EMAIL, Scope::Admin).await;
    for _ in 0..2 {
        assert_eq!(code(server.log_in(EMAIL, "wrong horse", HERE).await), ErrorCode::Unauthorized);
    }
    let refused = server.log_in(EMAIL, PASSWORD, HERE).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::RateLimited);
    assert!((1..=31).contains(&refused.retry_after_seconds.unwrap()));
}

async fn a_disabled_user_is_out_at_once_on_every_server(place: Place) {
    let (one, other) = (place.with_user().await, place.server().await);
    let tokens = log_in(&one).await;
    let caller = other.identify(&tokens.access_token).await.unwrap();
    let key = one.create_key(&caller, &CreateKeyRequest::default()).await.unwrap().api_key;
    let of_key = one.exchange(&key, HERE).await.unwrap();
    one.disable_user("Ada@Example.com").await.unwrap();
    for credential in [&tokens.access_token, &key, &of_key.access_token] {
        assert_eq!(code(other.identify(credential).await), ErrorCode::Unauthorized);
    }
    assert_eq!(code(other.refresh(&tokens.refresh_token).await), ErrorCode::Unauthorized);
    assert_eq!(code(other.log_in(EMAIL, PASSWORD, HERE).await), ErrorCode::Unauthorized);
    one.enable_user(EMAIL).await.unwrap();
    assert_eq!(code(other.identify(&tokens.access_token).await), ErrorCode::Unauthorized);
    other.identify(&key).await.unwrap();
    other.identify(&log_in(&other).await.access_token).await.unwrap();
    assert_eq!(code(one.disable_user("eve@example.com").await), ErrorCode::NotFound);
}

async fn another_password_ends_what_the_old_one_began(place: Place) {
    let server = place.with_user().await;
    let tokens = log_in(&server).await;
    assert_eq!(code(server.set_password(EMAIL, "short").await), ErrorCode::InvalidArgument);
    server.identify(&tokens.access_token).await.unwrap();
    server.set_password(EMAIL, "battery staple").await.unwrap();
    assert_eq!(code(server.identify(&tokens.access_token).await), ErrorCode::Unauthorized);
    assert_eq!(code(server.log_in(EMAIL, PASSWORD, HERE).await), ErrorCode::Unauthorized);
    server.log_in(EMAIL, "battery staple", HERE).await.unwrap();
}

async fn an_api_key_is_good_until_it_is_revoked_or_expires(place: Place) {
    let (one, other) = (place.with_user().await, place.server().await);
    let request =
        CreateKeyRequest { name: Some("CI".into()), scope: Some(Scope::Exec), expires_in_seconds: Some(2 * 3600) };
    let made = one.issue_key(EMAIL, &request).await.unwrap();
    assert!(made.api_key.starts_with("heyo_api_") && made.api_key.len() >= 9 + 32);
    assert!(made.api_key.starts_with(&made.info.prefix) && made.info.prefix.len() < 20);
    let who = other.identify(&made.api_key).await.unwrap();
    assert_eq!((who.scope, who.user_id, who.credential), (Scope::Exec, None, made.info.id.clone()));
    let tokens = other.exchange(&made.api_key, HERE).await.unwrap();
    let of_token = one.identify(&tokens.access_token).await.unwrap();
    assert_eq!((of_token.scope, of_token.actor()), (Scope::Exec, format!("key:{}", made.info.id)));
    let endless = one.issue_key(EMAIL, &CreateKeyRequest::default()).await.unwrap();
    place.pass(2 * HOUR);
    assert_eq!(code(other.identify(&made.api_key).await), ErrorCode::Unauthorized);
    assert_eq!(code(other.refresh(&tokens.refresh_token).await), ErrorCode::Unauthorized);
    let tokens = other.exchange(&endless.api_key, HERE).await.unwrap();
    one.revoke_key(None, &endless.info.id).await.unwrap();
    assert_eq!(code(other.identify(&endless.api_key).await), ErrorCode::Unauthorized);
    assert_eq!(code(other.identify(&tokens.access_token).await), ErrorCode::Unauthorized);
    assert_eq!(code(other.exchange(&endless.api_key, HERE).await), ErrorCode::Unauthorized);
    assert!(one.keys(None).await.unwrap().iter().find(|key| key.id == endless.info.id).unwrap().revoked);
    assert_eq!(code(one.exchange(&tokens.access_token, HERE).await), ErrorCode::Unauthorized);
}

async fn a_key_is_no_wider_than_its_maker_and_of_its_account(place: Place) {
    let server = place.with_user().await;
    let other = add(&server, "bob@example.com", Scope::Admin).await;
    let deploys = server.issue_key(EMAIL, &CreateKeyRequest::default()).await.unwrap();
    assert_eq!(deploys.info.scope, Scope::Deploy);
    let caller = server.identify(&deploys.api_key).await.unwrap();
    let wide = CreateKeyRequest { scope: Some(Scope::Admin), ..Default::default() };
    assert_eq!(code(server.create_key(&caller, &wide).await), ErrorCode::Forbidden);
    let reader = Identity { scope: Scope::Read, ..caller.clone() };
    let made = server.create_key(&reader, &CreateKeyRequest::default()).await.unwrap();
    assert_eq!((made.info.scope, &made.info.account_id), (Scope::Read, &caller.account_id));
    let stranger = Identity { account_id: other.clone(), ..caller.clone() };
    assert_eq!(code(server.revoke_key(Some(&stranger), &made.info.id).await), ErrorCode::Forbidden);
    assert_eq!(code(server.revoke_key(Some(&caller), "no-such-key").await), ErrorCode::NotFound);
    assert_eq!(server.keys(Some(&other)).await.unwrap(), []);
    assert_eq!(server.keys(Some(&caller.account_id)).await.unwrap().len(), 2);
    assert_eq!(server.keys(None).await.unwrap().len(), 2);
    let long = "x".repeat(101);
    for name in ["", "  ", "a\u{1b}[2J", &long] {
        let request = CreateKeyRequest { name: Some(name.into()), ..Default::default() };
        assert_eq!(code(server.create_key(&caller, &request).await), ErrorCode::InvalidArgument);
    }
    for seconds in [0, u64::MAX] {
        let request = CreateKeyRequest { expires_in_seconds: Some(seconds), ..Default::default() };
        assert_eq!(code(server.create_key(&caller, &request).await), ErrorCode::InvalidArgument);
    }
    assert_eq!(code(server.issue_key("no such account", &CreateKeyRequest::default()).await), ErrorCode::NotFound);
}

async fn the_last_use_is_noted_once_a_minute(place: Place) {
    let server = place.with_user().await;
    let key = server.issue_key(EMAIL, &CreateKeyRequest::default()).await.unwrap().api_key;
    let start = server.now();
    let mut seen = Vec::new();
    for wait in [0, 59_999, 1, 60_000] {
        place.pass(wait);
        server.identify(&key).await.unwrap();
        seen.push(server.keys(None).await.unwrap()[0].last_used_at.unwrap().timestamp_millis() - start);
    }
    assert_eq!(seen, [0, 0, 60_000, 120_000]);
}

async fn a_refresh_token_is_good_once(place: Place) {
    let (one, other) = (place.with_user().await, place.server().await);
    let first = log_in(&one).await;
    place.pass(HOUR);
    assert_eq!(code(one.identify(&first.access_token).await), ErrorCode::Unauthorized);
    let second = other.refresh(&first.refresh_token).await.unwrap();
    let third = one.refresh(&second.refresh_token).await.unwrap();
    one.identify(&third.access_token).await.unwrap();
    assert_eq!(code(one.refresh("heyo_refresh_nonsense").await), ErrorCode::Unauthorized);
    one.identify(&third.access_token).await.unwrap();
    assert_eq!(code(one.refresh(&first.refresh_token).await), ErrorCode::Unauthorized);
    for server in [&one, &other] {
        assert_eq!(code(server.identify(&third.access_token).await), ErrorCode::Unauthorized);
        assert_eq!(code(server.refresh(&third.refresh_token).await), ErrorCode::Unauthorized);
    }
    let kept = log_in(&one).await;
    place.pass(30 * DAY - 1);
    let kept = one.refresh(&kept.refresh_token).await.unwrap();
    place.pass(30 * DAY);
    assert_eq!(code(one.refresh(&kept.refresh_token).await), ErrorCode::Unauthorized);
}

async fn of_many_refreshes_at_once_one_succeeds(place: Place) {
    let server = place.with_user().await;
    let token = log_in(&server).await.refresh_token;
    let tries = (0..10).map(|_| {
        let (server, token) = (server.clone(), token.clone());
        tokio::spawn(async move { server.refresh(&token).await.is_ok() })
    });
    let mut won = 0;
    for each in tries.collect::<Vec<_>>() {
        won += usize::from(each.await.unwrap());
    }
    assert_eq!(won, 1);
}

async fn logging_out_ends_the_tokens(place: Place) {
    let (one, other) = (place.with_user().await, place.server().await);
    let (tokens, kept) = (log_in(&one).await, log_in(&one).await);
    one.log_out(&tokens.access_token).await.unwrap();
    assert_eq!(code(other.identify(&tokens.access_token).await), ErrorCode::Unauthorized);
    assert_eq!(code(other.refresh(&tokens.refresh_token).await), ErrorCode::Unauthorized);
    assert_eq!(code(other.log_out(&tokens.access_token).await), ErrorCode::Unauthorized);
    place.pass(2 * HOUR);
    let kept = one.refresh(&kept.refresh_token).await.unwrap();
    other.log_out(&kept.refresh_token).await.unwrap();
    assert_eq!(code(one.identify(&kept.access_token).await), ErrorCode::Unauthorized);
    let key = one.issue_key(EMAIL, &CreateKeyRequest::default()).await.unwrap().api_key;
    assert_eq!(code(one.log_out(&key).await), ErrorCode::InvalidArgument);
}

/// A part of a token, as JSON.
fn part(token: &str, which: usize) -> Value {
    let part = token.split('.').nth(which).unwrap();
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap()
}

fn encoded(value: &Value) -> String {
    URL_SAFE_NO_PAD.encode(value.to_string())
}

async fn forged_tokens_are_refused(place: Place) {
    let server = place.with_user().await;
    let good = log_in(&server).await.access_token;
    let (head, body) = (part(&good, 0), part(&good, 1));
    assert_eq!((head["alg"].as_str(), body["aud"].as_str()), (Some("EdDSA"), Some("heyvm")));
    assert_eq!(body["iss"], "https://heyvm.example");
    let [h, b, s] = good.split('.').collect::<Vec<_>>()[..] else { panic!() };
    let with = |key: &str, value: Value| {
        let mut body = body.clone();
        body[key] = value;
        body
    };
    let kid = head["kid"].as_str().unwrap();
    let public = server.jwks().await.unwrap()["keys"][0]["x"].as_str().unwrap().to_owned();
    let hmac = |secret: &[u8]| {
        let header = Header { kid: Some(kid.into()), ..Header::new(Algorithm::HS256) };
        encode(&header, &body, &EncodingKey::from_secret(secret)).unwrap()
    };
    let mut forged = vec![
        ("no signature", format!("{h}.{b}.")),
        ("alg none", format!("{}.{b}.", encoded(&json!({"alg": "none", "kid": kid})))),
        ("alg none, signed", format!("{}.{b}.{s}", encoded(&json!({"alg": "none", "kid": kid})))),
        ("HS256 with the public key", hmac(&URL_SAFE_NO_PAD.decode(&public).unwrap())),
        ("HS256 with the public key's text", hmac(public.as_bytes())),
        ("unknown kid", format!("{}.{b}.{s}", encoded(&json!({"alg": "EdDSA", "kid": "other"})))),
        ("no kid", format!("{}.{b}.{s}", encoded(&json!({"alg": "EdDSA"})))),
        ("another account", format!("{h}.{}.{s}", encoded(&with("account_id", "x".into())))),
        ("a later end", format!("{h}.{}.{s}", encoded(&with("exp", 4_000_000_000_u64.into())))),
        ("another signature", format!("{h}.{b}.{}", URL_SAFE_NO_PAD.encode([7; 64]))),
        ("a part less", format!("{h}.{b}")),
        ("a part more", format!("{good}.{s}")),
    ];
    // Signed with the server's own key, so that nothing but the claim in question is wrong.
    let keys = [
        ("audience", with("aud", "other".into())),
        ("issuer", with("iss", "https://evil.example".into())),
        ("an end that has passed", with("exp", (server.now() / 1000).into())),
        ("an end that is no number", with("exp", "never".into())),
        ("no end", with("exp", Value::Null)),
        ("an unknown session", with("sid", "other".into())),
        ("a session of another account", with("account_id", "other".into())),
    ];
    let own = own_key(&server, kid).await;
    let resigned = |claims: &Value| {
        let header = Header { kid: Some(kid.into()), ..Header::new(Algorithm::EdDSA) };
        encode(&header, claims, &own).map_err(|error| internal(&error)).unwrap()
    };
    server.identify(&resigned(&body)).await.unwrap();
    forged.extend(keys.iter().map(|(what, claims)| (*what, resigned(claims))));
    for (what, token) in forged {
        assert_eq!(code(server.identify(&token).await), ErrorCode::Unauthorized, "{what}");
    }
    server.identify(&good).await.unwrap();
    // The user may change their own token's scope as little as anything else in it.
    let claims: Claims = serde_json::from_value(body).unwrap();
    assert_eq!(claims.scope, Scope::Admin);
}

/// What only the server has.
async fn own_key(server: &Accounts, kid: &str) -> EncodingKey {
    let rows = server.store.signing_keys().await.unwrap();
    let row = rows.into_iter().find(|row| row.kid == kid).unwrap();
    let seed = seal::Sealer::new(None).open(kid, &row.private_key).unwrap();
    let mut der = vec![0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
    der.extend(seed);
    EncodingKey::from_ed_der(&der)
}

fn kids(jwks: &Value) -> Vec<&str> {
    jwks["keys"].as_array().unwrap().iter().map(|key| key["kid"].as_str().unwrap()).collect()
}

async fn keys_rotate_without_logging_anyone_out(place: Place) {
    let (one, other) = (place.with_user().await, place.server().await);
    let old = log_in(&one).await;
    let kid = |tokens: &Tokens| part(&tokens.access_token, 0)["kid"].as_str().unwrap().to_owned();
    one.rotate().await.unwrap();
    let jwks = one.jwks().await.unwrap();
    assert_eq!((kids(&jwks).len(), kids(&jwks)[0]), (2, kid(&old).as_str()));
    let still = log_in(&one).await;
    assert_eq!(kid(&still), kid(&old), "a new key is published before it signs");
    place.pass(HOUR);
    let new = log_in(&one).await;
    assert_eq!(kid(&new), kids(&jwks)[1]);
    // The other server has read its keys before there was this one, and reads them anew once a second at most.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    other.identify(&new.access_token).await.unwrap();
    let on = other.refresh(&old.refresh_token).await.unwrap();
    assert_eq!(kid(&on), kid(&new));
    place.pass(HOUR + 61_000);
    one.maintain().await.unwrap();
    assert_eq!(kids(&one.jwks().await.unwrap()), [kid(&new)]);
    assert_eq!(code(one.identify(&old.access_token).await), ErrorCode::Unauthorized);
    one.refresh(&on.refresh_token).await.unwrap();
    // By itself: not before it is due, and once.
    place.pass(29 * DAY);
    for server in [&one, &other, &one] {
        server.maintain().await.unwrap();
    }
    let due = kids(&one.jwks().await.unwrap()).len();
    place.pass(DAY);
    for server in [&one, &other, &one] {
        server.maintain().await.unwrap();
    }
    assert_eq!((due, one.store.signing_keys().await.unwrap().len()), (1, 2));
}

async fn servers_that_start_together_agree_on_a_key(place: Place) {
    let (one, other) = tokio::join!(place.server(), place.server());
    assert_eq!(one.store.signing_keys().await.unwrap().len(), 1);
    add(&one, EMAIL, Scope::Admin).await;
    other.identify(&log_in(&one).await.access_token).await.unwrap();
    one.identify(&log_in(&other).await.access_token).await.unwrap();
    let (a, b) = tokio::join!(one.rotate(), other.rotate());
    a.and(b).unwrap();
    assert!((2..=3).contains(&one.store.signing_keys().await.unwrap().len()));
}

async fn sealed_keys_need_the_secret(place: Place) {
    let with = |secret: &str| Settings { secret: Some(Secret::new(secret.repeat(32)).unwrap()), ..place.settings() };
    let server = place.server_with(with("a")).await.unwrap();
    add(&server, EMAIL, Scope::Admin).await;
    let tokens = log_in(&server).await;
    let row = server.store.signing_keys().await.unwrap().remove(0);
    assert!(row.private_key.starts_with("sealed:"));
    for settings in [with("b"), place.settings()] {
        assert_eq!(code(place.server_with(settings).await), ErrorCode::HostNotReady);
    }
    let again = place.server_with(with("a")).await.unwrap();
    again.identify(&tokens.access_token).await.unwrap();
    // An operator's command needs none, and makes no key.
    let operator = Accounts::administer(Store::connect(&place.location).await.unwrap()).unwrap();
    assert_eq!(operator.users().await.unwrap().len(), 1);
    assert_eq!(server.store.signing_keys().await.unwrap().len(), 1);
}

async fn what_is_done_is_in_the_audit_log(place: Place) {
    let server = place.with_user().await;
    let bobs = add(&server, "bob@example.com", Scope::Admin).await;
    let tokens = log_in(&server).await;
    server.log_in(EMAIL, "wrong horse", IpAddr::from([192, 0, 2, 7])).await.ok();
    let caller = server.identify(&tokens.access_token).await.unwrap();
    let key = server.create_key(&caller, &CreateKeyRequest::default()).await.unwrap().info.id;
    server.revoke_key(Some(&caller), &key).await.unwrap();
    server.log_out(&tokens.access_token).await.unwrap();
    let page = server.audit_log(&caller.account_id, None, 100).await.unwrap();
    let told: Vec<_> =
        page.entries.iter().map(|entry| (entry.action.as_str(), entry.status, entry.actor.as_str())).collect();
    let expected = [
        ("session.logout", 200, EMAIL),
        ("key.revoke", 200, EMAIL),
        ("key.create", 201, EMAIL),
        ("session.login", 401, EMAIL),
        ("session.login", 200, EMAIL),
        ("user.add", 201, "operator"),
    ];
    assert_eq!(told, expected);
    assert_eq!(page.entries[3].ip.as_deref(), Some("192.0.2.7"));
    assert_eq!((page.entries[1].target.as_str(), page.next), (key.as_str(), None));
    let mut read = Vec::new();
    let mut before = None;
    loop {
        let page = server.audit_log(&caller.account_id, before, 4).await.unwrap();
        read.extend(page.entries);
        before = page.next;
        if before.is_none() {
            break;
        }
    }
    assert_eq!(read, page.entries);
    assert_eq!(server.audit_log(&bobs, None, 100).await.unwrap().entries.len(), 1);
}

async fn the_store_holds_no_secret_in_the_clear(place: Place) {
    let server = place.with_user().await;
    let tokens = log_in(&server).await;
    let key = server.issue_key(EMAIL, &CreateKeyRequest::default()).await.unwrap().api_key;
    let user = server.store.user_of_email(EMAIL).await.unwrap().unwrap();
    assert!(user.password_hash.starts_with("$argon2id$"));
    let row = server.store.api_keys(None).await.unwrap().remove(0);
    assert_eq!((row.hash.len(), key.strip_prefix(&row.prefix).unwrap().len()), (64, 37));
    assert_eq!(server.store.session_of_token(&tokens.refresh_token).await.unwrap(), None);
    let Some(directory) = &place._directory else { return };
    for file in std::fs::read_dir(directory.path()).unwrap() {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        for secret in [PASSWORD, &key, &tokens.refresh_token, &tokens.access_token] {
            assert!(!bytes.windows(secret.len()).any(|window| window == secret.as_bytes()));
        }
    }
}

async fn what_has_ended_is_forgotten(place: Place) {
    let server = place.with_user().await;
    let (ended, kept) = (log_in(&server).await, log_in(&server).await);
    server.log_out(&ended.access_token).await.unwrap();
    place.pass(DAY + 1);
    server.maintain().await.unwrap();
    assert_eq!(server.store.session_of_token(&hash(&ended.refresh_token)).await.unwrap(), None);
    server.refresh(&kept.refresh_token).await.unwrap();
}

async fn users_are_told_apart(place: Place) {
    let server = place.with_user().await;
    let new = |email, account| NewUser { email, password: PASSWORD, account, scope: Scope::Read };
    assert_eq!(code(server.add_user(new("ADA@example.com", None)).await), ErrorCode::NameTaken);
    let bob = server.add_user(new("bob@example.com", Some(EMAIL))).await.unwrap();
    let ada = server.users().await.unwrap().remove(0);
    assert_eq!((&bob.account_id, ada.email.as_str(), ada.disabled), (&ada.account_id, EMAIL, false));
    let eve = server.add_user(new("eve@example.com", Some(&bob.account_id))).await.unwrap();
    assert_eq!(eve.account_id, bob.account_id);
    assert_eq!(code(server.add_user(new("nobody", None)).await), ErrorCode::InvalidArgument);
    let short = NewUser { password: "short", ..new("new@example.com", Some("new account")) };
    assert_eq!(code(server.add_user(short).await), ErrorCode::InvalidArgument);
    assert_eq!(server.accounts().await.unwrap().len(), 1, "nothing half-done is left behind");
    let quotas = Quotas { max_running: Some(3), ..Quotas::default() };
    server.set_quotas(EMAIL, &quotas).await.unwrap();
    assert_eq!(server.account(&bob.account_id).await.unwrap().quotas, quotas);
    assert_eq!(code(server.account("no such account").await), ErrorCode::NotFound);
    let who = server.log_in("bob@example.com", PASSWORD, HERE).await.unwrap();
    assert_eq!(server.identify(&who.access_token).await.unwrap().scope, Scope::Read);
}

async fn the_audit_log_cannot_be_filled(place: Place) {
    let server = place.with_user().await;
    let account = log_in(&server).await.account_id;
    let entry = |target: &str| heyvm_api::accounts::AuditEntry {
        at: DateTime::from_timestamp_millis(server.now()).unwrap(),
        account_id: account.clone(),
        actor: "ada".into(),
        action: "POST /x".into(),
        target: target.into(),
        status: 200,
        request_id: None,
        ip: None,
    };
    server.audit(&entry(&"ä".repeat(60_000))).await.unwrap();
    server.audit(&entry("short")).await.unwrap();
    let log = server.audit_log(&account, None, 10).await.unwrap().entries;
    assert_eq!(log[0].target, "short");
    assert!(log[1].target.len() < 300 && log[1].target.ends_with('…'), "{}", log[1].target);
    // The days of their retention pass.
    place.pass(90 * 24 * HOUR + HOUR);
    server.audit(&entry("new")).await.unwrap();
    server.maintain().await.unwrap();
    let targets: Vec<_> =
        server.audit_log(&account, None, 10).await.unwrap().entries.into_iter().map(|entry| entry.target).collect();
    assert_eq!(targets, ["new"]);
    let key = server.issue_key(EMAIL, &CreateKeyRequest::default()).await.unwrap().api_key;
    server.exchange(&key, HERE).await.unwrap();
    // Used up without the store, so that a slow machine does not give room back meanwhile.
    while server.meter(Metered::Exchange, &account).is_ok() {}
    assert_eq!(code(server.exchange(&key, HERE).await), ErrorCode::RateLimited);
}

async fn what_goes_on_ends_with_its_credentials(place: Place) {
    let (one, other) = (place.with_user().await, place.server().await);
    let session = log_in(&one).await;
    let made = one.issue_key(EMAIL, &CreateKeyRequest::default()).await.unwrap();
    let of_key = one.exchange(&made.api_key, HERE).await.unwrap();
    let mut running = Vec::new();
    for credential in [&session.access_token, &made.api_key, &of_key.access_token] {
        let (other, identity) = (Arc::clone(&other), other.identify(credential).await.unwrap());
        running.push(tokio::spawn(async move { other.lapsed(&identity).await }));
    }
    // An access token that has expired does not end what its session has begun.
    place.pass(2 * HOUR);
    one.identify(&made.api_key).await.unwrap();
    tokio::time::sleep(LAPSE_POLL * 2).await;
    assert!(running.iter().all(|each| !each.is_finished()));
    one.revoke_key(None, &made.info.id).await.unwrap();
    for ended in running.drain(1..) {
        tokio::time::timeout(Duration::from_secs(120), ended).await.unwrap().unwrap();
    }
    assert!(!running[0].is_finished());
    one.disable_user(EMAIL).await.unwrap();
    tokio::time::timeout(Duration::from_secs(120), running.remove(0)).await.unwrap().unwrap();
}
