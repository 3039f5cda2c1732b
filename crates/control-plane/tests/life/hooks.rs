//! What setup hooks print: streamed to the caller, kept in the log, bounded.

use heyvm_api::{sandbox::*, system::ProgressEvent};
use heyvm_control_plane::{Asked, Who};

use crate::daemon::{Daemon, eventually};

fn create(daemon: &Daemon, hooks: &[&str]) -> (Vec<ProgressEvent>, Result<SandboxInfo, heyvm_api::ApiError>) {
    let request =
        CreateRequest { setup_hooks: hooks.iter().map(|hook| (*hook).into()).collect(), ..daemon.request("web") };
    let (sink, mut events) = tokio::sync::mpsc::unbounded_channel();
    let made = daemon.run(daemon.plane().create(request, Asked::default(), sink));
    (std::iter::from_fn(|| events.try_recv().ok()).collect(), made)
}

fn lines<'a>(events: &'a [ProgressEvent], stream: &str) -> Vec<&'a str> {
    let of = events.iter().filter(|event| event.stream.as_deref() == Some(stream));
    of.map(|event| event.message.as_str()).collect()
}

#[test]
fn lines_are_streamed_in_order_and_kept_in_the_log() {
    let daemon = Daemon::new();
    let (events, made) = create(&daemon, &["echo one; echo oops >&2; echo two", "printf three"]);
    made.unwrap();
    assert_eq!((lines(&events, "stdout"), lines(&events, "stderr")), (vec!["one", "two", "three"], vec!["oops"]));
    let log = daemon.log("web");
    for printed in ["one\n", "two\n", "oops\n", "three"] {
        assert!(log.contains(printed), "{log}");
    }
    let steps: Vec<_> = events.iter().filter(|event| event.stream.is_none()).map(|event| event.step.as_str()).collect();
    assert_eq!(steps.iter().filter(|step| **step == "setup_hook").count(), 2, "{steps:?}");
}

#[test]
fn they_come_while_the_hook_runs() {
    let daemon = Daemon::new();
    let request = CreateRequest { setup_hooks: vec!["echo began; sleep 3600".into()], ..daemon.request("web") };
    let (sink, mut events) = tokio::sync::mpsc::unbounded_channel();
    let plane = daemon.plane().clone();
    let call = daemon.spawn(async move { plane.create(request, Asked::default(), sink).await });
    let line = eventually("the line comes", || match events.try_recv() {
        Ok(event) if event.stream.is_some() => Ok(event.message),
        other => Err(format!("{other:?}")),
    });
    assert_eq!(line, "began");
    assert!(daemon.log("web").contains("began"));
    daemon.run(daemon.plane().remove(&Who::owners("web"))).unwrap();
    assert!(daemon.run(call).unwrap().is_err());
}

#[test]
fn output_without_end_is_bounded_and_its_end_told() {
    let daemon = Daemon::new();
    let (events, made) = create(&daemon, &["yes 0123456789 | head -n 400000; echo last words >&2; exit 3"]);
    let streamed: usize = events.iter().map(|event| event.message.len()).sum();
    assert!(streamed < 2 << 20, "{streamed}");
    assert!(lines(&events, "stderr").last().unwrap().contains("heyvm logs"));
    let error = made.unwrap_err();
    assert_eq!((error.exit_code, error.log_tail.last().map(String::as_str)), (Some(3), Some("last words")));
}

#[test]
fn the_start_commands_log_goes_on_behind_them_also_under_a_new_daemon() {
    let mut daemon = Daemon::new();
    let request = CreateRequest {
        setup_hooks: vec!["echo a hook, which prints more than the start command".into()],
        start_command: Some(
            "echo started; while sleep 0.1; do test -e go && echo went && exec sleep 3600; done".into(),
        ),
        ..daemon.request("web")
    };
    daemon.create(request).unwrap();
    eventually(
        "it has started",
        || if daemon.log("web").contains("started\n") { Ok(()) } else { Err(daemon.log("web")) },
    );
    daemon.die();
    daemon.revive();
    std::fs::write(daemon.home().join("work/web/go"), "").unwrap();
    eventually("it goes on", || if daemon.log("web").contains("went\n") { Ok(()) } else { Err(daemon.log("web")) });
    let log = daemon.log("web");
    assert_eq!(log, "a hook, which prints more than the start command\nstarted\nwent\n");
}
