//! Accounts beside each other: each has names, keys and sandboxes of its own, and nothing of another's.

use heyvm_api::{ApiError, ErrorCode, sandbox::*};
use heyvm_control_plane::{Account, Asked, LogQuery, Who};

use crate::daemon::{Daemon, free_port, server, sink};

fn account(id: &str) -> Account {
    Account::of_cloud(id).unwrap()
}

fn of(id: &str) -> Asked {
    Asked { account: account(id), ..Asked::default() }
}

fn who(id: &str, sandbox: &str) -> Who {
    Who { account: account(id), sandbox: sandbox.into() }
}

fn create(daemon: &Daemon, request: CreateRequest, asked: Asked) -> Result<SandboxInfo, ApiError> {
    daemon.run(daemon.plane().create(request, asked, sink()))
}

#[test]
fn names_are_an_accounts_own_and_ids_are_no_way_in() {
    let daemon = Daemon::new();
    let mine = daemon.create(daemon.request("web")).unwrap();
    let theirs = create(&daemon, daemon.request("web"), of("acme")).unwrap();
    assert_eq!((mine.account_id, theirs.account_id.as_deref()), (None, Some("acme")));
    assert_eq!(theirs.slug, "web");
    assert_eq!(create(&daemon, daemon.request("web"), of("acme")).unwrap_err().code, ErrorCode::NameTaken);

    let get = |who: &Who| daemon.run(daemon.plane().get(who));
    assert_eq!(get(&who("acme", "web")).unwrap().id, theirs.id);
    assert_eq!(get(&Who::owners("web")).unwrap().id, mine.id);
    for stranger in [who("other", &theirs.id), Who::owners(&theirs.id), who("acme", &mine.id)] {
        let plane = daemon.plane();
        let refused = [
            get(&stranger).map(drop),
            daemon.run(plane.stop(&stranger)).map(drop),
            daemon.run(plane.start(&stranger, sink())).map(drop),
            daemon.run(plane.remove(&stranger)).map(drop),
            daemon.run(plane.set_ttl(&stranger, Some(1))).map(drop),
            daemon.run(plane.agent(&stranger)).map(drop),
            daemon.run(plane.endpoints(&stranger)).map(drop),
            daemon.run(plane.logs(&stranger, LogQuery::default())).map(drop),
        ];
        for (number, outcome) in refused.into_iter().enumerate() {
            assert_eq!(outcome.unwrap_err().code, ErrorCode::Forbidden, "{number} {stranger:?}");
        }
    }
    assert_eq!(get(&who("other", "web")).unwrap_err().code, ErrorCode::SandboxNotFound);

    let list = |of: Option<&Account>| daemon.run(daemon.plane().list(ListFilter::All, of)).unwrap();
    let ids = |list: Vec<SandboxInfo>| list.into_iter().map(|info| info.id).collect::<Vec<_>>();
    assert_eq!(ids(list(Some(&account("acme")))), [theirs.id.as_str()]);
    assert_eq!(ids(list(Some(&Account::owner()))), [mine.id.as_str()]);
    assert_eq!(ids(list(None)), [theirs.id, mine.id]);
    assert!(list(Some(&account("other"))).is_empty());
}

#[test]
fn a_replacement_takes_the_place_of_ones_own() {
    let daemon = Daemon::new();
    let mine = daemon.create(daemon.request("web")).unwrap();
    let request = CreateRequest { replace: true, ..daemon.request("web") };
    let theirs = create(&daemon, request.clone(), of("acme")).unwrap();
    assert_eq!(daemon.get(&mine.id).status, Status::Running);
    let newer = create(&daemon, request, of("acme")).unwrap();
    assert_ne!(newer.id, theirs.id);
    assert_eq!(daemon.get(&mine.id).status, Status::Running);
}

#[test]
fn keys_are_an_accounts_own() {
    let daemon = Daemon::new();
    let keyed = |account: Account| Asked { account, idempotency_key: Some("k".into()), sandbox_id: None };
    let mine = create(&daemon, daemon.request("web"), keyed(Account::owner())).unwrap();
    let theirs = create(&daemon, daemon.request("web"), keyed(account("acme"))).unwrap();
    assert_ne!(mine.id, theirs.id);
    assert_eq!(create(&daemon, daemon.request("web"), keyed(account("acme"))).unwrap().id, theirs.id);
}

#[test]
fn an_id_that_was_chosen_gives_the_same_sandbox_again() {
    let mut daemon = Daemon::new();
    let id = uuid::Uuid::new_v4();
    let chosen = || Asked { sandbox_id: Some(id), ..of("acme") };
    let made = create(&daemon, daemon.request("web"), chosen()).unwrap();
    assert_eq!(made.id, id.to_string());
    daemon.die();
    daemon.revive();
    assert_eq!(create(&daemon, daemon.request("web"), chosen()).unwrap().id, made.id);
    let other = create(&daemon, daemon.request("other"), chosen()).unwrap_err();
    let stranger = Asked { account: account("other"), ..chosen() };
    let strangers = create(&daemon, daemon.request("web"), stranger).unwrap_err();
    assert_eq!([other.code, strangers.code], [ErrorCode::IdempotencyKeyReused; 2]);
    daemon.run(daemon.plane().remove(&who("acme", "web"))).unwrap();
    let gone = create(&daemon, daemon.request("web"), chosen()).unwrap();
    assert_eq!((gone.id, gone.status), (made.id, Status::Removed));
}

#[test]
fn private_ports_are_for_accounts_and_stay_private() {
    let daemon = Daemon::new();
    let port = free_port();
    let version = |is_public| CreateRequest {
        start_command: Some(server(port, "hello").into()),
        open_ports: vec![i64::from(port)],
        is_public,
        replace: true,
        ..daemon.request("web")
    };
    assert_eq!(daemon.create(version(Some(false))).unwrap_err().code, ErrorCode::Unsupported);
    let made = create(&daemon, version(Some(false)), of("acme")).unwrap();
    let route = daemon.plane().route(&made.urls[0].subdomain).unwrap();
    let expected = RouteInfo {
        sandbox_id: made.id,
        port,
        is_public: false,
        account_id: "acme".into(),
        response_timeout_seconds: None,
    };
    assert_eq!(route, expected);

    let bind = |is_public| {
        let request = BindRequest { port: i64::from(port), is_public };
        daemon.run(daemon.plane().bind(&who("acme", "web"), request)).unwrap().endpoint
    };
    assert!(!bind(None).is_public && bind(Some(true)).is_public && bind(None).is_public);
    let private = bind(Some(false));
    assert_eq!((private.is_public, &private.url), (false, &made.urls[0].url));
    assert!(daemon.plane().route("nobody").is_err());
}

#[test]
fn a_new_version_keeps_a_private_port_private_unless_told_otherwise() {
    let daemon = Daemon::new();
    // The old version and the new one share this machine's ports: neither listens on this one.
    let version = |is_public| CreateRequest { open_ports: vec![80], is_public, replace: true, ..daemon.request("web") };
    let first = create(&daemon, version(Some(false)), of("acme")).unwrap();
    let second = create(&daemon, version(None), of("acme")).unwrap();
    assert_eq!(second.urls, first.urls);
    assert!(!second.urls[0].is_public);
    let third = create(&daemon, version(Some(true)), of("acme")).unwrap();
    assert!(third.urls[0].is_public && third.urls[0].url == first.urls[0].url);
}

#[test]
fn the_machine_is_its_owners() {
    let daemon = Daemon::new();
    let mount = Mount { host_path: "/etc".into(), sandbox_path: "/x".into(), read_only: true };
    let request = CreateRequest { mounts: vec![mount], ..daemon.request("web") };
    assert_eq!(create(&daemon, request, of("acme")).unwrap_err().code, ErrorCode::Forbidden);
}
