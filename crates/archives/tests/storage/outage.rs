//! A store that is away, or does not let us in.

use std::time::Duration;

use heyvm_api::{ApiError, ErrorCode};
use heyvm_archives::{Limits, S3, Settings, Storage};

use crate::place::{KEY, SECRET, Server, archive, body, read};

#[tokio::test(flavor = "multi_thread")]
async fn a_short_outage_is_not_noticed() {
    let server = Server::start().await;
    let storage = Storage::open(&Settings::S3(server.settings())).await.unwrap();
    let sent = archive(12 << 20);
    server.stop().await;
    let (put, ()) = tokio::join!(storage.put(body(&sent), Limits::default()), async {
        tokio::time::sleep(Duration::from_millis(150)).await;
        server.start_again().await;
    });
    assert!(read(&storage, &put.unwrap().object).await == sent);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_one_is_told_without_secrets() {
    let server = Server::start().await;
    let storage = Storage::open(&Settings::S3(server.settings())).await.unwrap();
    server.stop().await;
    let error: ApiError = storage.put(body(&archive(1)), Limits::default()).await.unwrap_err().into();
    assert_eq!(error.code, ErrorCode::StorageUnavailable);
    assert!(error.hint.is_some());
    server.start_again().await;
    storage.put(body(&archive(1)), Limits::default()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_settings_are_told_at_the_start() {
    let server = Server::start().await;
    let wrong = [
        S3 { secret_access_key: Some("another-secret".into()), ..server.settings() },
        S3 { access_key_id: Some("another-key".into()), ..server.settings() },
        S3 { bucket: "no-such-bucket".into(), ..server.settings() },
        S3 { secret_access_key: None, ..server.settings() },
    ];
    for settings in wrong {
        let shown = format!("{settings:?}");
        let error = Storage::open(&Settings::S3(settings)).await.unwrap_err();
        let told = format!("{error} {error:?} {shown}");
        assert!(!told.contains(SECRET) && !told.contains("another-secret"), "{told}");
        assert!(!shown.contains(KEY), "{shown}");
    }
}
