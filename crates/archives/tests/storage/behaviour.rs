//! What holds in both places.

use std::{io, time::Duration};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use heyvm_archives::{Error, Limits, Object};
use sha2::{Digest, Sha256};

use crate::place::{Place, archive, body, read};

/// Some parts of an upload.
const LARGE: usize = 17 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn what_was_put_is_read() {
    for place in Place::both().await {
        for size in [1, 5 << 20, LARGE] {
            let sent = archive(size);
            let stored = place.storage.put(body(&sent), Limits::default()).await.unwrap();
            assert_eq!(stored.size, sent.len() as u64);
            assert_eq!(stored.hash, hex::encode(Sha256::digest(&sent)));
            assert!(read(&place.storage, &stored.object).await == sent, "{size} bytes of {place}");
            let objects: Vec<Object> = place.storage.objects().try_collect().await.unwrap();
            assert_eq!(objects.iter().map(|object| &object.name).collect::<Vec<_>>(), [&stored.object]);
            assert!(place.storage.exists(&stored.object).await.unwrap());
            place.storage.delete(&stored.object).await.unwrap();
            place.storage.delete(&stored.object).await.unwrap();
            assert!(!place.storage.exists(&stored.object).await.unwrap());
            assert!(matches!(place.storage.read(&stored.object).await.err(), Some(Error::Missing)));
            assert_eq!(place.bytes(), 0, "{place} after {size} bytes");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_archive_leaves_nothing() {
    let mut cut = archive(LARGE);
    cut.truncate(cut.len() - 1);
    let mut spoilt = archive(LARGE);
    spoilt[9 << 20] ^= 1;
    for place in Place::both().await {
        for bad in [&b"not a gzip file"[..], &[], &cut, &spoilt] {
            let refused = place.storage.put(body(bad), Limits::default()).await;
            assert!(matches!(refused, Err(Error::Refused(_))), "{refused:?}");
            assert_eq!(place.bytes(), 0, "{place}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_is_not_read_to_its_end() {
    let limits = Limits { compressed: 8 << 20, ..Limits::default() };
    for place in Place::both().await {
        let mut taken = 0;
        let sent = archive(LARGE);
        let pieces: Vec<_> = sent.chunks(40_000).map(Bytes::copy_from_slice).collect();
        let (told, mut tell) = tokio::sync::mpsc::unbounded_channel();
        let body = stream::iter(pieces).map(move |piece| {
            told.send(piece.len()).ok();
            Ok(piece)
        });
        let refused = place.storage.put(body, limits).await;
        assert!(matches!(refused, Err(Error::TooLarge { limit }) if limit == limits.compressed), "{refused:?}");
        while let Ok(bytes) = tell.try_recv() {
            taken += bytes;
        }
        assert!(taken < 9 << 20, "{taken} of {} bytes", sent.len());
        assert_eq!(place.bytes(), 0, "{place}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_breaks_off_leaves_nothing() {
    let sent = archive(LARGE);
    for place in Place::both().await {
        let gone = stream::iter([Err(io::Error::from(io::ErrorKind::ConnectionReset))]);
        let broken = place.storage.put(body(&sent[..12 << 20]).chain(gone), Limits::default()).await;
        assert!(matches!(broken, Err(Error::BrokenOff(_))), "{broken:?}");
        assert_eq!(place.bytes(), 0, "{place}");
    }
}

/// Looks, 20 ms apart, at what is to come within two minutes.
const PATIENCE: usize = 6000;

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_whose_caller_has_gone_comes_to_its_end() {
    let sent = archive(LARGE);
    for place in Place::both().await {
        let (sender, receiver) = tokio::sync::oneshot::channel::<io::Result<Bytes>>();
        let late = stream::once(async { receiver.await.unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into())) });
        let body = body(&sent[..12 << 20]).chain(late.boxed());
        let storage = place.storage.clone();
        let put = tokio::spawn(async move { storage.put(body, Limits::default()).await });
        for _ in 0..PATIENCE {
            if place.bytes() > 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(place.bytes() > 0, "{place}: nothing had begun");
        put.abort();
        assert!(put.await.is_err(), "{place}: the upload had an answer before its body ended");
        drop(sender);
        for _ in 0..PATIENCE {
            tokio::time::sleep(Duration::from_millis(20)).await;
            if place.bytes() == 0 {
                break;
            }
        }
        assert_eq!(place.bytes(), 0, "{place}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_that_died_left_behind_is_swept() {
    let sent = archive(LARGE);
    for place in Place::both().await {
        let kept = place.storage.put(body(&sent), Limits::default()).await.unwrap();
        let before = place.bytes();
        // A runtime that ends in the middle of an upload leaves what a process that is killed leaves.
        let (storage, begun) = (place.storage.clone(), body(&sent[..12 << 20]).chain(stream::pending()));
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            let put = storage.put(begun, Limits::default());
            let under_way = runtime.block_on(async { tokio::time::timeout(Duration::from_millis(700), put).await });
            assert!(under_way.is_err());
            std::mem::forget(runtime);
        })
        .join()
        .unwrap();
        assert!(place.bytes() > before, "{place}: nothing is left behind");
        place.storage.sweep(Duration::from_secs(3600)).await.unwrap();
        assert!(place.bytes() > before, "{place}: what is young may still be under way");
        place.storage.sweep(Duration::ZERO).await.unwrap();
        assert_eq!(place.bytes(), before, "{place}");
        assert!(read(&place.storage, &kept.object).await == sent);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once() {
    for place in Place::both().await {
        let uploads = (0..12).map(|n| {
            let (storage, sent) = (place.storage.clone(), archive(n << 20));
            async move {
                let stored = storage.put(body(&sent), Limits::default()).await.unwrap();
                assert!(read(&storage, &stored.object).await == sent);
            }
        });
        futures::future::join_all(uploads).await;
    }
}
