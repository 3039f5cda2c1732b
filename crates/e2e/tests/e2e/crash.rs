//! SIGKILL to the daemon at any point: running VMs go on serving, half-made ones are cleaned up, nothing leaks.

use std::{
    collections::{BTreeSet, HashSet},
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use heyvm_e2e::{Host, Ran, apps::WEB_FLAGS, eventually, http, leaks};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

#[test]
fn running_sandboxes_go_on_serving_under_a_new_daemon() {
    let host = Host::new();
    let vm = host.deploy(&host.web_app(), &WEB_FLAGS);
    let boot = vm.sh("cat /proc/sys/kernel/random/boot_id").out();
    let machine = leaks::machines_of(host.scratch())[0].pid;
    host.end_daemon(Signal::SIGKILL);
    assert_eq!(vm.status(), "running", "the next call starts the daemon again");
    assert_eq!(leaks::machines_of(host.scratch())[0].pid, machine, "the same machine");
    assert_eq!(vm.sh("cat /proc/sys/kernel/random/boot_id").out(), boot);
    assert_eq!(vm.get("/health").status, 200, "under the same URL");
    // Its start command is still supervised: its output is kept, its end is noticed.
    assert!(host.run(&["logs", &vm.id]).out().contains("GET /health"));
    vm.exec(&["sh", "-c", "kill -9 $(cat /proc/[0-9]*/stat 2>/dev/null | awk '$2 == \"(python3)\" {print $1}')"]);
    assert_eq!(vm.becomes("failed")["code"], "start_command_exited");
}

#[test]
fn an_orderly_end_of_the_daemon_harms_no_machine_either() {
    let host = Host::new();
    let vm = host.deploy(&host.web_app(), &WEB_FLAGS);
    host.end_daemon(Signal::SIGTERM);
    assert_eq!(leaks::machines_of(host.scratch()).len(), 1);
    assert_eq!(vm.info()["status"], "running");
    assert_eq!(vm.get("/health").status, 200);
}

#[test]
fn a_machine_that_died_with_the_daemon_is_told_of() {
    let host = Host::new();
    let vm = host.create(&[]);
    host.end_daemon(Signal::SIGKILL);
    host.kill_machines();
    assert_eq!(vm.becomes("failed")["code"], "vm_lost");
}

#[test]
fn a_lost_database_removes_no_disk_and_ends_no_vm() {
    let host = Host::new();
    let (running, stopped) = (host.create(&["--name", "running"]), host.create(&["--name", "stopped"]));
    for vm in [&running, &stopped] {
        vm.sh(&format!("echo {} > /workspace/kept", vm.id));
    }
    let boot = running.sh("cat /proc/sys/kernel/random/boot_id").out();
    host.run(&["stop", "stopped"]).succeeded();
    host.end_daemon(Signal::SIGTERM);
    for name in ["heyvm.db", "heyvm.db-wal", "heyvm.db-shm"] {
        fs::remove_file(host.home().join(name)).ok();
    }
    let listed: Vec<_> = host.list(&["--all"]);
    let ids: HashSet<_> = listed.iter().map(|orphan| orphan["id"].as_str().unwrap_or_default()).collect();
    assert_eq!(ids, HashSet::from([running.id.as_str(), stopped.id.as_str()]));
    assert!(listed.iter().all(|orphan| orphan["status"] == "orphaned" && orphan["size_bytes"].as_u64() > Some(0)));
    assert!(host.run(&["doctor"]).out().contains(&running.id));
    host.run(&["recover", &running.id[..8]]).succeeded();
    assert_eq!(running.sh("cat /proc/sys/kernel/random/boot_id").out(), boot, "the same VM");
    host.run(&["recover", &stopped.id, "--name", "again"]).succeeded();
    host.run(&["start", "again"]).succeeded();
    for vm in [&running, &stopped] {
        assert_eq!(vm.sh("cat /workspace/kept").out(), vm.id);
    }
}

#[test]
fn all_stop_also_where_no_daemon_runs() {
    let host = Host::new();
    let vm = host.create(&["--name", "web"]);
    host.end_daemon(Signal::SIGTERM);
    assert_eq!(leaks::machines_of(host.scratch()).len(), 1);
    let said = host.run(&["daemon", "stop", "--all"]).succeeded().out();
    assert!(said.contains("stopped web"), "{said}");
    let status = host.run(&["daemon", "status", "--format", "json"]);
    assert!(
        status.code == 1 && status.out().contains("daemon.log") && !status.out().contains("http://"),
        "{}",
        status.out()
    );
    assert!(leaks::machines_of(host.scratch()).is_empty());
    assert_eq!(vm.status(), "stopped");
}

/// As from another login session: a daemon looks for nothing in its own place alone.
#[test]
fn a_daemon_in_another_control_group_finds_those_of_the_last_one() {
    let host = Host::new();
    let vm = host.create(&[]);
    let groups = leaks::control_groups_of(host.scratch(), std::slice::from_ref(&vm.id));
    host.end_daemon(Signal::SIGKILL);
    let elsewhere = elsewhere(&groups);
    let mut command = Command::new("sh");
    command.args(["-c", "for group; do echo $$ > $group/cgroup.procs; done; exec heyvm list", "sh"]).args(&elsewhere);
    host.environment(&mut command);
    Ran::of(&mut command, b"").succeeded();
    assert_eq!(vm.sh("echo alive").out(), "alive");
    host.run(&["rm", "-y", &vm.id]).succeeded();
    let left: Vec<_> = groups.iter().filter(|group| group.exists()).collect();
    assert!(left.is_empty(), "{left:?}");
    host.end_daemon(Signal::SIGTERM);
    for group in &elsewhere {
        fs::remove_dir(group.join(format!("heyvm-{}", nix::unistd::getuid()))).ok();
        eventually("the group is empty", || fs::remove_dir(group).ok());
    }
}

/// A control group of the test's own in each hierarchy in which a sandbox has one.
fn elsewhere(groups: &[PathBuf]) -> Vec<PathBuf> {
    let tops: BTreeSet<_> = groups.iter().filter_map(|group| group.parent()?.parent()).collect();
    let made = tops.into_iter().map(|top| top.join(format!("heyvm-e2e-{}", std::process::id())));
    made.inspect(|group| fs::create_dir(group).expect("a control group")).collect()
}

/// Deploys in parallel, the daemon killed after a different time in each round.
#[test]
fn killed_at_any_point_of_parallel_deploys() {
    const ROUNDS: u64 = 6;
    const DEPLOYS: usize = 3;
    let host = Host::new();
    host.keep_reserve();
    let app = host.web_app();
    let survivor = host.deploy(&app, &[&["--name", "survivor"][..], &WEB_FLAGS].concat());
    for round in 0..ROUNDS {
        std::thread::scope(|scope| {
            for number in 0..DEPLOYS {
                let (host, app) = (&host, &app);
                scope.spawn(move || {
                    let name = format!("round-{round}-{number}");
                    let app = app.to_str().expect("path");
                    let arguments = ["deploy", app, "--name", &name, "--size-class", "micro", "--format", "json"];
                    // What becomes of the call does not matter: some are answered, some are cut off.
                    Ran::of(host.command().args(arguments).args(WEB_FLAGS), b"")
                });
            }
            sleep(Duration::from_millis(150 + round * 220));
            host.end_daemon(Signal::SIGKILL);
        });
        whole_or_gone(&host);
        assert_eq!(survivor.get("/health").status, 200);
    }
}

/// After a restart every sandbox either runs and answers, or is gone; machines, directories and sandboxes match.
fn whole_or_gone(host: &Host) {
    let started = Instant::now();
    eventually("nothing is half-made", || {
        let all = host.list(&["--all"]);
        all.iter()
            .all(|sandbox| ["running", "failed", "removed"].contains(&sandbox["status"].as_str().unwrap_or_default()))
            .then_some(())
    });
    let kept: Vec<_> = host.list(&["--all"]).into_iter().filter(|sandbox| sandbox["status"] != "removed").collect();
    for sandbox in &kept {
        let id = sandbox["id"].as_str().expect("id");
        if sandbox["status"] == "running" {
            assert_eq!(host.run(&["exec", id, "--", "echo", "alive"]).succeeded().out(), "alive");
            if let Some(url) = sandbox["urls"][0]["url"].as_str() {
                eventually("it serves", || {
                    http::try_get(&format!("{url}/health")).ok().filter(|answer| answer.status == 200)
                });
            }
        } else {
            assert!(sandbox["reason"]["code"].is_string(), "{sandbox}");
        }
    }
    let running = kept.iter().filter(|sandbox| sandbox["status"] == "running").count();
    eventually("one machine per running sandbox", || {
        (leaks::machines_of(host.scratch()).len() == running).then_some(())
    });
    let ids: HashSet<_> = kept.iter().filter_map(|sandbox| sandbox["id"].as_str().map(str::to_owned)).collect();
    eventually("one directory per kept sandbox", || {
        let directories: HashSet<_> = leaks::sandboxes_of(&host.home)
            .into_iter()
            .filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()))
            .collect();
        (directories == ids).then_some(())
    });
    assert!(started.elapsed() < Duration::from_secs(90));
}

#[test]
fn an_idempotent_request_survives_the_daemon() {
    let host = Host::new();
    let app = host.web_app();
    let flags = [&["--name", "once", "--idempotency-key", "k1"][..], &WEB_FLAGS].concat();
    let first = host.deploy(&app, &flags).id;
    host.end_daemon(Signal::SIGKILL);
    assert_eq!(host.deploy(&app, &flags).id, first);
    assert_eq!(host.list(&[]).len(), 1);
}

/// The first sandbox of all boots a template, which takes seconds; who asked for it may not wait for that.
#[test]
fn a_creation_that_is_broken_off_leaves_no_machine() {
    let host = Host::of_an_ordinary_user();
    let create = ["create", "--size-class", "micro"];
    for patience in [1500, 3000] {
        let mut asking = host.command().args(create).stderr(Stdio::null()).spawn().expect("create");
        std::thread::sleep(Duration::from_millis(patience));
        kill(Pid::from_raw(asking.id() as i32), Signal::SIGINT).expect("Ctrl-C");
        asking.wait().expect("end");
    }
    assert_eq!(host.create(&[]).sh("echo whole").out(), "whole");
    eventually("what was broken off is gone", || (leaks::machines_of(host.scratch()).len() == 1).then_some(()));
    assert_eq!(host.list(&[]).len(), 1);
}
