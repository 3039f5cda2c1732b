//! The same on both databases.

use std::{collections::HashSet, os::unix::fs::PermissionsExt};

use super::{
    placements::{Limits, Placed, PlacementRow, Usage},
    *,
};

/// Where a test's database is; gone with it.
struct Place {
    location: String,
    _directory: Option<tempfile::TempDir>,
}

impl Place {
    fn sqlite() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("50% of a?#.db");
        Self { location: path.to_str().unwrap().into(), _directory: Some(directory) }
    }

    async fn postgres() -> Self {
        Self { location: heyvm_test_services::postgres::database().await, _directory: None }
    }

    async fn open(&self) -> Store {
        Store::connect(&self.location).await.unwrap()
    }
}

heyvm_test_services::on_both!(
    a_name_is_taken_only_by_a_living_sandbox,
    of_many_at_once_one_gets_the_name,
    a_replacement_takes_name_and_subdomains_at_once,
    what_is_written_is_read,
    ports_come_in_the_order_of_binding,
    local_ports_are_kept,
    a_key_stands_for_one_sandbox,
    several_may_open_it_at_once,
    a_store_has_an_id_of_its_own,
    a_placement_is_written_and_read,
    pages_of_placements_have_each_of_them_once,
    names_are_an_accounts_own,
    an_account_gets_no_more_than_it_may_have,
    of_many_at_once_as_many_fit_as_there_is_room_for,
    what_an_operation_holds_counts_until_it_ends,
    of_many_requests_with_one_key_one_adds_and_the_others_find_it,
    a_placement_takes_anothers_name,
    subdomains_lead_to_the_last_who_has_them,
    what_is_long_gone_is_forgotten,
    one_object_serves_all_with_its_content,
    archives_of_an_account_are_no_more_than_it_may_have,
    what_was_sent_for_one_deploy_goes_after_its_sandbox,
    a_content_that_comes_as_it_is_given_up_is_not_lost,
);

fn row(id: &str, name: &str) -> SandboxRow {
    SandboxRow {
        id: id.into(),
        account: String::new(),
        name: name.into(),
        slug: name.into(),
        living: true,
        removed: false,
        created_at: 1,
        changed_at: 1,
        expires_at: None,
        data: "{}".into(),
    }
}

fn endpoint(subdomain: &str, sandbox_id: &str, port: u16) -> EndpointRow {
    EndpointRow { subdomain: subdomain.into(), sandbox_id: sandbox_id.into(), port, is_public: true }
}

async fn a_name_is_taken_only_by_a_living_sandbox(place: Place) {
    let store = place.open().await;
    store.insert(&row("a", "web")).await.unwrap();
    assert!(matches!(store.insert(&row("b", "web")).await, Err(Error::NameTaken)));
    let same_slug = SandboxRow { slug: "web".into(), ..row("c", "other") };
    assert!(matches!(store.insert(&same_slug).await, Err(Error::SlugTaken)));
    assert!(matches!(store.insert(&row("a", "other")).await, Err(Error::Exists)));
    let acmes = |id| SandboxRow { account: "acme".into(), ..row(id, "web") };
    store.insert(&acmes("d")).await.unwrap();
    assert!(matches!(store.insert(&acmes("e")).await, Err(Error::NameTaken)));
    store.update(&SandboxRow { living: false, ..row("a", "web") }).await.unwrap();
    store.insert(&row("b", "web")).await.unwrap();
    let accounts: Vec<_> = store.sandboxes().await.unwrap().into_iter().map(|row| row.account).collect();
    assert_eq!(accounts, ["", "", "acme"]);
}

async fn of_many_at_once_one_gets_the_name(place: Place) {
    let store = place.open().await;
    let tries = (0..20).map(|n| {
        let store = store.clone();
        tokio::spawn(async move { store.insert(&row(&n.to_string(), "web")).await.is_ok() })
    });
    let mut won = 0;
    for each in tries.collect::<Vec<_>>() {
        won += usize::from(each.await.unwrap());
    }
    assert_eq!(won, 1);
}

async fn a_replacement_takes_name_and_subdomains_at_once(place: Place) {
    let store = place.open().await;
    let bound = endpoint("abc", "a", 80);
    store.insert(&row("a", "web")).await.unwrap();
    store.add_endpoint(&bound, 1).await.unwrap();
    store.insert(&SandboxRow { living: false, ..row("b", "web") }).await.unwrap();
    let old = SandboxRow { living: false, removed: true, ..row("a", "web") };
    store.replace(&old, &row("b", "web"), std::slice::from_ref(&bound)).await.unwrap();
    assert_eq!(store.endpoints().await.unwrap(), [endpoint("abc", "b", 80)]);
    store.close().await;
    let again = place.open().await;
    assert_eq!(again.sandboxes().await.unwrap().iter().filter(|row| row.living).count(), 1);
}

async fn what_is_written_is_read(place: Place) {
    let store = place.open().await;
    let data = r#"{"text": "Ünï ' \" \\ 🦀"}"#;
    let expires = SandboxRow { expires_at: Some(i64::MAX), data: data.into(), ..row("a", "web") };
    let removed = SandboxRow { living: false, removed: true, created_at: 2, ..row("b", "web") };
    store.insert(&expires).await.unwrap();
    store.insert(&removed).await.unwrap();
    assert_eq!(store.sandboxes().await.unwrap(), [removed, expires]);
    store.forget("a").await.unwrap();
    store.forget("b").await.unwrap();
    assert_eq!(store.sandboxes().await.unwrap(), []);
}

async fn ports_come_in_the_order_of_binding(place: Place) {
    let store = place.open().await;
    let all = [endpoint("z", "a", 3), endpoint("m", "a", 65535), endpoint("a", "a", 1)];
    for each in &all {
        store.add_endpoint(each, 1).await.unwrap();
    }
    assert_eq!(store.endpoints().await.unwrap(), all);
    store.set_endpoint_public("a", 65535, false).await.unwrap();
    assert_eq!(
        store.endpoints().await.unwrap().iter().map(|row| row.is_public).collect::<Vec<_>>(),
        [true, false, true]
    );
    assert!(matches!(store.add_endpoint(&endpoint("z", "b", 9), 1).await, Err(Error::Exists)));
    assert!(matches!(store.add_endpoint(&endpoint("y", "a", 3), 1).await, Err(Error::Exists)));
    assert!(store.remove_endpoint("a", 3).await.unwrap());
    assert!(!store.remove_endpoint("a", 3).await.unwrap());
    store.remove_endpoints("a").await.unwrap();
    assert_eq!(store.endpoints().await.unwrap(), []);
}

async fn local_ports_are_kept(place: Place) {
    let store = place.open().await;
    let ports = std::collections::HashMap::from([("a".to_owned(), 20_001), ("b".to_owned(), 65_535)]);
    store.set_local_ports(&ports).await.unwrap();
    store.close().await;
    let again = place.open().await;
    assert_eq!(again.local_ports().await.unwrap(), ports);
    again.set_local_ports(&Default::default()).await.unwrap();
    assert!(again.local_ports().await.unwrap().is_empty());
}

async fn a_key_stands_for_one_sandbox(place: Place) {
    let store = place.open().await;
    let stands = KeyRow { request: "hash".into(), sandbox_id: "a".into() };
    store.add_key("k", &stands, 1).await.unwrap();
    assert!(matches!(store.add_key("k", &stands, 2).await, Err(Error::Exists)));
    assert_eq!(store.key("k").await.unwrap(), Some(stands));
    store.remove_keys("a").await.unwrap();
    assert_eq!(store.key("k").await.unwrap(), None);
}

async fn several_may_open_it_at_once(place: Place) {
    let (one, other, _, _) = tokio::join!(place.open(), place.open(), place.open(), place.open());
    one.insert(&row("a", "web")).await.unwrap();
    assert!(matches!(other.insert(&row("b", "web")).await, Err(Error::NameTaken)));
}

#[tokio::test]
async fn the_file_is_its_owners_alone() {
    let place = Place::sqlite();
    let _store = place.open().await;
    let mode = std::fs::metadata(&place.location).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn connections_are_as_durable_and_patient_as_told() {
    let place = Place::sqlite();
    let store = place.open().await;
    for (pragma, expected) in [("busy_timeout", 10_000), ("synchronous", 1), ("foreign_keys", 1)] {
        let sql = sqlx::AssertSqlSafe(format!("PRAGMA {pragma}"));
        let value: i64 = sqlx::query_scalar(sql).fetch_one(&store.pool).await.unwrap();
        assert_eq!(value, expected, "{pragma}");
    }
    let mode: String = sqlx::query_scalar("PRAGMA journal_mode").fetch_one(&store.pool).await.unwrap();
    assert_eq!(mode, "wal");
}

/// Every word that an error, its sources and its debug form have.
fn told(error: &Error) -> String {
    let mut text = format!("{error:?}");
    let mut source: Option<&dyn std::error::Error> = Some(error);
    while let Some(each) = source {
        text.push_str(&format!("\n{each}"));
        source = each.source();
    }
    text
}

#[tokio::test]
async fn a_password_is_not_told() {
    let place = Place::postgres().await;
    let secret = heyvm_test_services::postgres::PASSWORD;
    assert!(place.location.contains(secret));
    assert!(!format!("{:?}", place.open().await).contains(secret));
    let wrong = place.location.replace(secret, "hunter2");
    let nowhere = "postgres://heyvm:hunter2@127.0.0.1:1/heyvm".to_owned();
    for location in [
        wrong,
        nowhere,
        "postgres://heyvm:hunter2@localhost:many/heyvm".into(),
        "postgres://heyvm:hunter2@[::/heyvm".into(),
        "mysql://heyvm:hunter2@localhost/heyvm".into(),
    ] {
        let told = told(&Store::connect(&location).await.unwrap_err());
        assert!(!told.contains("hunter2"), "{location}: {told}");
    }
}

fn place(id: &str, account: &str, name: &str) -> PlacementRow {
    PlacementRow {
        id: id.into(),
        account_id: account.into(),
        region: "US".into(),
        name: name.into(),
        slug: name.into(),
        holds_name: true,
        running: true,
        gone: false,
        failed: false,
        created_at: 1,
        changed_at: 1,
        vcpu_millis: 250,
        memory_mib: 512,
        disk_gb: 10,
        archive_id: Some("ar-1".into()),
        info: "{}".into(),
    }
}

async fn a_placement_is_written_and_read(at: Place) {
    let store = at.open().await;
    let row = place("a", "one", "web");
    assert_eq!(store.place(&row, &Limits::default(), None).await.unwrap(), Placed::Added);
    assert_eq!(store.placement("a").await.unwrap(), Some(row.clone()));
    let next = PlacementRow { running: false, failed: true, gone: true, archive_id: None, changed_at: 2, ..row };
    store.update_placement(&next).await.unwrap();
    assert_eq!(store.placements_of("one", true, None, 10).await.unwrap(), [next]);
    assert_eq!(store.placements_of("one", false, None, 10).await.unwrap(), []);
    assert_eq!(store.placement("b").await.unwrap(), None);
}

async fn pages_of_placements_have_each_of_them_once(at: Place) {
    let store = at.open().await;
    let none = Limits::default();
    for (id, created_at) in [("a", 3), ("b", 1), ("c", 3), ("d", 2), ("e", 3)] {
        store
            .place(&PlacementRow { created_at, changed_at: created_at, ..place(id, "one", id) }, &none, None)
            .await
            .unwrap();
    }
    let gone = store.placement("d").await.unwrap().unwrap();
    store.update_placement(&PlacementRow { gone: true, holds_name: false, ..gone }).await.unwrap();
    for (with_gone, expected) in [(true, vec!["a", "c", "e", "d", "b"]), (false, vec!["a", "c", "e", "b"])] {
        let (mut ids, mut after) = (Vec::new(), None::<(i64, String)>);
        loop {
            let behind = after.as_ref().map(|(at, id)| (*at, id.as_str()));
            let page = store.placements_of("one", with_gone, behind, 2).await.unwrap();
            let Some(last) = page.last() else { break };
            after = Some((last.created_at, last.id.clone()));
            ids.extend(page.into_iter().map(|row| row.id));
        }
        assert_eq!(ids, expected);
    }
    for (account, prefix, found) in [("one", "a", 1), ("one", "", 2), ("other", "a", 0), ("one", "f", 0)] {
        assert_eq!(store.placements_with_prefix(account, prefix, 2).await.unwrap().len(), found, "{account} {prefix}");
    }
    assert_eq!(store.placements_unheard("US", 2).await.unwrap(), ["b"]);
    assert!(store.placements_unheard("EU", 9).await.unwrap().is_empty());
}

async fn names_are_an_accounts_own(at: Place) {
    let store = at.open().await;
    let none = Limits::default();
    store.place(&place("a", "one", "web"), &none, None).await.unwrap();
    store.place(&place("b", "other", "web"), &none, None).await.unwrap();
    assert!(matches!(store.place(&place("c", "one", "web"), &none, None).await, Err(Error::NameTaken)));
    let same_slug = PlacementRow { name: "else".into(), ..place("c", "one", "web") };
    assert!(matches!(store.place(&same_slug, &none, None).await, Err(Error::SlugTaken)));
    let found = |account: &'static str| async { store.placement_named(account, "web").await.unwrap().unwrap().id };
    assert_eq!((found("one").await.as_str(), found("other").await.as_str()), ("a", "b"));
    // The one that holds the name goes before those that once did, the newest of those before the others.
    store.update_placement(&PlacementRow { holds_name: false, gone: true, ..place("a", "one", "web") }).await.unwrap();
    store
        .place(&PlacementRow { holds_name: false, created_at: 5, ..place("c", "one", "web") }, &none, None)
        .await
        .unwrap();
    assert_eq!(found("one").await, "c");
    store.place(&PlacementRow { created_at: 2, ..place("d", "one", "web") }, &none, None).await.unwrap();
    assert_eq!(found("one").await, "d");
}

async fn an_account_gets_no_more_than_it_may_have(at: Place) {
    let store = at.open().await;
    let two = Limits { running: Some(2), ..Limits::default() };
    store.place(&place("a", "one", "a"), &two, None).await.unwrap();
    store.place(&place("b", "one", "b"), &two, None).await.unwrap();
    let usage = store.place(&place("c", "one", "c"), &two, None).await.unwrap();
    assert_eq!(usage, Placed::Full(Usage { running: 2, vcpu_millis: 500, memory_mib: 1024, disk_gb: 20 }));
    assert_eq!(store.placement("c").await.unwrap(), None);
    // What is stopped runs no more, but its disk counts until it is gone.
    let stopped = PlacementRow { running: false, holds_name: false, ..place("b", "one", "b") };
    store.update_placement(&stopped).await.unwrap();
    assert_eq!(store.place(&place("c", "one", "c"), &two, None).await.unwrap(), Placed::Added);
    let running = PlacementRow { running: true, ..stopped.clone() };
    assert!(store.make_room(&running, &two, NOW, NOW + 1).await.unwrap().is_some());
    for (limits, fits) in [
        (Limits { vcpu_millis: Some(749), ..Limits::default() }, false),
        (Limits { memory_mib: Some(1536), ..Limits::default() }, true),
        (Limits { memory_mib: Some(1535), ..Limits::default() }, false),
        (Limits { disk_gb: Some(29), ..Limits::default() }, false),
    ] {
        let made = store.make_room(&running, &limits, NOW, NOW + 1).await.unwrap();
        assert_eq!(made.is_none(), fits, "{limits:?}");
        store.release_room("b").await.unwrap();
        store.update_placement(&stopped).await.unwrap();
    }
    store.update_placement(&PlacementRow { gone: true, ..stopped }).await.unwrap();
    let thirty = Limits { disk_gb: Some(30), ..Limits::default() };
    assert_eq!(store.place(&place("d", "one", "d"), &thirty, None).await.unwrap(), Placed::Added);
}

/// A time at which rows that were written at 1 are old.
const NOW: i64 = 1000;

async fn what_an_operation_holds_counts_until_it_ends(at: Place) {
    let store = at.open().await;
    let one = Limits { running: Some(1), ..Limits::default() };
    let stopped =
        |id: &str| PlacementRow { running: false, holds_name: false, changed_at: NOW, ..place(id, "one", id) };
    for id in ["a", "b"] {
        store.place(&stopped(id), &one, None).await.unwrap();
    }
    let started = |id: &str| PlacementRow { running: true, ..stopped(id) };
    let starts = |id: &'static str, now| {
        let store = store.clone();
        async move { store.make_room(&started(id), &one, now, now + 100).await.unwrap().is_none() }
    };
    // Two operations on one sandbox: its region may report it as stopped between them.
    assert!(starts("a", NOW).await && starts("a", NOW).await);
    for _ in 0..2 {
        store.update_placement(&stopped("a")).await.unwrap();
        assert!(!starts("b", NOW).await);
        store.release_room("a").await.unwrap();
    }
    store.update_placement(&stopped("a")).await.unwrap();
    assert!(starts("b", NOW).await);
    // A server that died held it: that lapses.
    store.update_placement(&PlacementRow { changed_at: NOW + 101, ..stopped("b") }).await.unwrap();
    assert!(starts("a", NOW + 101).await);
}

async fn of_many_requests_with_one_key_one_adds_and_the_others_find_it(at: Place) {
    let store = at.open().await;
    let tries = (0..8).map(|n| {
        let (store, id) = (store.clone(), n.to_string());
        tokio::spawn(async move {
            let stands = KeyRow { request: "hash".into(), sandbox_id: id.clone() };
            let row = place(&id, "one", &id);
            store.place(&row, &Limits::default(), Some(("one k", &stands))).await.unwrap()
        })
    });
    let (mut added, mut known) = (0, HashSet::new());
    for each in tries.collect::<Vec<_>>() {
        match each.await.unwrap() {
            Placed::Added => added += 1,
            Placed::Known(row) => drop(known.insert(row.sandbox_id)),
            Placed::Full(usage) => panic!("{usage:?}"),
        }
    }
    let placed = store.placements_of("one", true, None, 100).await.unwrap();
    assert_eq!((added, placed.len()), (1, 1));
    assert_eq!(known, HashSet::from([placed[0].id.clone()]));
    // What is refused leaves no key behind, and what is gone gives its key up.
    let full = Limits { running: Some(1), ..Limits::default() };
    let other = KeyRow { request: "hash".into(), sandbox_id: "x".into() };
    let refused = store.place(&place("x", "one", "x"), &full, Some(("one l", &other))).await.unwrap();
    assert!(matches!(refused, Placed::Full(_)));
    assert_eq!(store.key("one l").await.unwrap(), None);
    let taken = PlacementRow { name: placed[0].name.clone(), ..place("x", "one", "x") };
    let refused = store.place(&taken, &Limits::default(), Some(("one l", &other))).await;
    assert!(matches!(refused, Err(Error::NameTaken)), "{refused:?}");
    assert_eq!(store.key("one l").await.unwrap(), None);
    let gone = PlacementRow { gone: true, running: false, holds_name: false, ..placed[0].clone() };
    store.update_placement(&gone).await.unwrap();
    let again = store.place(&place("x", "one", "x"), &full, Some(("one k", &other))).await.unwrap();
    assert_eq!(again, Placed::Added);
    assert_eq!(store.key("one k").await.unwrap(), Some(other));
}

async fn of_many_at_once_as_many_fit_as_there_is_room_for(at: Place) {
    let store = at.open().await;
    let three = Limits { running: Some(3), ..Limits::default() };
    let tries = (0..12).map(|n| {
        let store = store.clone();
        let row = place(&n.to_string(), "one", &n.to_string());
        tokio::spawn(async move { store.place(&row, &three, None).await.unwrap() == Placed::Added })
    });
    let mut placed = 0;
    for each in tries.collect::<Vec<_>>() {
        placed += usize::from(each.await.unwrap());
    }
    assert_eq!(placed, 3);
}

async fn a_placement_takes_anothers_name(at: Place) {
    let store = at.open().await;
    let (old, new) = (place("a", "one", "web"), PlacementRow { holds_name: false, ..place("b", "one", "web") });
    store.place(&old, &Limits::default(), None).await.unwrap();
    store.place(&new, &Limits::default(), None).await.unwrap();
    let gone = PlacementRow { holds_name: false, running: false, gone: true, ..old };
    store.replace_placement(&gone, &PlacementRow { holds_name: true, ..new }).await.unwrap();
    assert_eq!(store.placement_named("one", "web").await.unwrap().unwrap().id, "b");
    assert!(store.placement("a").await.unwrap().unwrap().gone);
}

async fn subdomains_lead_to_the_last_who_has_them(at: Place) {
    let store = at.open().await;
    store.place(&place("a", "one", "a"), &Limits::default(), None).await.unwrap();
    store
        .place(&PlacementRow { region: "EU".into(), ..place("b", "one", "b") }, &Limits::default(), None)
        .await
        .unwrap();
    store.set_subdomains("a", &["x".into(), "y".into()]).await.unwrap();
    assert_eq!(store.region_behind("x").await.unwrap().as_deref(), Some("US"));
    store.set_subdomains("b", &["y".into()]).await.unwrap();
    store.set_subdomains("a", &["x".into()]).await.unwrap();
    assert_eq!(store.region_behind("y").await.unwrap().as_deref(), Some("EU"));
    assert_eq!(store.region_behind("z").await.unwrap(), None);
}

async fn what_is_long_gone_is_forgotten(at: Place) {
    let store = at.open().await;
    let gone = |id: &str, at| PlacementRow { holds_name: false, gone: true, changed_at: at, ..place(id, "one", id) };
    store.place(&gone("a", 1), &Limits::default(), None).await.unwrap();
    store.place(&gone("b", 9), &Limits::default(), None).await.unwrap();
    store.place(&place("c", "one", "c"), &Limits::default(), None).await.unwrap();
    store.set_subdomains("a", &["x".into()]).await.unwrap();
    store.forget_placements(5).await.unwrap();
    let left: Vec<_> =
        store.placements_of("one", true, None, 100).await.unwrap().into_iter().map(|row| row.id).collect();
    assert_eq!(left, ["b", "c"]);
    assert_eq!(store.region_behind("x").await.unwrap(), None);
}

fn archive(id: &str) -> ArchiveRow {
    ArchiveRow {
        id: id.into(),
        account: "acme".into(),
        name: None,
        ticket: Some("ticket".into()),
        created_at: 5,
        finalized_at: None,
        content: None,
    }
}

fn content(hash: &str, object: &str) -> ContentRow {
    ContentRow { hash: hash.into(), object: object.into(), size: 7 }
}

async fn one_object_serves_all_with_its_content(place: Place) {
    let store = place.open().await;
    for id in ["a", "b"] {
        store.add_archive(&archive(id)).await.unwrap();
    }
    assert_eq!(store.archive("a").await.unwrap(), Some(archive("a")));
    assert!(!store.finalize_archive("a", None, 9).await.unwrap(), "it has no content");
    assert_eq!(store.unused_archives(6).await.unwrap().len(), 2);
    assert!(store.fill_archive("acme", "a", &content("h1", "o1"), None).await.unwrap().is_empty());
    assert_eq!(store.fill_archive("acme", "a", &content("h2", "o2"), None).await.unwrap(), ["o1"]);
    assert_eq!(store.fill_archive("acme", "b", &content("h2", "o3"), None).await.unwrap(), ["o3"]);
    assert!(store.knows_object("o2").await.unwrap() && !store.knows_object("o1").await.unwrap());
    assert!(store.finalize_archive("a", Some("web"), 9).await.unwrap());
    assert!(!store.finalize_archive("a", None, 10).await.unwrap());
    assert!(matches!(store.fill_archive("acme", "a", &content("h4", "o4"), None).await, Err(Error::Gone)));
    assert!(matches!(store.fill_archive("acme", "c", &content("h4", "o4"), None).await, Err(Error::Gone)));
    assert!(!store.knows_object("o4").await.unwrap());
    let finalized = ArchiveRow {
        name: Some("web".into()),
        finalized_at: Some(9),
        content: Some(content("h2", "o2")),
        ..archive("a")
    };
    assert_eq!(store.archives("acme").await.unwrap(), [finalized]);
    assert!(store.archives("other").await.unwrap().is_empty());
    assert_eq!(store.remove_archive("a").await.unwrap(), None);
    assert_eq!(store.remove_archive("b").await.unwrap(), Some("o2".into()));
    assert_eq!(store.remove_archive("b").await.unwrap(), None);
}

async fn archives_of_an_account_are_no_more_than_it_may_have(place: Place) {
    let store = place.open().await;
    for (id, account) in [("a", "acme"), ("b", "acme"), ("c", "acme"), ("d", "other")] {
        store.add_archive(&ArchiveRow { account: account.into(), ..archive(id) }).await.unwrap();
    }
    let fill = async |account: &str, id: &str, hash: &str, object: &str| {
        store.fill_archive(account, id, &content(hash, object), Some(20)).await
    };
    fill("acme", "a", "h1", "o1").await.unwrap();
    assert_eq!(fill("acme", "b", "h1", "o2").await.unwrap(), ["o2"], "the same content counts once");
    fill("acme", "b", "h2", "o3").await.unwrap();
    assert!(matches!(fill("acme", "c", "h3", "o4").await, Err(Error::Full(14))));
    assert!(!store.knows_object("o4").await.unwrap());
    assert!(matches!(fill("acme", "d", "h3", "o4").await, Err(Error::Gone)), "it is another's");
    fill("other", "d", "h3", "o4").await.unwrap();
    fill("acme", "c", "h2", "o5").await.unwrap();
    store.remove_archive("a").await.unwrap();
    fill("acme", "c", "h3", "o6").await.unwrap();
}

async fn what_was_sent_for_one_deploy_goes_after_its_sandbox(place: Place) {
    let store = place.open().await;
    for (id, name, ticket) in [("sent", None, None), ("named", Some("app"), None), ("asked", None, Some("ticket"))] {
        store.add_archive(&ArchiveRow { ticket: ticket.map(Into::into), ..archive(id) }).await.unwrap();
        store.fill_archive("acme", id, &content("h", id), None).await.unwrap();
        assert!(store.finalize_archive(id, name, 9).await.unwrap());
    }
    let mut listed: Vec<_> = store.archives("acme").await.unwrap().into_iter().map(|row| row.id).collect();
    listed.sort();
    assert_eq!(listed, ["asked", "named"]);
    let made = PlacementRow { archive_id: Some("sent".into()), ..self::place("web", "acme", "web") };
    store.place(&made, &Limits::default(), None).await.unwrap();
    assert!(store.unused_archives(6).await.unwrap().is_empty());
    store.update_placement(&PlacementRow { holds_name: false, gone: true, ..made }).await.unwrap();
    assert!(store.unused_archives(5).await.unwrap().is_empty(), "it has just been sent");
    assert_eq!(store.unused_archives(6).await.unwrap(), ["sent"]);
}

async fn a_content_that_comes_as_it_is_given_up_is_not_lost(place: Place) {
    let store = place.open().await;
    for round in 0..30 {
        let (old, new) = (format!("old{round}"), format!("new{round}"));
        store.add_archive(&archive(&old)).await.unwrap();
        store.add_archive(&archive(&new)).await.unwrap();
        store.fill_archive("acme", &old, &content("h", &old), None).await.unwrap();
        let filled = content("h", &new);
        let (removed, free) = tokio::join!(store.remove_archive(&old), store.fill_archive("acme", &new, &filled, None));
        let mut gone = free.unwrap();
        gone.extend(removed.unwrap());
        let kept = store.archive(&new).await.unwrap().unwrap().content.unwrap().object;
        assert_eq!(gone.len(), 1);
        assert_ne!(gone[0], kept, "round {round}");
        store.remove_archive(&new).await.unwrap();
    }
}

async fn a_store_has_an_id_of_its_own(place: Place) {
    let (one, other) = (place.open().await, place.open().await);
    let (id, same) = tokio::join!(one.id(), other.id());
    assert_eq!(id.as_ref().unwrap(), &same.unwrap());
    assert_eq!(place.open().await.id().await.unwrap(), id.unwrap());
    assert_ne!(Place::sqlite().open().await.id().await.unwrap(), one.id().await.unwrap());
}
