//! Pulls at the same time, pulls that nobody waits for any more, and what a pull tells meanwhile.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde_json::json;

use crate::{
    layout::{Layout, file, layer},
    place::{OPERATOR, Place, Root, silent},
    server::Server,
};

/// Bytes that no compression makes fewer.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_pulls_of_an_image_give_the_same() {
    let server = Server::start();
    let layout = Layout::new(&[layer(vec![file("data", noise(4 << 20))])], json!({}));
    let name = server.push(layout.path(), "test/large:1");
    let place = Place::using(&server);
    let (one, two) =
        tokio::join!(place.store.pull(&name, OPERATOR, silent()), place.store.pull(&name, OPERATOR, silent()));
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!(one, two);
    assert_eq!(place.kept(), [one.digest.replace(':', "-")]);
    assert_eq!(std::fs::read(Root::of(&one).path("data")).unwrap(), noise(4 << 20));
}

#[tokio::test]
async fn progress_is_told_during_a_layer() {
    let server = Server::start();
    let parts = [layer(vec![file("data", noise(8 << 20))]), layer(vec![file("more", noise(1 << 20))])];
    let name = server.push(Layout::new(&parts, json!({})).path(), "test/large:1");
    let told = Arc::new(Mutex::new(Vec::new()));
    let keep = Arc::clone(&told);
    let place = Place::using(&server);
    let progress = Arc::new(move |step: &str, done: Option<u64>, total: Option<u64>| {
        keep.lock().unwrap().push((step.to_owned(), done, total));
    });
    place.store.pull(&name, OPERATOR, progress).await.unwrap();
    let told = told.lock().unwrap();
    let pulling: Vec<(u64, u64)> = told
        .iter()
        .filter(|(step, ..)| step == "pulling")
        .map(|(_, done, total)| (done.unwrap(), total.unwrap()))
        .collect();
    assert!(pulling.len() > 10, "{pulling:?}");
    assert!(pulling.is_sorted() && pulling.iter().all(|(_, total)| *total > 9 << 20), "{pulling:?}");
    assert_eq!(pulling[0].0, 0);
    assert_eq!(pulling.last().map(|(done, total)| done == total), Some(true));
    assert!(told.iter().any(|(step, ..)| step == "unpacking layer 2"));
}

#[tokio::test]
async fn a_pull_that_is_dropped_leaves_nothing() {
    let server = Server::start();
    let layout = Layout::new(&[layer(vec![file("data", noise(32 << 20))])], json!({}));
    let name = server.push(layout.path(), "test/large:1");
    let place = Place::using(&server);
    let (midway, seen) = (Arc::new(tokio::sync::Notify::new()), Arc::new(AtomicBool::new(false)));
    let (tell, mark) = (Arc::clone(&midway), Arc::clone(&seen));
    let progress = Arc::new(move |_: &str, done: Option<u64>, total: Option<u64>| {
        if done > Some(1 << 20) && done < total {
            mark.store(true, Ordering::Relaxed);
            tell.notify_one();
        }
    });
    tokio::select! {
        biased;
        () = midway.notified() => {}
        _ = place.store.pull(&name, OPERATOR, progress) => panic!("the pull ended before it was dropped"),
    }
    assert!(seen.load(Ordering::Relaxed));
    // What is large is removed beside the one who leaves.
    let gone = async {
        while !place.kept().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(10), gone).await.is_ok(), "{:?}", place.kept());
    place.store.pull(&name, OPERATOR, silent()).await.unwrap();
}
