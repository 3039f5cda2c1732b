//! A new version takes the place of the old one, or changes nothing.

use heyvm_api::{ErrorCode, sandbox::*};
use heyvm_control_plane::{Asked, Who};

use crate::{
    daemon::{Daemon, eventually, free_port, server, sink},
    ports::ask,
};

fn version(daemon: &Daemon, port: u16, word: &str) -> CreateRequest {
    CreateRequest {
        start_command: Some(server(port, word).into()),
        open_ports: vec![i64::from(port)],
        health_path: Some("/".into()),
        replace: true,
        ..daemon.request("shop")
    }
}

#[test]
fn the_new_one_has_name_slug_and_urls() {
    // Both versions listen on the host's own loopback here, so each has its own port; the first also binds the second's.
    let daemon = Daemon::new();
    let (first_port, second_port) = (free_port(), free_port());
    let old = daemon.create(version(&daemon, first_port, "one")).unwrap();
    let shared = daemon
        .run(daemon.plane().bind(&Who::owners("shop"), BindRequest { port: i64::from(second_port), is_public: None }))
        .unwrap();
    let new = daemon.create(version(&daemon, second_port, "two")).unwrap();
    assert_ne!(new.id, old.id);
    assert_eq!((new.name, new.slug), (old.name, old.slug));
    assert_eq!(new.urls, std::slice::from_ref(&shared.endpoint), "equal ports keep their URLs, others go");
    assert_eq!(ask(&daemon, &shared.endpoint.subdomain).unwrap(), "two");
    let gone = daemon.becomes(&old.id, Status::Removed);
    assert_eq!(gone.reason.unwrap().code, ReasonCode::Replaced);
    assert_eq!(daemon.machines.disks(), [new.id], "removed means that everything is gone");
    assert_eq!(daemon.list(ListFilter::Living).len(), 1);
}

#[test]
fn one_that_fails_changes_nothing() {
    let daemon = Daemon::new();
    let port = free_port();
    let old = daemon.create(version(&daemon, port, "good")).unwrap();
    // On a port of its own: both listen on the host's loopback here, and the old one's would count as open.
    let failing =
        CreateRequest { start_command: Some("exit 1".into()), health_path: None, ..version(&daemon, free_port(), "") };
    assert_eq!(daemon.create(failing).unwrap_err().code, ErrorCode::StartCommandFailed);
    assert_eq!(daemon.get("shop").id, old.id);
    assert_eq!(ask(&daemon, &old.urls[0].subdomain).unwrap(), "good");
    assert_eq!(daemon.machines.disks(), [old.id]);
}

#[test]
fn while_it_is_built_the_name_means_the_old_one() {
    let mut daemon = Daemon::new();
    let port = free_port();
    let old = daemon.create(version(&daemon, port, "old")).unwrap();
    let slow = CreateRequest { setup_hooks: vec!["sleep 60".into()], ..version(&daemon, free_port(), "new") };
    let plane = daemon.plane().clone();
    let call = daemon.spawn(async move { plane.create(slow, Asked::default(), sink()).await });
    eventually("it has begun", || if daemon.machines.running().len() == 2 { Ok(()) } else { Err(String::new()) });
    assert_eq!(daemon.get("shop").id, old.id);
    assert_eq!(daemon.list(ListFilter::Living).len(), 1);
    daemon.die();
    drop(call);
    daemon.revive();
    assert_eq!(daemon.get("shop").id, old.id);
    assert_eq!(daemon.machines.disks(), [old.id]);
}
