//! A daemon dies at any point; the next one makes everything true again.

use std::{
    fs::{self, File},
    time::{Duration, Instant, SystemTime},
};

use heyvm_api::sandbox::*;
use heyvm_control_plane::Who;
use heyvm_store::Store;
use heyvm_vm::ExitCause;

use crate::{
    daemon::{Daemon, eventually, keyed, sink},
    machines::Finding,
};

fn ticking(daemon: &Daemon, name: &str) -> CreateRequest {
    let command = "i=0; while sleep 0.05; do i=$((i + 1)); echo tick $i; done".into();
    CreateRequest { start_command: Some(command), open_ports: vec![], ..daemon.request(name) }
}

/// What a ticking one has printed, which must be every tick once.
fn ticks(daemon: &Daemon, name: &str) -> usize {
    let log = daemon.log(name);
    for (index, line) in log.lines().enumerate() {
        assert_eq!(line, format!("tick {}", index + 1));
    }
    log.lines().count()
}

#[test]
fn a_running_one_runs_on_and_its_log_has_neither_gap_nor_repetition() {
    let mut daemon = Daemon::new();
    daemon.create(ticking(&daemon, "web")).unwrap();
    daemon.run(daemon.plane().restart(&Who::owners("web"), sink())).unwrap();
    // The first run's output is not the second's.
    let first_run = daemon.log("web").lines().position(|line| line == "tick 1").unwrap();
    assert_eq!(first_run, 0);
    daemon.run(daemon.plane().remove(&Who::owners("web"))).unwrap();

    let made = daemon.create(ticking(&daemon, "web")).unwrap();
    let bound =
        daemon.run(daemon.plane().bind(&Who::owners("web"), BindRequest { port: 80, is_public: None })).unwrap();
    for _ in 0..3 {
        let before = ticks(&daemon, "web");
        daemon.die();
        std::thread::sleep(std::time::Duration::from_millis(200));
        daemon.revive();
        let info = daemon.get("web");
        assert_eq!(
            (info.status, &info.id, info.urls.as_slice()),
            (Status::Running, &made.id, std::slice::from_ref(&bound.endpoint))
        );
        eventually("its output is kept on", || match ticks(&daemon, "web") {
            now if now > before + 4 => Ok(()),
            now => Err(format!("{before} {now}")),
        });
    }
    daemon.machines.end(&made.id, ExitCause::GuestPanic, "oops");
    assert_eq!(daemon.becomes("web", Status::Failed).reason.unwrap().code, ReasonCode::GuestPanic);
}

#[test]
fn the_log_of_a_second_run_goes_on_where_it_ended() {
    let mut daemon = Daemon::new();
    daemon.create(ticking(&daemon, "web")).unwrap();
    let second_run = |daemon: &Daemon| {
        let log = daemon.log("web");
        log.rsplit_once("tick 1\n").map(|(_, rest)| rest.lines().count()).unwrap_or_default()
    };
    eventually("the first run has printed more than the second will", || match second_run(&daemon) {
        count if count > 20 => Ok(()),
        count => Err(count.to_string()),
    });
    daemon.run(daemon.plane().restart(&Who::owners("web"), sink())).unwrap();
    eventually("the second run prints", || if second_run(&daemon) > 0 { Ok(()) } else { Err(daemon.log("web")) });
    daemon.die();
    daemon.revive();
    eventually("nothing of it is missing", || match daemon.log("web").rsplit_once("tick 1\n").unwrap().1 {
        rest if rest.lines().count() > 10 => Ok(()),
        rest => Err(rest.to_owned()),
    });
    let log = daemon.log("web");
    let (_, rest) = log.rsplit_once("tick 1\n").unwrap();
    for (index, line) in rest.lines().enumerate() {
        assert_eq!(line, format!("tick {}", index + 2));
    }
}

#[test]
fn one_that_ended_meanwhile_is_judged() {
    let mut daemon = Daemon::new();
    let made = daemon.create(daemon.request("web")).unwrap();
    daemon.die();
    daemon.machines.end(&made.id, ExitCause::Lost, "");
    daemon.revive();
    let info = daemon.get("web");
    assert_eq!((info.status, info.reason.unwrap().code), (Status::Failed, ReasonCode::VmLost));
    assert_eq!(daemon.machines.disks(), [made.id], "its disk is kept");
}

#[test]
fn partial_ones_and_the_last_daemons_pool_are_removed() {
    let mut daemon = Daemon::new();
    let stopped = daemon.create(daemon.request("stopped")).unwrap();
    daemon.run(daemon.plane().stop(&Who::owners("stopped"))).unwrap();
    let request = CreateRequest { setup_hooks: vec!["sleep 60".into()], ..daemon.request("half-made") };
    let plane = daemon.plane().clone();
    let call = daemon.spawn(async move { plane.create(request, keyed("k"), sink()).await });
    eventually("it has begun", || if daemon.machines.running().len() == 1 { Ok(()) } else { Err(String::new()) });
    daemon.die();
    drop(call);
    daemon.machines.stray("reserve-0123456789abcdef");
    daemon.revive();
    let info = daemon.get("half-made");
    assert_eq!((info.status, info.reason.unwrap().code), (Status::Removed, ReasonCode::DaemonRestarted));
    assert_eq!(daemon.machines.disks(), [stopped.id]);
    assert!(daemon.machines.running().is_empty());
    let again = daemon.create_with(daemon.request("half-made"), Some("k")).unwrap();
    assert_eq!(again.status, Status::Running);
}

#[test]
fn one_that_was_being_started_keeps_its_disk() {
    let mut daemon = Daemon::new();
    let request = CreateRequest {
        start_command: Some("test ! -e once || sleep 60; touch once; exec sleep 600".into()),
        open_ports: vec![],
        ..daemon.request("web")
    };
    let made = daemon.create(request).unwrap();
    daemon.run(daemon.plane().stop(&Who::owners("web"))).unwrap();
    let plane = daemon.plane().clone();
    let call = daemon.spawn(async move { plane.start(&Who::owners("web"), sink()).await });
    eventually("it has begun", || if daemon.machines.running().len() == 1 { Ok(()) } else { Err(String::new()) });
    daemon.die();
    drop(call);
    daemon.revive();
    let info = daemon.get("web");
    assert!(matches!(info.status, Status::Stopped | Status::Failed | Status::Running), "{info:?}");
    assert_eq!(daemon.machines.disks(), [made.id]);
    assert_eq!(daemon.run(daemon.plane().start(&Who::owners("web"), sink())).unwrap().status, Status::Running);
}

/// While no daemon runs, the data of a row is changed.
pub fn rewrite(daemon: &Daemon, id: &str, change: impl Fn(&str) -> String) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let store = Store::open(&daemon.home().join("heyvm.db")).await.unwrap();
        let mut row = store.sandboxes().await.unwrap().into_iter().find(|row| row.id == id).unwrap();
        row.data = change(&row.data);
        store.update(&row).await.unwrap();
        store.close().await;
    });
}

#[test]
fn what_another_version_has_written_is_read_or_left_alone() {
    let mut daemon = Daemon::new();
    let older = daemon.create(daemon.request("older")).unwrap();
    let newer = daemon.create(daemon.request("newer")).unwrap();
    daemon.die();
    rewrite(&daemon, &older.id, |data| {
        let mut record: serde_json::Value = serde_json::from_str(data).unwrap();
        for later in ["removing", "has_run", "waiting_to_replace"] {
            record.as_object_mut().unwrap().remove(later).unwrap();
        }
        record.to_string()
    });
    rewrite(&daemon, &newer.id, |data| data.replace("\"running\"", "\"hibernating\""));
    daemon.revive();
    assert_eq!(daemon.get("older").status, Status::Running);
    assert!(daemon.run(daemon.plane().get(&Who::owners("newer"))).is_err());
    assert!(daemon.machines.running().contains(&newer.id), "nobody ends what he cannot read");
    assert!(daemon.machines.disks().contains(&newer.id));
    daemon.die();
    rewrite(&daemon, &newer.id, |data| data.replace("\"hibernating\"", "\"running\""));
    daemon.revive();
    assert_eq!(daemon.get("newer").status, Status::Running);
}

#[test]
fn one_that_cannot_be_found_now_is_not_dead() {
    let mut daemon = Daemon::new();
    let made = daemon.create(daemon.request("web")).unwrap();
    daemon.die();
    *daemon.machines.finding.lock().unwrap() = Finding::Fails;
    daemon.revive();
    let info = daemon.get("web");
    assert_eq!((info.status, info.agent), (Status::Running, Some(AgentState::Unresponsive)));
    assert!(daemon.run(daemon.plane().checkpoint(&Who::owners("web"))).is_err(), "its VM is not known yet");
    assert_eq!((daemon.get("web").status, daemon.machines.running()), (Status::Running, vec![made.id]));
    *daemon.machines.finding.lock().unwrap() = Finding::Works;
    eventually("it is found", || {
        daemon.run(daemon.plane().agent(&Who::owners("web"))).map(drop).map_err(|error| error.to_string())
    });
    assert_eq!(daemon.run(daemon.plane().stop(&Who::owners("web"))).unwrap().status, Status::Stopped);
    assert!(daemon.machines.running().is_empty());
}

#[test]
fn a_requested_stop_ends_also_one_that_cannot_be_found() {
    let mut daemon = Daemon::new();
    let made = daemon.create(daemon.request("web")).unwrap();
    daemon.die();
    *daemon.machines.finding.lock().unwrap() = Finding::Fails;
    daemon.revive();
    assert_eq!(daemon.run(daemon.plane().stop(&Who::owners("web"))).unwrap().status, Status::Stopped);
    assert!(daemon.machines.running().is_empty());
    assert_eq!(daemon.machines.disks(), [made.id], "its disk is kept");
    daemon.run(daemon.plane().start(&Who::owners("web"), sink())).unwrap();
}

#[test]
fn a_silent_agent_ends_no_vm() {
    let mut daemon = Daemon::new();
    let made = daemon.create(daemon.request("web")).unwrap();
    daemon.die();
    daemon.machines.fall_silent(&made.id);
    daemon.revive();
    let info = eventually("the silence is noticed", || match daemon.get("web") {
        info if info.agent == Some(AgentState::Unresponsive) => Ok(info),
        info => Err(format!("{:?}", info.agent)),
    });
    assert_eq!((info.status, daemon.machines.running()), (Status::Running, vec![made.id.clone()]));
    daemon.machines.answer_again(&made.id);
    eventually("it is connected to again", || match daemon.get("web").agent {
        None => Ok(()),
        other => Err(format!("{other:?}")),
    });
    daemon.run(daemon.plane().stop(&Who::owners("web"))).unwrap();
}

#[test]
fn one_that_never_answers_does_not_keep_the_daemon_from_opening() {
    let mut daemon = Daemon::new();
    daemon.create(daemon.request("web")).unwrap();
    daemon.die();
    *daemon.machines.finding.lock().unwrap() = Finding::NeverAnswers;
    let began = Instant::now();
    daemon.revive();
    assert!(began.elapsed() < Duration::from_secs(30));
    daemon.create(daemon.request("other")).unwrap();
}

#[test]
fn a_removed_one_is_forgotten_after_a_day() {
    let mut daemon = Daemon::new();
    let [old, young] = ["old", "young"].map(|name| {
        let request = CreateRequest { start_command: Some("echo hi; exec sleep 600".into()), ..daemon.request(name) };
        daemon.create(request).unwrap().id
    });
    daemon.run(async {
        for id in [&old, &young] {
            daemon.plane().remove(&Who::owners(id)).await.unwrap();
        }
    });
    daemon.die();
    for (id, hours) in [(&old, 25), (&young, 23)] {
        rewrite(&daemon, id, |data| {
            let mut record: serde_json::Value = serde_json::from_str(data).unwrap();
            let time = chrono::Utc::now() - chrono::Duration::hours(hours);
            record["status_changed_at"] = serde_json::to_value(time).unwrap();
            record.to_string()
        });
    }
    daemon.revive();
    assert!(daemon.run(daemon.plane().get(&Who::owners(&old))).is_err());
    assert_eq!(daemon.get(&young).status, Status::Removed);
    assert_eq!(fs::read_dir(daemon.home().join("logs")).unwrap().count(), 1);
}

/// So many hours ago.
fn write_in_the_past(path: std::path::PathBuf, hours: u64) {
    fs::write(&path, "").unwrap();
    let time = SystemTime::now() - Duration::from_secs(hours * 3600);
    File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
}

#[test]
fn archives_and_logs_that_nobody_needs_go() {
    let mut daemon = Daemon::new();
    let (archives, logs) = (daemon.home().join("archives"), daemon.home().join("logs"));
    let logged = CreateRequest { start_command: Some("exec sleep 600".into()), ..daemon.request("web") };
    let web = daemon.create(logged).unwrap();
    write_in_the_past(archives.join("ar-01"), 25);
    let made =
        CreateRequest { archive_id: Some("ar-01".into()), setup_hooks: vec!["exit 1".into()], ..daemon.request("x") };
    daemon.create(made).unwrap_err();
    assert!(fs::metadata(archives.join("ar-01")).unwrap().modified().unwrap().elapsed().unwrap().as_secs() < 60);
    daemon.die();
    write_in_the_past(archives.join("ar-02"), 25);
    write_in_the_past(archives.join("ar-03"), 23);
    write_in_the_past(archives.join("ar-04"), 25);
    fs::write(archives.join(".half-1"), "").unwrap();
    fs::write(logs.join("nobody"), "").unwrap();
    fs::write(logs.join("nobody.old"), "").unwrap();
    rewrite(&daemon, &web.id, |data| data.replace("\"archive_id\":null", "\"archive_id\":\"ar-04\""));
    daemon.revive();
    eventually("what is too old goes", || if archives.join("ar-02").exists() { Err(String::new()) } else { Ok(()) });
    assert_eq!(
        ["ar-01", "ar-03", "ar-04", ".half-1"].map(|name| archives.join(name).exists()),
        [true, true, true, false]
    );
    assert_eq!(fs::read_dir(logs).unwrap().count(), 1);
}
