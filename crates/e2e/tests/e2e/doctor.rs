//! `heyvm doctor`, `--help`, completions.

use heyvm_e2e::Host;

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
        "deploy", "create", "exec", "list", "get", "wait-for", "bind", "unbind", "logs", "stop", "start", "restart",
        "rm", "images", "pull", "cp", "doctor",
    ] {
        let help = host.run(&[command, "--help"]).succeeded().out();
        assert!(help.contains("Example") && help.contains("heyvm "), "{command} --help has no example:\n{help}");
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(host.run(&["completions", shell]).succeeded().out().contains("wait-for"), "{shell}");
    }
    assert!(host.run(&["--version"]).succeeded().out().starts_with("heyvm "));
}
