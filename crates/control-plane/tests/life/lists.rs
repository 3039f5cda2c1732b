//! Lists, their pages, and what has changed since.

use heyvm_api::sandbox::*;
use heyvm_control_plane::{ListQuery, Revision, Who};

use crate::daemon::Daemon;

/// Names and cursors of what is asked for, and the revision to go on from.
fn list(daemon: &Daemon, query: &ListQuery) -> (Vec<(String, String)>, Revision) {
    let listing = daemon.plane().list_pages(query).unwrap();
    let entries = listing.sandboxes(daemon.plane()).map(|(cursor, info)| (info.name, cursor)).collect();
    (entries, listing.revision)
}

fn names(entries: &[(String, String)]) -> Vec<&str> {
    entries.iter().map(|(name, _)| name.as_str()).collect()
}

#[test]
fn every_cursor_leads_to_the_rest_of_the_list() {
    let daemon = Daemon::new();
    for name in ["a", "b", "c"] {
        daemon.create(daemon.request(name)).unwrap();
    }
    let (all, _) = list(&daemon, &ListQuery::default());
    assert_eq!(names(&all), ["c", "b", "a"]);
    for (number, (_, cursor)) in all.iter().enumerate() {
        let (rest, _) = list(&daemon, &ListQuery { after: Some(cursor.clone()), ..ListQuery::default() });
        assert_eq!(rest, all[number + 1..]);
    }
    let ids = Some(vec![daemon.get("b").id, "unknown".into()]);
    assert_eq!(names(&list(&daemon, &ListQuery { ids, ..ListQuery::default() }).0), ["b"]);
    assert!(daemon.plane().list_pages(&ListQuery { after: Some("x".into()), ..ListQuery::default() }).is_err());
}

#[test]
fn changes_alone_are_listed_in_their_order() {
    let mut daemon = Daemon::new();
    for name in ["a", "b", "c"] {
        daemon.create(daemon.request(name)).unwrap();
    }
    let since = |since| ListQuery { filter: ListFilter::All, since: Some(since), ..ListQuery::default() };
    let (_, before) = list(&daemon, &ListQuery::default());
    assert!(list(&daemon, &since(before)).0.is_empty());
    daemon.run(daemon.plane().stop(&Who::owners("b"))).unwrap();
    daemon.run(daemon.plane().bind(&Who::owners("a"), BindRequest { port: 80, is_public: None })).unwrap();
    let (changed, now) = list(&daemon, &since(before));
    assert_eq!(names(&changed), ["b", "a"]);
    // The cursor of one is where the next ones begin.
    assert_eq!(names(&list(&daemon, &since(changed[0].1.parse().unwrap())).0), ["a"]);
    assert!(list(&daemon, &since(now)).0.is_empty());
    // Another run of the daemon knows nothing of that: everything is new.
    daemon.die();
    daemon.revive();
    assert_eq!(list(&daemon, &since(now)).0.len(), 3);
}

#[test]
fn removed_sandboxes_keep_neither_environment_nor_hooks() {
    let daemon = Daemon::new();
    let env_vars = [("TOKEN".to_owned(), "secret".to_owned())].into();
    daemon.create(CreateRequest { env_vars, setup_hooks: vec!["true".into()], ..daemon.request("web") }).unwrap();
    assert_eq!(daemon.get("web").env_vars["TOKEN"], "secret");
    let removed = daemon.run(daemon.plane().remove(&Who::owners("web"))).unwrap();
    assert!(removed.env_vars.is_empty() && removed.setup_hooks.is_empty());
    let failed = CreateRequest {
        env_vars: [("TOKEN".to_owned(), "secret".to_owned())].into(),
        setup_hooks: vec!["exit 1".into()],
        ..daemon.request("fails")
    };
    daemon.create(failed).unwrap_err();
    let (all, _) = list(&daemon, &ListQuery { filter: ListFilter::All, ..ListQuery::default() });
    assert_eq!(all.len(), 2);
    assert!(daemon.get("fails").env_vars.is_empty());
}
