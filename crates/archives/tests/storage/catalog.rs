//! Whose archives there are, over a real store.

use std::{sync::Arc, time::Duration};

use futures::TryStreamExt;
use heyvm_api::ErrorCode;
use heyvm_archives::{Archives, Limits};
use heyvm_store::Store;

use crate::place::{Place, archive, body};

const NEVER: Duration = Duration::from_secs(3600);
const MIB_PER_ACCOUNT: i64 = 20;

async fn archives(place: &Place, directory: &tempfile::TempDir) -> Arc<Archives> {
    let store = Store::open(&directory.path().join("heyvm.db")).await.unwrap();
    Archives::new(store, place.storage.clone(), Limits::default(), Some(MIB_PER_ACCOUNT))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_finalized_is_forgotten_and_what_nobody_knows_is_removed() {
    for place in Place::both().await {
        let directory = tempfile::tempdir().unwrap();
        let archives = archives(&place, &directory).await;
        let sent = archive(1 << 20);
        let ticket = archives.presign("ada").await.unwrap();
        archives.upload(&ticket.id, &ticket.secret, body(&sent)).await.unwrap();
        let kept = archives.put("ada", Some("web"), body(&archive(10))).await.unwrap();
        // As after a crash between the upload and its row.
        let lost = place.storage.put(body(&archive(20)), Limits::default()).await.unwrap();

        archives.tidy(NEVER, NEVER).await.unwrap();
        assert!(place.storage.exists(&lost.object).await.unwrap(), "{place}: it is young");
        archives.finalize("ada", &ticket.id, None).await.unwrap();
        let other = archives.presign("ada").await.unwrap();
        archives.upload(&other.id, &other.secret, body(&archive(30))).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1100)).await;
        archives.tidy(Duration::ZERO, Duration::ZERO).await.unwrap();
        assert!(!place.storage.exists(&lost.object).await.unwrap(), "{place}");
        let error = archives.finalize("ada", &other.id, None).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::ArchiveNotFound);
        let listed: Vec<_> = archives.list("ada").await.unwrap().into_iter().map(|archive| archive.id).collect();
        assert_eq!(listed.len(), 2);
        assert!(listed.contains(&kept.id) && listed.contains(&ticket.id));
        let (told, bytes) = archives.read("ada", &ticket.id).await.unwrap();
        let bytes: Vec<_> = bytes.try_collect().await.unwrap();
        assert!(bytes.concat() == sent && told.size == sent.len() as u64);
        assert_eq!(archives.read("bob", &ticket.id).await.err().unwrap().code, ErrorCode::Forbidden);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_uploads_of_the_same_are_one_object() {
    for place in Place::both().await {
        let directory = tempfile::tempdir().unwrap();
        let archives = archives(&place, &directory).await;
        let sent = archive(6 << 20);
        let puts = (0..8).map(|n| archives.put(if n % 2 == 0 { "ada" } else { "bob" }, None, body(&sent)));
        let put: Vec<_> = futures::future::try_join_all(puts).await.unwrap();
        let objects: Vec<_> = place.storage.objects().try_collect().await.unwrap();
        assert_eq!(objects.len(), 1, "{place}");
        for (n, archive) in put.iter().enumerate() {
            archives.remove(if n % 2 == 0 { "ada" } else { "bob" }, &archive.id).await.unwrap();
        }
        assert_eq!(place.bytes(), 0, "{place}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_keeps_no_more_than_it_may() {
    for place in Place::both().await {
        let directory = tempfile::tempdir().unwrap();
        let archives = archives(&place, &directory).await;
        let [one, two] = [12, 13].map(|mib| archive(mib << 20));
        let kept = archives.put("ada", Some("one"), body(&one)).await.unwrap();
        archives.put("ada", Some("again"), body(&one)).await.unwrap();
        let refused = archives.put("ada", Some("two"), body(&two)).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::QuotaExceeded, "{refused}");
        assert!(refused.message.contains("have 12.0 MiB, and 13.0 more"), "{refused}");
        let ticket = archives.presign("ada").await.unwrap();
        let refused = archives.upload(&ticket.id, &ticket.secret, body(&two)).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::QuotaExceeded, "{refused}");
        let objects: Vec<_> = place.storage.objects().try_collect().await.unwrap();
        assert_eq!(objects.len(), 1, "{place}: nothing of what was refused is left");
        archives.put("bob", None, body(&two)).await.unwrap();
        for archive in archives.list("ada").await.unwrap() {
            archives.remove("ada", &archive.id).await.unwrap();
        }
        archives.upload(&ticket.id, &ticket.secret, body(&two)).await.unwrap();
        assert_eq!(archives.get("ada", &kept.id).await.unwrap_err().code, ErrorCode::ArchiveNotFound);
    }
}
