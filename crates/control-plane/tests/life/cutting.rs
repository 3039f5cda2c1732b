//! `stop` and `rm` while hooks run: they end at once, and say which step they cut short.

use std::time::{Duration, Instant};

use heyvm_api::{ErrorCode, sandbox::*};
use heyvm_control_plane::{Asked, Who};

use crate::daemon::{Daemon, eventually, sink};

/// Far longer than any test waits.
const LONG: &str = "touch began; sleep 3600";

fn in_a_hook(daemon: &Daemon) -> tokio::task::JoinHandle<Result<SandboxInfo, heyvm_api::ApiError>> {
    let request = CreateRequest { setup_hooks: vec!["true".into(), LONG.into()], ..daemon.request("web") };
    let plane = daemon.plane().clone();
    let call = daemon.spawn(async move { plane.create(request, Asked::default(), sink()).await });
    let began = daemon.home().join("work/web/began");
    eventually("the hook runs", || if began.exists() { Ok(()) } else { Err(String::new()) });
    call
}

#[test]
fn the_step_is_named_while_it_runs() {
    let daemon = Daemon::new();
    let call = in_a_hook(&daemon);
    let info = daemon.get("web");
    assert_eq!((info.status, info.step.unwrap()), (Status::Provisioning, format!("setup_hook: {LONG}")));
    assert!(daemon.list(ListFilter::Living)[0].step.is_some());
    daemon.run(daemon.plane().remove(&Who::owners("web"))).unwrap();
    drop(daemon.run(call));
    assert_eq!(daemon.get("web").step, None);
}

#[test]
fn a_stop_ends_the_hooks_at_once_and_keeps_the_disk() {
    let daemon = Daemon::new();
    let (call, began) = (in_a_hook(&daemon), Instant::now());
    let stopped = daemon.run(daemon.plane().stop(&Who::owners("web"))).unwrap();
    assert!(began.elapsed() < Duration::from_secs(600));
    let reason = stopped.reason.unwrap();
    assert_eq!((stopped.status, reason.code), (Status::Stopped, ReasonCode::Stopped));
    assert!(reason.message.contains("setup_hook") && reason.message.contains("sleep 3600"), "{}", reason.message);
    assert!(daemon.machines.running().is_empty());
    assert_eq!(daemon.machines.disks(), std::slice::from_ref(&stopped.id));
    let told = daemon.run(call).unwrap().unwrap_err();
    assert_eq!((told.code, told.sandbox_id), (ErrorCode::InvalidState, Some(stopped.id)));
    assert!(told.hint.unwrap().contains("heyvm start"));
    let started = daemon.run(daemon.plane().start(&Who::owners("web"), sink())).unwrap();
    assert!(started.warnings.iter().any(|warning| warning.contains("hooks")), "{:?}", started.warnings);
}

#[test]
fn a_removal_ends_the_hooks_at_once_and_says_so() {
    let daemon = Daemon::new();
    let call = in_a_hook(&daemon);
    let removed = daemon.run(daemon.plane().remove(&Who::owners("web"))).unwrap();
    let reason = removed.reason.unwrap();
    assert_eq!((removed.status, reason.code), (Status::Removed, ReasonCode::Removed));
    assert!(reason.message.contains("setup_hook"), "{}", reason.message);
    let told = daemon.run(call).unwrap().unwrap_err();
    assert!(!told.hint.unwrap().contains("ttl"), "no time ran out");
    assert!(daemon.machines.disks().is_empty());
}

#[test]
fn a_stop_ends_a_start_that_waits() {
    let daemon = Daemon::new();
    let port = crate::daemon::free_port();
    let command = format!("test -e once && exec sleep 3600; touch once; {}", crate::daemon::server(port, "up"));
    let request = CreateRequest {
        start_command: Some(command.into()),
        open_ports: vec![i64::from(port)],
        health_timeout_seconds: Some(3600.0),
        ..daemon.request("web")
    };
    let made = daemon.create(request).unwrap();
    daemon.run(daemon.plane().stop(&Who::owners("web"))).unwrap();
    let plane = daemon.plane().clone();
    let call = daemon.spawn(async move { plane.start(&Who::owners("web"), sink()).await });
    eventually("it waits for its port", || match daemon.get("web").step {
        Some(step) if step.starts_with("start_command") => Ok(()),
        other => Err(format!("{other:?}")),
    });
    let stopped = daemon.run(daemon.plane().stop(&Who::owners("web"))).unwrap();
    assert_eq!((stopped.status, daemon.machines.disks()), (Status::Stopped, vec![made.id]));
    assert_eq!(daemon.run(call).unwrap().unwrap_err().code, ErrorCode::InvalidState);
    assert!(daemon.machines.running().is_empty());
}

#[test]
fn a_removal_counts_more_than_a_stop() {
    let daemon = Daemon::new();
    let call = in_a_hook(&daemon);
    *daemon.machines.tenacity.lock().unwrap() = Duration::from_millis(300);
    let plane = daemon.plane().clone();
    let stop = daemon.spawn(async move { plane.stop(&Who::owners("web")).await });
    daemon.run(daemon.plane().remove(&Who::owners("web"))).unwrap();
    drop((daemon.run(stop), daemon.run(call)));
    assert_eq!(daemon.get("web").status, Status::Removed);
    assert!(daemon.machines.disks().is_empty());
}
