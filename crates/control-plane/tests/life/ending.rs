//! Stop, start, remove; what ends by itself; time.

use std::time::{Duration, Instant};

use futures::StreamExt;
use heyvm_api::{ErrorCode, sandbox::*};
use heyvm_control_plane::{LogQuery, Who};
use heyvm_vm::ExitCause;

use crate::daemon::{Daemon, eventually, free_port, server, sink};

fn with(daemon: &Daemon, command: &str) -> CreateRequest {
    CreateRequest { start_command: Some(command.into()), ..daemon.request("web") }
}

#[test]
fn stop_and_start_may_be_said_twice() {
    let daemon = Daemon::new();
    let made = daemon.create(with(&daemon, "echo started >> starts; exec sleep 600")).unwrap();
    for _ in 0..2 {
        let stopped = daemon.run(daemon.plane().stop(&Who::owners("web"))).unwrap();
        assert_eq!((stopped.status, stopped.reason.unwrap().code), (Status::Stopped, ReasonCode::Stopped));
    }
    assert!(daemon.machines.running().is_empty());
    assert_eq!(daemon.machines.disks(), std::slice::from_ref(&made.id));
    let refused = daemon.run(daemon.plane().agent(&Who::owners("web"))).err().unwrap();
    assert_eq!(refused.code, ErrorCode::InvalidState);
    assert!(refused.hint.is_some());
    for _ in 0..2 {
        let started = daemon.run(daemon.plane().start(&Who::owners("web"), sink())).unwrap();
        assert_eq!((started.status, started.reason), (Status::Running, None));
    }
    daemon.run(daemon.plane().restart(&Who::owners("web"), sink())).unwrap();
    let starts = std::fs::read_to_string(daemon.home().join("work/web/starts")).unwrap();
    assert_eq!(starts, "started\n".repeat(3));
    for _ in 0..2 {
        let removed = daemon.run(daemon.plane().remove(&Who::owners(&made.id))).unwrap();
        assert_eq!((removed.status, removed.reason.unwrap().code), (Status::Removed, ReasonCode::Removed));
    }
    assert!(daemon.machines.disks().is_empty());
    assert_eq!(
        daemon.run(daemon.plane().start(&Who::owners(&made.id), sink())).unwrap_err().code,
        ErrorCode::InvalidState
    );
    assert_eq!(daemon.list(ListFilter::All).len(), 1, "told of for a day");
}

#[test]
fn a_client_that_goes_away_does_not_stop_a_start() {
    let daemon = Daemon::new();
    daemon.create(with(&daemon, "exec sleep 600")).unwrap();
    daemon.run(daemon.plane().stop(&Who::owners("web"))).unwrap();
    let plane = daemon.plane().clone();
    let call = daemon.spawn(async move { plane.start(&Who::owners("web"), sink()).await });
    eventually("it has begun", || match daemon.get("web").status {
        Status::Stopped => Err(String::new()),
        _ => Ok(()),
    });
    call.abort();
    daemon.becomes("web", Status::Running);
}

#[test]
fn the_end_of_the_start_command_is_the_end_of_the_sandbox() {
    let daemon = Daemon::new();
    for (code, status) in [(23, Status::Failed), (0, Status::Stopped)] {
        daemon.create(with(&daemon, &format!("echo last words; sleep 1; exit {code}"))).unwrap();
        let reason = daemon.becomes("web", status).reason.unwrap();
        assert_eq!((reason.code, reason.exit_code), (ReasonCode::StartCommandExited, Some(code)));
        assert_eq!(reason.log_tail, ["last words"]);
        assert!(daemon.machines.running().is_empty(), "no machine without a purpose");
    }
    assert_eq!(daemon.run(daemon.plane().start(&Who::owners("web"), sink())).unwrap().status, Status::Running);
}

#[test]
fn a_machine_that_ends_by_itself_is_judged() {
    let daemon = Daemon::new();
    let cases = [
        (ExitCause::GuestPanic, Status::Failed, ReasonCode::GuestPanic),
        (ExitCause::GuestHalted, Status::Failed, ReasonCode::GuestHalted),
        (ExitCause::AgentReplaced, Status::Failed, ReasonCode::AgentReplaced),
        (ExitCause::Unrunnable, Status::Failed, ReasonCode::KvmFailed),
        (ExitCause::Lost, Status::Failed, ReasonCode::VmLost),
        (ExitCause::OutOfMemory, Status::Failed, ReasonCode::OutOfMemory),
        (ExitCause::GuestShutdown, Status::Stopped, ReasonCode::GuestShutdown),
        (ExitCause::HostRestarted, Status::Stopped, ReasonCode::HostRestarted),
    ];
    for (cause, status, code) in cases {
        let made = daemon.create(with(&daemon, "exec sleep 600")).unwrap();
        daemon.machines.end(&made.id, cause, "Kernel panic - not \u{1b}[31msyncing");
        let info = daemon.becomes(&made.id, status);
        let reason = info.reason.unwrap();
        assert_eq!((reason.code, info.error_message), (code, Some(reason.message)));
        assert_eq!(reason.log_tail, ["Kernel panic - not [31msyncing"]);
        assert_eq!(daemon.run(daemon.plane().start(&Who::owners(&made.id), sink())).unwrap().status, Status::Running);
        daemon.run(daemon.plane().remove(&Who::owners(&made.id))).unwrap();
    }
}

#[test]
fn at_the_end_of_its_time_it_is_gone_running_or_not() {
    let daemon = Daemon::new();
    let mortal = |name: &str| CreateRequest { ttl_seconds: Some(1), ..daemon.request(name) };
    daemon.create(mortal("running")).unwrap();
    daemon.create(mortal("stopped")).unwrap();
    daemon.run(daemon.plane().stop(&Who::owners("stopped"))).unwrap();
    let half_made = CreateRequest { setup_hooks: vec!["sleep 60".into()], ..mortal("half-made") };
    let error = daemon.create(half_made).unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidState, "{error:?}");
    for name in ["running", "stopped", "half-made"] {
        let reason = daemon.becomes(name, Status::Removed).reason.unwrap();
        assert_eq!(reason.code, ReasonCode::TtlExpired, "{name}");
    }
    eventually("everything is gone", || match daemon.machines.disks() {
        disks if disks.is_empty() => Ok(()),
        disks => Err(format!("{disks:?}")),
    });
}

#[test]
fn removal_cuts_a_restart_short_also_while_it_stops() {
    let daemon = Daemon::new();
    let port = free_port();
    let request = CreateRequest {
        open_ports: vec![i64::from(port)],
        health_timeout_seconds: Some(60.0),
        ..with(&daemon, &format!("test -e once && exec sleep 600; touch once; {}", server(port, "up")))
    };
    daemon.create(request).unwrap();
    *daemon.machines.tenacity.lock().unwrap() = Duration::from_millis(500);
    let plane = daemon.plane().clone();
    let call = daemon.spawn(async move { plane.restart(&Who::owners("web"), sink()).await });
    daemon.becomes("web", Status::Stopping);
    let began = Instant::now();
    let removed = daemon.run(daemon.plane().remove(&Who::owners("web"))).unwrap();
    assert_eq!((removed.status, removed.reason.unwrap().code), (Status::Removed, ReasonCode::Removed));
    assert!(began.elapsed() < Duration::from_secs(40), "nobody waits for its health");
    assert_eq!(daemon.run(call).unwrap().unwrap_err().code, ErrorCode::InvalidState);
    assert!(daemon.machines.disks().is_empty());
}

#[test]
fn one_that_is_slow_to_end_keeps_no_other_alive() {
    let daemon = Daemon::new();
    let mortal = |name: &str, seconds| CreateRequest { ttl_seconds: Some(seconds), ..daemon.request(name) };
    daemon.create(mortal("slow", 1)).unwrap();
    daemon.create(mortal("other", 2)).unwrap();
    *daemon.machines.tenacity.lock().unwrap() = Duration::from_secs(5);
    let plane = daemon.plane().clone();
    let stopping = daemon.spawn(async move { plane.stop(&Who::owners("slow")).await });
    daemon.becomes("other", Status::Removed);
    assert_eq!(daemon.get("slow").status, Status::Stopping);
    daemon.run(stopping).unwrap().unwrap();
    assert_eq!(daemon.becomes("slow", Status::Removed).reason.unwrap().code, ReasonCode::TtlExpired);
}

#[test]
fn time_runs_on_while_there_is_no_daemon() {
    let mut daemon = Daemon::new();
    let request = CreateRequest { ttl_seconds: Some(1), ..daemon.request("web") };
    daemon.create(request).unwrap();
    daemon.die();
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(daemon.machines.disks().len(), 1);
    daemon.revive();
    let gone = daemon.becomes("web", Status::Removed);
    assert_eq!(gone.reason.unwrap().code, ReasonCode::TtlExpired);
    assert!(daemon.machines.disks().is_empty());
}

#[test]
fn what_it_printed_is_followed_to_the_end_and_kept() {
    let daemon = Daemon::new();
    let command = "echo first; echo problem >&2; for i in 1 2 3; do sleep 0.2; echo tick $i; done; exec sleep 600";
    daemon.create(with(&daemon, command)).unwrap();
    let plane = daemon.plane().clone();
    let follower = daemon.spawn(async move {
        let chunks: Vec<_> = plane
            .logs(&Who::owners("web"), LogQuery { follow: true, ..LogQuery::default() })
            .await
            .unwrap()
            .collect()
            .await;
        chunks.into_iter().map(Result::unwrap).collect::<Vec<_>>()
    });
    eventually("it is written down", || match daemon.log("web") {
        log if log.contains("tick 3") => Ok(()),
        log => Err(log),
    });
    daemon.run(daemon.plane().stop(&Who::owners("web"))).unwrap();
    let chunks = daemon.run(follower).unwrap();
    let of = |stderr: bool| {
        let data = chunks.iter().filter(|chunk| chunk.stderr == stderr).flat_map(|chunk| chunk.data.to_vec());
        String::from_utf8(data.collect()).unwrap()
    };
    assert_eq!((of(false), of(true)), ("first\ntick 1\ntick 2\ntick 3\n".into(), "problem\n".into()));
    daemon.run(daemon.plane().start(&Who::owners("web"), sink())).unwrap();
    eventually("the second start's output follows the first's", || match daemon.log("web").matches("tick 3").count() {
        2 => Ok(()),
        count => Err(count.to_string()),
    });
    daemon.run(daemon.plane().remove(&Who::owners("web"))).unwrap();
    assert!(daemon.log("web").contains("tick 3"));
}

#[test]
fn log_by_line_has_whole_lines_with_their_times() {
    let daemon = Daemon::new();
    let before = chrono::Utc::now();
    let command =
        "echo first; printf half; sleep 0.3; echo oops >&2; sleep 0.3; echo ' and half'; printf end; exec sleep 600";
    daemon.create(with(&daemon, command)).unwrap();
    eventually("it is written down", || match daemon.log("web") {
        log if log.ends_with("end") => Ok(()),
        log => Err(log),
    });
    let query = LogQuery { tail: Some(3), by_line: true, follow: false };
    let chunks: Vec<_> =
        daemon.run(async { daemon.plane().logs(&Who::owners("web"), query).await.unwrap().collect().await });
    let chunks: Vec<_> = chunks.into_iter().map(Result::unwrap).collect();
    let lines: Vec<_> = chunks.iter().map(|chunk| (chunk.stderr, str::from_utf8(&chunk.data).unwrap())).collect();
    assert_eq!(lines, [(true, "oops\n"), (false, "half and half\n"), (false, "end")]);
    let times: Vec<_> = chunks.iter().map(|chunk| chunk.time.unwrap()).collect();
    assert!(times.iter().all(|time| before < *time && *time < chrono::Utc::now()), "{times:?}");
    assert!(times[1] < times[0], "the time is that of a line's beginning");
}
