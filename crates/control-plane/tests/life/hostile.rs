//! A guest whose root has replaced the agent: no call to it wedges the sandbox, and nothing that ends one needs it.

use std::time::Duration;

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use futures::StreamExt;
use heyvm_api::sandbox::*;
use heyvm_control_plane::{Account, Who};
use heyvm_test_services::hostile_agent::{MISBEHAVIOURS, Misbehaviour};

use crate::daemon::{Daemon, sink};

fn followed(daemon: &Daemon, name: &str) -> CreateRequest {
    CreateRequest { start_command: Some("exec sleep 600".into()), ..daemon.request(name) }
}

#[test]
fn stop_start_and_removal_need_no_agent() {
    let daemon = Daemon::new();
    let made = daemon.create(followed(&daemon, "web")).unwrap();
    for how in MISBEHAVIOURS {
        daemon.machines.possess(&made.id, how);
        // Long enough for its start command to be asked after.
        std::thread::sleep(Duration::from_secs(1));
        assert_eq!(daemon.get("web").status, Status::Running, "{how:?}");
        let stopped = daemon.run(daemon.plane().stop(&Who::owners("web"))).unwrap();
        assert_eq!((stopped.status, stopped.reason.unwrap().code), (Status::Stopped, ReasonCode::Stopped), "{how:?}");
        daemon.run(daemon.plane().start(&Who::owners("web"), sink())).unwrap();
    }
    daemon.machines.possess(&made.id, Misbehaviour::InvalidDetails);
    let removed = daemon.run(daemon.plane().remove(&Who::owners("web"))).unwrap();
    assert_eq!(removed.status, Status::Removed);
}

#[test]
fn time_to_live_needs_no_agent() {
    let daemon = Daemon::new();
    for how in MISBEHAVIOURS {
        let request = followed(&daemon, &format!("{how:?}").to_lowercase());
        let made = daemon.create(CreateRequest { ttl_seconds: Some(5), ..request }).unwrap();
        daemon.machines.possess(&made.id, how);
        let reason = daemon.becomes(&made.id, Status::Removed).reason.unwrap();
        assert_eq!(reason.code, ReasonCode::TtlExpired, "{how:?}");
    }
}

#[test]
fn adoption_survives_a_hostile_agent() {
    let mut daemon = Daemon::new();
    let ids: Vec<_> = MISBEHAVIOURS
        .iter()
        .map(|how| (daemon.create(followed(&daemon, &format!("{how:?}").to_lowercase())).unwrap().id, *how))
        .collect();
    daemon.die();
    for (id, how) in &ids {
        daemon.machines.possess(id, *how);
    }
    daemon.revive();
    for (id, how) in &ids {
        daemon.becomes(id, Status::Running);
        let removed = daemon.run(daemon.plane().remove(&Who::owners(id))).unwrap();
        assert_eq!(removed.status, Status::Removed, "{how:?}");
    }
}

#[test]
fn removal_ends_a_transition_that_waits_for_a_silent_agent() {
    let daemon = Daemon::new();
    let made = daemon.create(followed(&daemon, "web")).unwrap();
    let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o644);
    builder.append_data(&mut header, "greeting", &b"hello"[..]).unwrap();
    let archive = builder.into_inner().unwrap().finish().unwrap();
    let body = futures::stream::iter(vec![Ok(Bytes::from(archive))]).boxed();
    let archive_id = daemon.run(daemon.plane().put_archive(&Account::owner(), None, body)).unwrap().archive_id;
    daemon.machines.possess(&made.id, Misbehaviour::Silence);
    let plane = daemon.plane().clone();
    let request = ReplaceMountRequest { archive_id, sandbox_path: None, archive_root: None };
    let replacing = daemon.spawn(async move { plane.replace_mount(&Who::owners("web"), request).await });
    // It holds the lock once its call is on the way; either order must come to an end.
    std::thread::sleep(Duration::from_secs(1));
    let removed = daemon.run(daemon.plane().remove(&Who::owners(&made.id))).unwrap();
    assert_eq!(removed.status, Status::Removed);
    assert!(daemon.run(replacing).unwrap().is_err());
    assert!(daemon.machines.disks().is_empty());
}
