//! Sandboxes that are started again when they ended by themselves.

use heyvm_api::{ErrorCode, sandbox::*};
use heyvm_control_plane::{Account, Who};
use heyvm_vm::ExitCause;

use crate::daemon::{Daemon, eventually, sink};

fn with(daemon: &Daemon, restart: RestartPolicy, command: &str) -> CreateRequest {
    CreateRequest { restart: Some(restart), start_command: Some(command.into()), ..daemon.request("web") }
}

fn restarted(daemon: &Daemon, times: u32) -> SandboxInfo {
    eventually(&format!("it runs after {times} restarts"), || match daemon.get("web") {
        info if info.status == Status::Running && info.restart_count >= times => Ok(info),
        info => Err(format!("{:?} {} {:?}", info.status, info.restart_count, info.reason)),
    })
}

#[test]
fn a_failed_start_command_is_started_again_with_longer_and_longer_pauses() {
    let daemon = Daemon::new();
    let made = daemon.create(with(&daemon, RestartPolicy::OnFailure, "echo ran; sleep 1; exit 3")).unwrap();
    assert_eq!((made.restart, made.restart_count), (RestartPolicy::OnFailure, 0));
    let pause_before = |times: u32| {
        eventually(&format!("it waits for start {times}"), || match daemon.get("web") {
            info if info.restart_count + 1 == times && info.next_start_at.is_some() => {
                Ok(info.next_start_at.unwrap() - info.status_changed_at)
            }
            info => Err(format!("{:?} {} {:?}", info.status, info.restart_count, info.next_start_at)),
        })
    };
    let (first, second) = (pause_before(1), pause_before(2));
    assert!(second > first, "{first} {second}");
    let waiting = daemon.get("web");
    assert_eq!((waiting.status, waiting.reason.unwrap().exit_code), (Status::Failed, Some(3)));
    assert_eq!(daemon.list(ListFilter::Living).len(), 1, "it holds its name");
    assert_eq!(daemon.create(daemon.request("web")).unwrap_err().code, ErrorCode::NameTaken);
    restarted(&daemon, 2);
    assert!(daemon.log("web").matches("ran\n").count() >= 3);
}

#[test]
fn a_stop_is_the_end_whatever_the_policy() {
    let daemon = Daemon::new();
    daemon.create(with(&daemon, RestartPolicy::Always, "sleep 1; exit 3")).unwrap();
    eventually("it waits", || daemon.get("web").next_start_at.map(drop).ok_or_else(String::new));
    let stopped = daemon.run(daemon.plane().stop(&Who::owners("web"))).unwrap();
    assert_eq!((stopped.next_start_at, stopped.status == Status::Running), (None, false));
    let count = stopped.restart_count;
    std::thread::sleep(std::time::Duration::from_secs(5));
    assert_eq!(daemon.get("web").restart_count, count);
    assert!(daemon.machines.running().is_empty());
}

#[test]
fn the_policy_decides_what_is_started_again() {
    let daemon = Daemon::new();
    let cases = [
        (RestartPolicy::Never, "sleep 1; exit 3", false),
        (RestartPolicy::OnFailure, "sleep 1; exit 0", false),
        (RestartPolicy::Always, "sleep 1; exit 0", true),
    ];
    for (restart, command, again) in cases {
        let made = daemon.create(with(&daemon, restart, command)).unwrap();
        let ended = eventually("it has ended", || match daemon.get(&made.id) {
            info if matches!(info.status, Status::Stopped | Status::Failed) => Ok(info),
            info => Err(format!("{:?}", info.status)),
        });
        assert_eq!(ended.next_start_at.is_some(), again, "{restart:?} {ended:?}");
        daemon.run(daemon.plane().remove(&Who::owners(&made.id))).unwrap();
    }
    let made = daemon.create(with(&daemon, RestartPolicy::OnFailure, "exec sleep 600")).unwrap();
    daemon.machines.end(&made.id, ExitCause::GuestPanic, "oops");
    restarted(&daemon, 1);
}

#[test]
fn after_a_restart_of_the_host_it_runs_again_where_asked() {
    let mut daemon = Daemon::new();
    let always = daemon.create(with(&daemon, RestartPolicy::Always, "exec sleep 600")).unwrap();
    let never = daemon.create(daemon.request("other")).unwrap();
    daemon.die();
    for id in [&always.id, &never.id] {
        daemon.machines.end(id, ExitCause::HostRestarted, "");
    }
    daemon.revive();
    restarted(&daemon, 1);
    let other = daemon.get("other");
    assert_eq!((other.status, other.reason.unwrap().code), (Status::Stopped, ReasonCode::HostRestarted));
}

#[test]
fn one_that_waits_is_started_again_by_the_next_daemon() {
    let mut daemon = Daemon::new();
    daemon
        .create(with(&daemon, RestartPolicy::OnFailure, "test -e ran && exec sleep 600; touch ran; sleep 1; exit 1"))
        .unwrap();
    eventually("it waits", || daemon.get("web").next_start_at.map(drop).ok_or_else(String::new));
    daemon.die();
    daemon.revive();
    restarted(&daemon, 1);
}

#[test]
fn the_policy_can_be_changed_and_is_not_for_accounts() {
    let daemon = Daemon::new();
    let made = daemon.create(with(&daemon, RestartPolicy::Never, "exec sleep 600")).unwrap();
    let changed = daemon.run(daemon.plane().set_restart_policy(&Who::owners("web"), RestartPolicy::Always)).unwrap();
    assert_eq!((changed.restart, changed.status), (RestartPolicy::Always, Status::Running));
    daemon.machines.end(&made.id, ExitCause::GuestShutdown, "");
    restarted(&daemon, 1);
    daemon.run(daemon.plane().restart(&Who::owners("web"), sink())).unwrap();
    let theirs = Who { account: Account::of_cloud("acme").unwrap(), sandbox: made.id };
    let refused = daemon.run(daemon.plane().set_restart_policy(&theirs, RestartPolicy::Always)).unwrap_err();
    assert_eq!(refused.code, ErrorCode::Unsupported);
}
