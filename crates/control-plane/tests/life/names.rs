//! Who a name means, and who may have it.

use heyvm_api::{ErrorCode, sandbox::*};
use heyvm_control_plane::{Asked, Who};

use crate::daemon::{Daemon, sink};

#[test]
fn of_many_at_once_one_gets_the_name() {
    let daemon = Daemon::new();
    let tries: Vec<_> = (0..12)
        .map(|_| {
            let (plane, request) = (daemon.plane().clone(), daemon.request("web"));
            daemon.spawn(async move { plane.create(request, Asked::default(), sink()).await })
        })
        .collect();
    let outcomes: Vec<_> = tries.into_iter().map(|each| daemon.run(each).unwrap()).collect();
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    for refused in outcomes.into_iter().filter_map(Result::err) {
        assert_eq!(refused.code, ErrorCode::NameTaken);
        assert!(refused.hint.is_some());
    }
    assert_eq!(daemon.list(ListFilter::All).len(), 1);
    assert_eq!(daemon.machines.disks().len(), 1);
}

#[test]
fn a_name_means_the_living_one_else_the_newest() {
    let daemon = Daemon::new();
    let first = daemon.create(daemon.request("web")).unwrap();
    daemon.run(daemon.plane().stop(&Who::owners("web"))).unwrap();
    let second = daemon.create(daemon.request("web")).unwrap();
    assert_eq!(daemon.get("web").id, second.id);
    assert_eq!(daemon.get(&first.id).id, first.id);
    let taken = daemon.run(daemon.plane().start(&Who::owners(&first.id), sink())).unwrap_err();
    assert_eq!(taken.code, ErrorCode::NameTaken);
    assert_eq!(daemon.get(&first.id).status, Status::Stopped, "a refusal changes nothing");
    daemon.run(daemon.plane().stop(&Who::owners("web"))).unwrap();
    assert_eq!(daemon.get("web").id, second.id, "the newest of the stopped ones");
    daemon.run(daemon.plane().remove(&Who::owners("web"))).unwrap();
    assert_eq!(daemon.get("web").id, first.id, "a stopped one before a removed one");
    let unknown = daemon.run(daemon.plane().get(&Who::owners("nobody"))).unwrap_err();
    assert_eq!(unknown.code, ErrorCode::SandboxNotFound);
    assert!(unknown.hint.is_some());
}

#[test]
fn a_slug_that_nobody_asked_for_gives_way() {
    let daemon = Daemon::new();
    let first = daemon.create(daemon.request("my.app")).unwrap();
    let second = daemon.create(daemon.request("my-app")).unwrap();
    assert_eq!(first.slug, "my-app");
    assert_ne!(second.slug, first.slug);
    assert_eq!(daemon.get(&second.slug).id, second.id);
    let asked = CreateRequest { slug: Some("my-app".into()), ..daemon.request("other") };
    assert_eq!(daemon.create(asked).unwrap_err().code, ErrorCode::NameTaken);
}

#[test]
fn made_up_names_differ() {
    let daemon = Daemon::new();
    let unnamed = || CreateRequest { name: None, ..daemon.request("x") };
    let (one, other) = (daemon.create(unnamed()).unwrap(), daemon.create(unnamed()).unwrap());
    assert_ne!(one.name, other.name);
}

#[test]
fn an_id_may_be_short_where_it_is_the_only_one() {
    let daemon = Daemon::new();
    let made = daemon.create(daemon.request("web")).unwrap();
    assert_eq!(daemon.get(&made.id[..8]).id, made.id);
    let short = made.id[..12].to_owned();
    assert_eq!(daemon.run(daemon.plane().stop(&Who::owners(&short))).unwrap().id, made.id);
    assert!(daemon.run(daemon.plane().get(&Who::owners(&made.id[..7]))).is_err());
    let namesake = daemon.create(daemon.request(&made.id[..8])).unwrap();
    assert_eq!(daemon.get(&made.id[..8]).id, namesake.id, "a name counts first");
}

#[test]
fn another_sandboxs_id_is_no_name() {
    let daemon = Daemon::new();
    let made = daemon.create(daemon.request("web")).unwrap();
    let refused = daemon.create(daemon.request(&made.id)).unwrap_err();
    assert_eq!((refused.code, refused.sandbox_id.as_ref()), (ErrorCode::NameTaken, Some(&made.id)));
    let slug = CreateRequest { slug: Some(made.id.clone()), ..daemon.request("other") };
    assert_eq!(daemon.create(slug).unwrap_err().code, ErrorCode::NameTaken);
    assert_eq!(daemon.list(ListFilter::All).len(), 1);
}
