//! The steps of a create, each of which may fail; requests that are sent twice or given up.

use std::{sync::atomic::Ordering, time::Duration};

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use futures::StreamExt;
use heyvm_api::{ErrorCode, sandbox::*};
use heyvm_control_plane::{Account, Asked, Who};

use crate::daemon::{Daemon, eventually, free_port, keyed, server, sink};

#[test]
fn an_archive_is_unpacked_hooks_run_and_the_app_serves() {
    let daemon = Daemon::new();
    let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o644);
    builder.append_data(&mut header, "greeting", &b"hello"[..]).unwrap();
    let archive = builder.into_inner().unwrap().finish().unwrap();
    let body = futures::stream::iter(vec![Ok(Bytes::from(archive))]).boxed();
    let archive = daemon.run(daemon.plane().put_archive(&Account::owner(), None, body)).unwrap();
    assert!(archive.archive_id.starts_with("ar-"));

    let port = free_port();
    let request = CreateRequest {
        archive_id: Some(archive.archive_id.clone()),
        setup_hooks: vec!["cat greeting > said; echo $WHO >> said".into(), "test -s said".into()],
        env_vars: [("WHO".to_owned(), "you".to_owned())].into(),
        start_command: Some(server(port, "up").into()),
        open_ports: vec![i64::from(port)],
        health_path: Some("/health".into()),
        ..daemon.request("web")
    };
    let made = daemon.create(request.clone()).unwrap();
    assert_eq!((made.status, made.is_deployed, made.archive_id), (Status::Running, true, Some(archive.archive_id)));
    assert_eq!(made.urls.len(), 1);
    assert_eq!(made.urls[0].url, format!("http://{}.localhost:8480", made.urls[0].subdomain));
    let said = std::fs::read_to_string(daemon.home().join("work/web/said")).unwrap();
    assert_eq!(said, "helloyou\n");

    let missing = CreateRequest { archive_id: Some("ar-0000".into()), ..daemon.request("other") };
    assert_eq!(daemon.create(missing).unwrap_err().code, ErrorCode::ArchiveNotFound);
}

#[test]
fn a_failing_hook_is_told_and_leaves_nothing_but_the_word_of_it() {
    let daemon = Daemon::new();
    let hooks = vec!["true".into(), "for i in $(seq 50); do echo line $i; done; echo why >&2; exit 7".into()];
    let request = CreateRequest { setup_hooks: hooks, ..daemon.request("web") };
    let error = daemon.create(request.clone()).unwrap_err();
    assert_eq!((error.code, error.step.as_deref()), (ErrorCode::SetupHookFailed, Some("setup_hook")));
    assert!(error.message.contains('7'), "{}", error.message);
    assert_eq!(error.log_tail.len(), 20);
    assert!(error.log_tail.contains(&"why".to_owned()));
    assert!(daemon.machines.disks().is_empty());
    let told = daemon.get("web");
    let reason = told.reason.unwrap();
    assert_eq!((told.status, reason.code, reason.exit_code), (Status::Removed, ReasonCode::FailedStep, Some(7)));
    assert_eq!(daemon.list(ListFilter::Living).len(), 0);

    let kept = daemon.create(CreateRequest { keep_on_failure: true, ..request }).unwrap_err();
    let id = kept.sandbox_id.unwrap();
    assert_eq!(daemon.get(&id).status, Status::Failed);
    assert_eq!(daemon.machines.running(), std::slice::from_ref(&id));
    daemon.run(daemon.plane().agent(&Who::owners(&id))).unwrap();
    assert_eq!(daemon.run(daemon.plane().start(&Who::owners(&id), sink())).unwrap().status, Status::Running);
}

#[test]
fn a_start_command_that_ends_is_no_success() {
    let daemon = Daemon::new();
    let failing = |command: &str| CreateRequest { start_command: Some(command.into()), ..daemon.request("web") };
    let error = daemon.create(failing("echo cannot open database; exit 4")).unwrap_err();
    assert_eq!((error.code, error.step.as_deref()), (ErrorCode::StartCommandFailed, Some("start_command")));
    assert!(error.message.contains('4') && error.log_tail.contains(&"cannot open database".to_owned()), "{error:?}");
    assert!(daemon.log("web").contains("cannot open database"), "its log is told of for a day, too");
    let at_once = std::time::Instant::now();
    let request = CreateRequest {
        open_ports: vec![i64::from(free_port())],
        health_timeout_seconds: Some(60.0),
        ..failing("exit 5")
    };
    assert_eq!(daemon.create(request).unwrap_err().code, ErrorCode::StartCommandFailed);
    assert!(at_once.elapsed() < Duration::from_secs(30), "nobody waits for the health check's time-out");
}

#[test]
fn what_is_never_healthy_is_given_up_with_the_last_finding() {
    let daemon = Daemon::new();
    let port = free_port();
    let request = CreateRequest {
        start_command: Some(server(port, "up").into()),
        open_ports: vec![i64::from(port)],
        health_path: Some("/missing".into()),
        health_timeout_seconds: Some(8.0),
        ..daemon.request("web")
    };
    let error = daemon.create(request).unwrap_err();
    assert_eq!((error.code, error.step.as_deref()), (ErrorCode::HealthTimeout, Some("health")));
    assert!(error.message.contains("404"), "{}", error.message);
    let silent = CreateRequest {
        start_command: Some("echo serving nothing; exec sleep 600".into()),
        open_ports: vec![i64::from(free_port())],
        health_timeout_seconds: Some(2.0),
        ..daemon.request("web")
    };
    let error = daemon.create(silent).unwrap_err();
    assert_eq!(error.code, ErrorCode::HealthTimeout);
    assert!(error.log_tail.contains(&"serving nothing".to_owned()), "{error:?}");
    assert!(daemon.machines.running().is_empty());
}

#[test]
fn output_without_end_does_not_hold_up_the_failure() {
    let daemon = Daemon::new();
    let request = CreateRequest {
        start_command: Some("exec yes".into()),
        open_ports: vec![i64::from(free_port())],
        health_timeout_seconds: Some(2.0),
        ..daemon.request("web")
    };
    let began = std::time::Instant::now();
    let error = daemon.create(request).unwrap_err();
    assert_eq!((error.code, error.log_tail.last().map(String::as_str)), (ErrorCode::HealthTimeout, Some("y")));
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
}

#[test]
fn the_hosts_own_failure_is_told_as_it_is() {
    let daemon = Daemon::new();
    daemon.machines.full.store(true, Ordering::Relaxed);
    let error = daemon.create(daemon.request("web")).unwrap_err();
    assert_eq!((error.code, error.step.as_deref()), (ErrorCode::OutOfResources, Some("vm")));
    let image = CreateRequest { image: Some("no-such-image:1".into()), ..daemon.request("other") };
    let error = daemon.create(image).unwrap_err();
    assert_eq!(error.step.as_deref(), Some("image"));
    assert!(daemon.list(ListFilter::Living).is_empty());
}

#[test]
fn the_same_key_gives_the_same_sandbox() {
    let daemon = Daemon::new();
    *daemon.machines.slowness.lock().unwrap() = Duration::from_millis(200);
    let tries: Vec<_> = (0..4)
        .map(|_| {
            let (plane, request) = (daemon.plane().clone(), daemon.request("once"));
            daemon.spawn(async move { plane.create(request, keyed("k"), sink()).await.unwrap().id })
        })
        .collect();
    let ids: Vec<_> = tries.into_iter().map(|each| daemon.run(each).unwrap()).collect();
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    assert_eq!(daemon.create_with(daemon.request("once"), Some("k")).unwrap().id, ids[0]);
    let other = daemon.create_with(daemon.request("other"), Some("k")).unwrap_err();
    assert_eq!(other.code, ErrorCode::IdempotencyKeyReused);
    daemon.run(daemon.plane().remove(&Who::owners("once"))).unwrap();
    let anew = daemon.create_with(daemon.request("once"), Some("k")).unwrap();
    assert_ne!(anew.id, ids[0], "a key is forgotten with its sandbox");
}

#[test]
fn a_failed_creation_forgets_its_key_and_tells_everyone_the_same() {
    let daemon = Daemon::new();
    let hooks = vec!["sleep 0.3; exit 3".into()];
    let request = CreateRequest { setup_hooks: hooks, ..daemon.request("once") };
    let tries: Vec<_> = (0..3)
        .map(|_| {
            let (plane, request) = (daemon.plane().clone(), request.clone());
            daemon.spawn(async move { plane.create(request, keyed("k"), sink()).await.unwrap_err() })
        })
        .collect();
    for each in tries {
        assert_eq!(daemon.run(each).unwrap().code, ErrorCode::SetupHookFailed);
    }
    assert_eq!(daemon.list(ListFilter::All).len(), 1, "it was tried once");
    let other = daemon.request("other");
    daemon.create_with(other, Some("k")).unwrap();
}

#[test]
fn with_a_key_it_goes_on_without_the_client() {
    let daemon = Daemon::new();
    let hooks = vec!["sleep 0.5".into()];
    let request = CreateRequest { setup_hooks: hooks, ..daemon.request("once") };
    let (plane, asked) = (daemon.plane().clone(), request.clone());
    let call = daemon.spawn(async move { plane.create(asked, keyed("k"), sink()).await });
    eventually("it has begun", || if daemon.machines.running().len() == 1 { Ok(()) } else { Err(String::new()) });
    call.abort();
    let made = daemon.create_with(request, Some("k")).unwrap();
    assert_eq!(made.status, Status::Running);
    assert_eq!(daemon.list(ListFilter::All).len(), 1);
}

#[test]
fn without_a_key_a_client_that_goes_away_takes_its_sandbox_along() {
    let daemon = Daemon::new();
    for slowness in [Duration::from_millis(300), Duration::ZERO] {
        *daemon.machines.slowness.lock().unwrap() = slowness;
        let request = CreateRequest { setup_hooks: vec!["sleep 60".into()], ..daemon.request("web") };
        let plane = daemon.plane().clone();
        let call = daemon.spawn(async move { plane.create(request, Asked::default(), sink()).await });
        eventually("it has begun", || if daemon.machines.disks().len() == 1 { Ok(()) } else { Err(String::new()) });
        call.abort();
        daemon.becomes("web", Status::Removed);
        eventually("everything is gone", || match (daemon.machines.disks(), daemon.machines.running()) {
            (disks, running) if disks.is_empty() && running.is_empty() => Ok(()),
            left => Err(format!("{left:?}")),
        });
    }
}

#[test]
fn wherever_a_client_leaves_nothing_is_left_that_it_was_not_told_of() {
    let daemon = Daemon::new();
    for wait in 0..40 {
        let (plane, request) = (daemon.plane().clone(), daemon.request(&format!("web{wait}")));
        let call = daemon.spawn(async move { plane.create(request, Asked::default(), sink()).await });
        std::thread::sleep(Duration::from_micros(500) * wait);
        call.abort();
        if let Ok(made) = daemon.run(call) {
            daemon.run(daemon.plane().remove(&Who::owners(&made.unwrap().id))).unwrap();
        }
    }
    eventually("nothing is left", || match (daemon.list(ListFilter::Living), daemon.machines.disks()) {
        (living, disks) if living.is_empty() && disks.is_empty() => Ok(()),
        left => Err(format!("{left:?}")),
    });
}

#[test]
fn removal_cuts_a_creation_short() {
    let daemon = Daemon::new();
    let request = CreateRequest { setup_hooks: vec!["sleep 60".into()], ..daemon.request("web") };
    let plane = daemon.plane().clone();
    let call = daemon.spawn(async move { plane.create(request, Asked::default(), sink()).await });
    eventually("it has begun", || if daemon.machines.running().len() == 1 { Ok(()) } else { Err(String::new()) });
    let removed = daemon.run(daemon.plane().remove(&Who::owners("web"))).unwrap();
    assert_eq!((removed.status, removed.reason.unwrap().code), (Status::Removed, ReasonCode::Removed));
    assert_eq!(daemon.run(call).unwrap().unwrap_err().code, ErrorCode::InvalidState);
    assert!(daemon.machines.disks().is_empty());
}

#[test]
fn what_cannot_be_given_is_refused() {
    let daemon = Daemon::new();
    let python = CreateRequest { sandbox_type: Some("python".into()), ..daemon.request("snake") };
    daemon.create(python).unwrap();
    let mount = Mount { host_path: "/proc".into(), sandbox_path: "/x".into(), read_only: true };
    let mounting = CreateRequest { mounts: vec![mount], ..daemon.request("web") };
    assert_eq!(daemon.create(mounting).unwrap_err().code, ErrorCode::Forbidden);
}
