//! Other sizes, and disks to go back to.

use std::fs;

use heyvm_api::{ApiError, ErrorCode, sandbox::*};
use heyvm_control_plane::Who;
use heyvm_test_services::hostile_agent::Misbehaviour;

use crate::daemon::{Daemon, eventually, sink};

fn resize(daemon: &Daemon, request: ResizeRequest) -> Result<SandboxInfo, ApiError> {
    daemon.run(daemon.plane().resize(&Who::owners("web"), &request, sink()))
}

fn class(name: &str) -> ResizeRequest {
    ResizeRequest { size_class: Some(name.into()), ..Default::default() }
}

fn disk(gb: i64) -> ResizeRequest {
    ResizeRequest { disk_size_gb: Some(gb), ..Default::default() }
}

fn counting(daemon: &Daemon) -> CreateRequest {
    let start_command = Some("echo started >> starts; exec sleep 600".into());
    CreateRequest { start_command, size_class: Some("micro".into()), ..daemon.request("web") }
}

fn starts(daemon: &Daemon) -> usize {
    fs::read_to_string(daemon.home().join("work/web/starts")).unwrap().lines().count()
}

#[test]
fn another_class_starts_what_runs_again_and_leaves_the_rest() {
    let daemon = Daemon::new();
    daemon.create(counting(&daemon)).unwrap();
    let resized = resize(&daemon, class("medium")).unwrap();
    assert_eq!((resized.status, resized.size_class), (Status::Running, SizeClass::Medium));
    assert_eq!(daemon.machines.sizes.lock().unwrap().0, SizeClass::Medium.memory_mib());
    assert_eq!(starts(&daemon), 2);
    resize(&daemon, class("medium")).unwrap();
    assert_eq!(starts(&daemon), 2, "it has that class already");
    daemon.run(daemon.plane().stop(&Who::owners("web"))).unwrap();
    assert_eq!(resize(&daemon, class("large")).unwrap().status, Status::Stopped);
    daemon.run(daemon.plane().start(&Who::owners("web"), sink())).unwrap();
    assert_eq!(daemon.machines.sizes.lock().unwrap().0, SizeClass::Large.memory_mib());
}

#[test]
fn a_disk_grows_without_a_restart_and_never_shrinks() {
    let mut daemon = Daemon::new();
    daemon.create(counting(&daemon)).unwrap();
    assert_eq!(resize(&daemon, disk(20)).unwrap().disk_size_gb, 20);
    assert_eq!(resize(&daemon, disk(20)).unwrap().disk_size_gb, 20);
    assert_eq!(resize(&daemon, disk(19)).unwrap_err().code, ErrorCode::InvalidState);
    assert_eq!(starts(&daemon), 1);
    daemon.die();
    daemon.revive();
    assert_eq!(daemon.get("web").disk_size_gb, 20);
    daemon.run(daemon.plane().restart(&Who::owners("web"), sink())).unwrap();
    assert_eq!(daemon.machines.sizes.lock().unwrap().1, 20);
}

#[test]
fn what_is_no_size_is_refused() {
    let daemon = Daemon::new();
    daemon.create(counting(&daemon)).unwrap();
    let both = ResizeRequest { size_class: Some("micro".into()), disk_size_gb: Some(20) };
    for (request, code) in [
        (both, ErrorCode::InvalidArgument),
        (ResizeRequest::default(), ErrorCode::InvalidArgument),
        (class("giant"), ErrorCode::UnknownSizeClass),
        (disk(251), ErrorCode::InvalidArgument),
        (disk(0), ErrorCode::InvalidArgument),
    ] {
        assert_eq!(resize(&daemon, request.clone()).unwrap_err().code, code, "{request:?}");
    }
    daemon.run(daemon.plane().remove(&Who::owners("web"))).unwrap();
    assert_eq!(resize(&daemon, disk(20)).unwrap_err().code, ErrorCode::InvalidState);
}

#[test]
fn a_disk_comes_back_as_it_was_kept() {
    let mut daemon = Daemon::new();
    let made = daemon.create(counting(&daemon)).unwrap();
    let who = Who::owners("web");
    let restore = |daemon: &Daemon| daemon.run(daemon.plane().restore(&who, sink()));
    assert_eq!(restore(&daemon).unwrap_err().code, ErrorCode::InvalidState);
    assert_eq!(daemon.get("web").status, Status::Running, "what cannot be gone back to changes nothing");
    let file = daemon.machines.disk(&made.id).join("data");
    fs::write(&file, "kept").unwrap();
    assert!(daemon.run(daemon.plane().checkpoint(&who)).unwrap().checkpoint_at.is_some());
    fs::write(&file, "changed").unwrap();
    daemon.die();
    daemon.revive();
    let restored = restore(&daemon).unwrap();
    assert_eq!((restored.status, fs::read_to_string(&file).unwrap().as_str()), (Status::Running, "kept"));
    assert_eq!(starts(&daemon), 2);
    daemon.run(daemon.plane().stop(&who)).unwrap();
    fs::write(&file, "newer").unwrap();
    daemon.run(daemon.plane().checkpoint(&who)).unwrap();
    fs::remove_file(&file).unwrap();
    assert_eq!(restore(&daemon).unwrap().status, Status::Running);
    assert_eq!(fs::read_to_string(&file).unwrap(), "newer");
}

#[test]
fn full_disk_is_said_of_one_that_is_looked_at_until_it_is_larger() {
    let daemon = Daemon::new();
    let made = daemon.create(counting(&daemon)).unwrap();
    daemon.machines.possess(&made.id, Misbehaviour::FullDisk);
    let listed = |daemon: &Daemon| daemon.list(ListFilter::Living).remove(0).warnings;
    assert!(listed(&daemon).is_empty(), "a list asks no agent");
    // The connection to its former agent may break only at the first look.
    let warnings = eventually("its disk is full", || match daemon.get("web").warnings {
        none if none.is_empty() => Err("no warning".into()),
        warnings => Ok(warnings),
    });
    assert!(warnings.len() == 1 && warnings[0].contains("heyvm resize web"), "{warnings:?}");
    assert_eq!(listed(&daemon), warnings, "what is known costs nothing");
    assert!(resize(&daemon, disk(40)).unwrap().warnings.is_empty());

    assert_eq!(daemon.get("web").warnings, warnings);
    let stopped = daemon.run(daemon.plane().stop(&Who::owners("web"))).unwrap();
    assert_eq!(stopped.warnings, warnings, "it stays full");
    let started = daemon.run(daemon.plane().start(&Who::owners("web"), sink())).unwrap();
    assert!(started.warnings.is_empty(), "its agent says otherwise: {:?}", started.warnings);
}
