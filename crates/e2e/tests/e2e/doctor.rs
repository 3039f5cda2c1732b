//! `heyvm doctor`, `--help`, completions.

use std::time::Duration;

use heyvm_e2e::{
    Host,
    host::{program, test_home},
    run::Ran,
};
use heyvm_images::{ImageStore, RegistryConfig};
use heyvm_jail::root;
use heyvm_vm::qemu::accel::{Acceleration, Trial, boots};
use nix::sys::signal::Signal;

#[test]
fn says_whether_kvm_works_and_why() {
    let host = Host::new();
    let report = host.json(&["doctor"]);
    assert_eq!(report["ok"], true, "{report}");
    let checks = report["checks"].as_array().expect("checks");
    let kvm = checks.iter().find(|check| check["name"] == "kvm").expect("a check named kvm");
    match report["acceleration"].as_str() {
        Some("kvm") => assert_eq!(kvm["status"], "ok"),
        Some("tcg") => {
            assert_eq!(kvm["status"], "warn");
            assert!(kvm["message"].as_str().is_some_and(|why| !why.is_empty()) && kvm["hint"].is_string(), "{kvm}");
        }
        other => panic!("acceleration is {other:?}"),
    }
    let text = host.run(&["doctor"]).succeeded().out();
    assert!(text.contains("kvm"), "{text}");
    // The verdict holds for real: a guest boots with it.
    assert_eq!(host.create(&[]).sh("echo booted").out(), "booted");
}

#[test]
fn says_what_is_missing_where_nothing_is_prepared() {
    let host = Host::bare();
    let report = host.run(&["--format", "json", "doctor"]).json();
    assert_eq!(report["ok"], false, "{report}");
    let failed: Vec<_> =
        report["checks"].as_array().expect("checks").iter().filter(|check| check["status"] == "fail").collect();
    assert!(!failed.is_empty() && failed.iter().all(|check| check["hint"].is_string()), "{report}");
    assert_eq!(host.refused(&["create"]).code, "host_not_ready");
}

#[test]
fn every_command_has_help_with_an_example() {
    let host = Host::bare();
    for command in [
        "deploy",
        "create",
        "exec",
        "list",
        "get",
        "wait-for",
        "bind",
        "unbind",
        "port-forward",
        "logs",
        "stop",
        "start",
        "restart",
        "rm",
        "images",
        "pull",
        "cp",
        "doctor",
    ] {
        let help = host.run(&[command, "--help"]).succeeded().out();
        assert!(help.contains("Example") && help.contains("heyvm "), "{command} --help has no example:\n{help}");
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(host.run(&["completions", shell]).succeeded().out().contains("HEYVM_COMPLETE"), "{shell}");
    }
    assert!(host.run(&["--version"]).succeeded().out().starts_with("heyvm "));
    assert!(host.run(&["version"]).succeeded().out().starts_with("heyvm "));
    assert!(host.run(&["version", "--format", "json"]).json()["version"].is_string());
    let alone = host.run(&[]).succeeded().out();
    assert!(alone.contains("Usage: heyvm") && alone.contains("deploy"), "{alone}");
}

/// What bash completes in a line that ends with `word`.
fn completed(host: &Host, line: &str) -> Vec<String> {
    let script = format!(
        "source <(heyvm completions bash); COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
         _clap_complete_heyvm heyvm \"${{COMP_WORDS[COMP_CWORD]}}\"; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    );
    let mut bash = std::process::Command::new("bash");
    host.environment(&mut bash);
    let programs = program().parent().expect("a directory").display().to_string();
    bash.args(["-c", &script]).env("PATH", format!("{programs}:{}", std::env::var("PATH").expect("PATH")));
    Ran::of(&mut bash, b"").succeeded().out().lines().map(|line| line.trim().to_owned()).collect()
}

#[test]
fn bash_completes_commands_names_and_sizes() {
    let host = Host::new();
    assert!(completed(&host, "heyvm wai").contains(&"wait-for".to_owned()));
    let vm = host.create(&["--name", "completed-by-name", "--size-class", "micro"]);
    assert_eq!(completed(&host, "heyvm stop comp"), ["completed-by-name"]);
    assert_eq!(completed(&host, "heyvm create --size-class mi"), ["micro", "mini"]);
    // A key press starts no daemon.
    host.end_daemon(Signal::SIGTERM);
    assert_eq!(completed(&host, "heyvm stop comp"), Vec::<String>::new());
    assert!(host.daemon().is_none());
    assert_eq!(vm.status(), "running");
}

/// Both verdicts, on real guests: one that starts, and one that has not by the deadline, as on a KVM that only opens.
#[tokio::test]
async fn the_probe_tells_a_guest_that_starts_from_one_that_does_not() {
    let home = test_home();
    let images = ImageStore::open(&home, RegistryConfig::default()).expect("images");
    let kernel = images.kernel().await.expect("a kernel");
    let scratch = tempfile::tempdir().expect("directory");
    let tried = tokio::task::spawn_blocking(move || {
        let root = root::prepare(&home.join("jail")).expect("a jail");
        let id_file = scratch.path().join("trial.pid");
        [Duration::from_secs(60), Duration::from_millis(1)]
            .map(|deadline| boots(Acceleration::Tcg, &program(), &root, &kernel, &id_file, deadline).expect("a trial"))
    });
    assert_eq!(tried.await.expect("tried"), [Trial::Started, Trial::Silent]);
}
