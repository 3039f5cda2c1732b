//! Stop, start, restart, remove; names; time-to-live.

use std::{thread::sleep, time::Duration};

use heyvm_e2e::{Host, apps::WEB_FLAGS, eventually, http, leaks};
use nix::sys::signal::Signal;

#[test]
fn several_sandboxes_stop_and_start_at_once() {
    let host = Host::new();
    let [one, two] = ["one", "two"].map(|name| host.create(&["--name", name, "--size-class", "micro"]));
    let stopped = host.json(&["stop", "one", "two"]);
    assert_eq!((&stopped[0]["status"], &stopped[1]["id"]), (&"stopped".into(), &two.id.as_str().into()));
    let refused = host.refused(&["start", "one", "nowhere"]);
    assert_eq!(refused.code, "sandbox_not_found");
    assert!(refused.message.contains("started before it: one"), "{}", refused.message);
    assert_eq!((one.status(), two.status()), ("running".into(), "stopped".into()));
    let ids = host.run(&["ps", "-a", "-q"]).succeeded().out();
    assert!(ids.lines().any(|id| id == one.id) && ids.lines().count() == 2, "{ids}");
    assert_eq!(host.json(&["rm", "-f", "one", "two"]).as_array().expect("both").len(), 2);
}

#[test]
fn stop_frees_the_machine_and_start_goes_on_from_the_disk_under_the_same_url() {
    let host = Host::new();
    let vm = host.deploy(&host.web_app(), &WEB_FLAGS);
    vm.sh(
        "echo precious > /workspace/kept; echo also > /etc/kept; mkdir -p /srv/deep/er; rm /etc/motd 2>/dev/null; sync",
    );
    assert_eq!(leaks::machines_of(host.scratch()).len(), 1);

    let stopped = vm.does("stop");
    assert_eq!((&stopped["id"], &stopped["status"]), (&vm.made["id"], &"stopped".into()));
    assert_eq!(leaks::machines_of(host.scratch()).len(), 0);
    assert_eq!(vm.info()["reason"]["code"], "stopped");
    assert_eq!(http::get(&vm.url("/health")).status, 502);
    assert_eq!(vm.does("stop")["status"], "stopped", "stopping a stopped one succeeds");
    assert_eq!(host.refused(&["exec", &vm.id, "--", "true"]).code, "invalid_state");
    assert!(host.names(&[]).is_empty());
    assert_eq!(host.list(&["--stopped"]).len(), 1);

    let started = vm.does("start");
    assert_eq!(started["status"], "running");
    assert_eq!(started["urls"], vm.made["urls"]);
    assert_eq!(vm.sh("cat /workspace/kept /etc/kept; ls /srv/deep").out(), "precious\nalso\ner");
    eventually("the app serves again", || http::try_get(&vm.url("/health")).ok().filter(|answer| answer.status == 200));
    assert_eq!(vm.does("start")["status"], "running", "starting a running one succeeds");
}

#[test]
fn restart_is_a_new_machine_on_the_same_disk() {
    let host = Host::new();
    let vm = host.create(&["--start-command", "date +%s.%N >> /workspace/starts; exec sleep 600"]);
    vm.sh("touch /tmp/from-before");
    eventually("the start command ran", || (vm.exec(&["test", "-s", "/workspace/starts"]).code == 0).then_some(()));
    let boot = vm.sh("cat /proc/sys/kernel/random/boot_id").out();
    assert_eq!(vm.does("restart")["status"], "running");
    eventually("the start command ran twice", || {
        (vm.sh("wc -l < /workspace/starts").out().trim() == "2").then_some(())
    });
    assert_ne!(vm.sh("cat /proc/sys/kernel/random/boot_id").out(), boot);
}

#[test]
fn what_was_written_just_before_a_stop_is_there_after_the_start() {
    let host = Host::new();
    let vm = host.create(&[]);
    vm.sh("head -c 5000000 /dev/urandom > /workspace/data; sha256sum /workspace/data > /workspace/sum");
    vm.does("stop");
    vm.does("start");
    vm.sh("cd /workspace && sha256sum -c sum");
}

#[test]
fn removal_takes_everything_and_is_told_of() {
    let host = Host::new();
    let vm = host.deploy(&host.web_app(), &WEB_FLAGS);
    let url = vm.url("/health");
    vm.does("rm");
    assert_eq!(leaks::sandboxes_of(&host.home).len(), 0);
    assert_eq!(leaks::machines_of(host.scratch()).len(), 0);
    assert_eq!(http::get(&url).status, 404);
    assert!(host.names(&[]).is_empty());
    let told = vm.info();
    assert_eq!((&told["status"], &told["reason"]["code"]), (&"removed".into(), &"removed".into()));
    assert_eq!(host.list(&["--all"]).len(), 1);
    vm.does("rm"); // removing a removed one succeeds
}

#[test]
fn a_name_is_taken_only_while_its_sandbox_lives() {
    let host = Host::new();
    let first = host.create(&["--name", "worker"]);
    let refusal = host.refused(&["create", "--name", "worker"]);
    assert_eq!(refusal.code, "name_taken");
    first.does("stop");
    assert_eq!(host.json(&["get", "worker"])["id"], first.id, "no living one: the newest stopped one");
    let second = host.create(&["--name", "worker"]);
    assert_ne!(first.id, second.id);
    assert_eq!(host.json(&["get", "worker"])["id"], second.id, "the living one");
    second.does("stop");
    assert_eq!(host.json(&["get", "worker"])["id"], second.id, "the newest of the stopped ones");
    first.does("start");
    assert_eq!(host.json(&["get", "worker"])["id"], first.id);
    assert_eq!(host.refused(&["start", &second.id]).code, "name_taken");
}

#[test]
fn a_name_a_slug_and_an_id_all_mean_the_sandbox() {
    let host = Host::new();
    let vm = host.create(&["--name", "My_App", "--slug", "own-slug"]);
    for who in [vm.id.as_str(), "My_App", "own-slug"] {
        assert_eq!(host.json(&["get", who])["id"], vm.id, "{who}");
    }
    assert_eq!(host.create(&["--name", "Other.App"]).info()["slug"], "other-app");
}

#[test]
fn at_the_end_of_its_time_a_sandbox_is_gone() {
    let host = Host::new();
    let app = host.web_app();
    let mut flags = WEB_FLAGS.to_vec();
    flags.extend(["--ttl-seconds", "45"]);
    let vm = host.deploy(&app, &flags);
    assert_eq!(vm.info()["ttl_seconds"], 45);
    let url = vm.url("/health");
    let reason = vm.becomes("removed");
    assert_eq!(reason["code"], "ttl_expired");
    assert_eq!(leaks::machines_of(host.scratch()).len(), 0);
    assert_eq!(leaks::sandboxes_of(&host.home).len(), 0);
    assert_eq!(http::get(&url).status, 404);
    assert!(host.names(&[]).is_empty());
}

#[test]
fn the_time_of_a_stopped_sandbox_runs_on() {
    let host = Host::new();
    let vm = host.create(&["--ttl-seconds", "20"]);
    vm.does("stop");
    assert_eq!(vm.becomes("removed")["code"], "ttl_expired");
    assert_eq!(leaks::sandboxes_of(&host.home).len(), 0);
}

#[test]
fn time_runs_out_while_the_daemon_is_down_too() {
    let host = Host::new();
    let vm = host.create(&["--ttl-seconds", "15"]);
    host.end_daemon(Signal::SIGKILL);
    assert_eq!(leaks::machines_of(host.scratch()).len(), 1, "the machine survives its daemon");
    sleep(Duration::from_secs(16));
    assert_eq!(vm.becomes("removed")["code"], "ttl_expired");
    assert_eq!(leaks::machines_of(host.scratch()).len(), 0);
    assert_eq!(leaks::sandboxes_of(&host.home).len(), 0);
}

#[test]
fn a_stopped_sandbox_gives_its_network_back_once() {
    let host = Host::new();
    let stopped = host.create(&[]);
    stopped.does("stop");
    let living = host.create(&[]);
    stopped.does("rm");
    let next = host.create(&[]);
    let address = |vm: &heyvm_e2e::Vm<'_>| vm.sh("hostname -I").out();
    assert_ne!(address(&living), address(&next));
}

#[test]
fn a_daemon_holds_nothing_of_the_command_that_started_it() {
    let host = Host::new();
    let (reader, writer) = std::io::pipe().expect("pipe");
    let held = nix::unistd::dup(&writer).expect("a descriptor that is inherited");
    host.list(&[]);
    assert!(host.daemon().is_some());
    drop((writer, held));
    // The end of the pipe comes only when nobody else has it.
    let read = std::thread::spawn(move || std::io::Read::read_to_end(&mut { reader }, &mut Vec::new()));
    eventually("the pipe ends", || read.is_finished().then_some(()));
}

#[test]
fn commands_are_served_while_a_daemon_ends() {
    let host = Host::new();
    let vm = host.create(&[]);
    for _ in 0..3 {
        let daemon = host.daemon().expect("a daemon");
        nix::sys::signal::kill(daemon, nix::sys::signal::Signal::SIGTERM).expect("signal");
        // It listens no more by then, and ends a while later.
        std::thread::sleep(std::time::Duration::from_millis(500));
        std::thread::scope(|scope| {
            let asking: Vec<_> = (0..4).map(|_| scope.spawn(|| vm.status())).collect();
            for asked in asking {
                assert_eq!(asked.join().expect("answered"), "running");
            }
        });
    }
}
