use axum::Router;
use flate2::{Compression, write::GzEncoder};
use heyvm_accounts::{Accounts, NewUser};
use heyvm_api::{ErrorCode, error::ErrorBody};
use heyvm_archives::{Limits, Settings, Storage};
use heyvm_store::Store;
use http::{Method, Request};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

use super::*;

#[derive(Clone)]
struct Everything {
    archives: Arc<Archives>,
    accounts: Arc<Accounts>,
    url: PublicUrl,
}

impl FromRef<Everything> for Arc<Archives> {
    fn from_ref(state: &Everything) -> Self {
        Self::clone(&state.archives)
    }
}

impl FromRef<Everything> for Arc<Accounts> {
    fn from_ref(state: &Everything) -> Self {
        Self::clone(&state.accounts)
    }
}

impl FromRef<Everything> for PublicUrl {
    fn from_ref(state: &Everything) -> Self {
        state.url.clone()
    }
}

/// The routes over a real store and a directory, and the access tokens of two accounts.
struct Server {
    router: Router,
    ada: String,
    bob: String,
    directory: tempfile::TempDir,
}

impl Server {
    async fn new(url: PublicUrl) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("heyvm.db")).await.unwrap();
        let accounts = Accounts::open(store.clone(), heyvm_accounts::Settings::default()).await.unwrap();
        let settings = Settings::Directory(directory.path().join("kept"));
        let limits = Limits { compressed: 1 << 20, ..Limits::STANDARD };
        let archives = Archives::new(store, Storage::open(&settings).await.unwrap(), limits, None);
        let mut tokens = Vec::new();
        for email in ["ada@example.com", "bob@example.com"] {
            let new = NewUser { email, password: "correct horse", account: None, scope: Scope::Admin };
            accounts.add_user(new).await.unwrap();
            let from = std::net::Ipv4Addr::LOCALHOST.into();
            tokens.push(accounts.log_in(email, "correct horse", from).await.unwrap().access_token);
        }
        let (router, _) = routes::<Everything>().split_for_parts();
        let router = router.with_state(Everything { archives, accounts, url });
        let [ada, bob] = tokens.try_into().unwrap();
        Self { router, ada, bob, directory }
    }

    async fn send(&self, method: Method, uri: &str, token: &str, body: impl Into<Body>) -> (u16, Value) {
        let kind = if method == Method::PUT { "application/gzip" } else { "application/json" };
        let request = Request::builder().method(method).uri(uri).header("host", "api.example.com:8443");
        let mut request = request.header("content-type", kind);
        if !token.is_empty() {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let request = request.body(body.into()).unwrap();
        let (parts, body) = self.router.clone().oneshot(request).await.unwrap().into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        (parts.status.as_u16(), serde_json::from_slice(&bytes).unwrap_or(Value::Null))
    }

    async fn presign(&self) -> (String, String) {
        let (status, answer) = self.send(Method::POST, "/sandbox-archives/presign", &self.ada, "").await;
        assert_eq!(status, 200, "{answer}");
        (answer["archive_id"].as_str().unwrap().into(), answer["upload_url"].as_str().unwrap().into())
    }

    /// Objects that are kept.
    fn kept(&self) -> usize {
        std::fs::read_dir(self.directory.path().join("kept/archives")).map_or(0, Iterator::count)
    }
}

fn archive(content: &str) -> Vec<u8> {
    let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, "app/main.py", content.as_bytes()).unwrap();
    builder.into_inner().unwrap().finish().unwrap()
}

fn code(answer: &Value) -> ErrorCode {
    let error = serde_json::from_value::<ErrorBody>(answer.clone()).unwrap_or_else(|_| panic!("{answer}")).error;
    assert!(error.hint.is_some(), "{answer}");
    error.code
}

#[tokio::test]
async fn an_upload_as_clients_do_it() {
    let server = Server::new(PublicUrl::default()).await;
    let (id, url) = server.presign().await;
    assert!(url.starts_with(&format!("http://api.example.com:8443/sandbox-archives/{id}/")), "{url}");
    let finalize = format!("/sandbox-archives/{id}/finalize");
    let asked = json!({"sandbox_id": "my-app"}).to_string();
    let (status, early) = server.send(Method::POST, &finalize, &server.ada, asked.clone()).await;
    assert_eq!((status, code(&early)), (409, ErrorCode::InvalidState));

    let sent = archive("print(1)");
    for _ in 0..2 {
        let (status, answer) = server.send(Method::PUT, &url, "", sent.clone()).await;
        assert_eq!((status, &answer["size_bytes"]), (200, &json!(sent.len())), "{answer}");
    }
    let (status, first) = server.send(Method::POST, &finalize, &server.ada, asked.clone()).await;
    assert_eq!((status, &first["id"], &first["name"]), (200, &json!(id), &json!("my-app")), "{first}");
    assert_eq!(first["size_bytes"], sent.len());
    let (_, again) = server.send(Method::POST, &finalize, &server.ada, asked).await;
    assert_eq!(again, first);

    let (_, same) = server.send(Method::PUT, &url, "", sent).await;
    assert_eq!(same["archive_id"], json!(id));
    let (status, other) = server.send(Method::PUT, &url, "", archive("print(2)")).await;
    assert_eq!((status, code(&other)), (409, ErrorCode::InvalidState));
    let (_, list) = server.send(Method::GET, "/sandbox-archives", &server.ada, "").await;
    assert_eq!(list, json!([first]));
    assert_eq!(server.kept(), 1);
}

#[tokio::test]
async fn the_public_url_counts_where_there_is_one() {
    let server = Server::new(PublicUrl(Some("https://cloud.example.com/".into()))).await;
    let (id, url) = server.presign().await;
    assert!(url.starts_with(&format!("https://cloud.example.com/sandbox-archives/{id}/content?token=")), "{url}");
}

#[tokio::test]
async fn what_is_anothers_stays_theirs() {
    let server = Server::new(PublicUrl::default()).await;
    let (_, put) = server.send(Method::PUT, "/archives", &server.ada, archive("a")).await;
    let path = format!("/sandbox-archives/{}", put["archive_id"].as_str().unwrap());
    for method in [Method::GET, Method::DELETE] {
        let (status, answer) = server.send(method, &path, &server.bob, "").await;
        assert_eq!((status, code(&answer)), (403, ErrorCode::Forbidden));
    }
    let (_, list) = server.send(Method::GET, "/sandbox-archives", &server.bob, "").await;
    assert_eq!(list, json!([]));
    let (status, answer) = server.send(Method::GET, "/sandbox-archives/ar-0", &server.bob, "").await;
    assert_eq!((status, code(&answer)), (404, ErrorCode::ArchiveNotFound));
    let (status, _) = server.send(Method::POST, "/sandbox-archives/presign", "", "").await;
    assert_eq!(status, 401);
}

#[tokio::test]
async fn an_upload_url_is_good_for_its_archive_alone() {
    let server = Server::new(PublicUrl::default()).await;
    let ((_, one), (other, _)) = (server.presign().await, server.presign().await);
    let token = one.split_once("token=").unwrap().1;
    for url in [
        format!("/sandbox-archives/{other}/content?token={token}"),
        format!("/sandbox-archives/{other}/content?token="),
        format!("/sandbox-archives/{other}/content"),
    ] {
        let (status, answer) = server.send(Method::PUT, &url, &server.ada, archive("a")).await;
        assert_eq!((status, code(&answer)), (403, ErrorCode::Forbidden), "{url}");
    }
    assert_eq!(server.kept(), 0);
}

#[tokio::test]
async fn bad_archives_leave_nothing() {
    let server = Server::new(PublicUrl::default()).await;
    let (_, url) = server.presign().await;
    let (status, answer) = server.send(Method::PUT, &url, "", "no archive").await;
    assert_eq!((status, code(&answer)), (422, ErrorCode::ArchiveInvalid));
    let (status, answer) = server.send(Method::PUT, "/archives", &server.ada, "no archive").await;
    assert_eq!((status, code(&answer)), (422, ErrorCode::ArchiveInvalid));
    let (status, answer) = server.send(Method::PUT, &url, "", vec![0; 2 << 20]).await;
    assert_eq!((status, code(&answer)), (413, ErrorCode::TooLarge));
    let (_, list) = server.send(Method::GET, "/sandbox-archives", &server.ada, "").await;
    assert_eq!((list, server.kept()), (json!([]), 0));
    let (status, _) = server.send(Method::PUT, &url, "", archive("good")).await;
    assert_eq!(status, 200, "a bad upload spoils no archive");
}

#[tokio::test]
async fn the_same_content_is_kept_once_and_goes_with_its_last_archive() {
    let server = Server::new(PublicUrl::default()).await;
    let mut ids = Vec::new();
    for token in [&server.ada, &server.bob] {
        let (status, put) = server.send(Method::PUT, "/archives", token, archive("same")).await;
        assert_eq!(status, 201);
        ids.push(put["archive_id"].as_str().unwrap().to_owned());
    }
    assert_ne!(ids[0], ids[1]);
    assert_eq!(server.kept(), 1);
    for (id, token, left) in [(&ids[0], &server.ada, 1), (&ids[1], &server.bob, 0)] {
        let path = format!("/sandbox-archives/{id}");
        assert_eq!(server.send(Method::DELETE, &path, token, "").await.0, 204);
        assert_eq!(server.kept(), left);
        assert_eq!(server.send(Method::GET, &path, token, "").await.0, 404);
    }
}
