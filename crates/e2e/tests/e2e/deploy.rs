//! `heyvm deploy`: from a directory to a URL that answers, or to an error that names the step.

use std::fs;

use heyvm_e2e::{Host, Ran, apps::WEB_FLAGS, eventually, http, leaks};

#[test]
fn answers_the_json_of_the_documentation() {
    let host = Host::new();
    let app = host.app("my-app", &[("health", "ok\n"), ("index.html", "<h1>mine</h1>\n")]);
    let start = "python3 -m http.server 8080";
    let vm = host.deploy(
        &app,
        &["--name", "my-agent-sandbox", "--port", "8080", "--start-command", start, "--health-path", "/health"],
    );

    assert_eq!(vm.made["name"], "my-agent-sandbox");
    assert_eq!(vm.made["status"], "running");
    assert!(vm.made["archive_id"].as_str().expect("archive_id").starts_with("ar-"));
    let endpoint = &vm.made["urls"][0];
    let subdomain = endpoint["subdomain"].as_str().expect("subdomain");
    let hostname = endpoint["hostname"].as_str().expect("hostname");
    assert!(hostname.starts_with(&format!("{subdomain}.")), "{endpoint}");
    assert!(endpoint["url"].as_str().expect("url").starts_with(&format!("http://{hostname}")), "{endpoint}");
    assert_eq!((&endpoint["port"], &endpoint["is_public"]), (&8080.into(), &true.into()));
    assert_eq!(vm.get("/").text(), "<h1>mine</h1>");

    let listed = &host.list(&[])[0];
    assert_eq!(listed["id"], vm.made["id"]);
    assert_eq!(listed["is_deployed"], true);
    assert_eq!(listed["region"], "US");
    assert_eq!(listed["urls"], vm.made["urls"]);
    assert!(!listed["image"].as_str().expect("image").is_empty());
}

#[test]
fn the_hello_example_answers() {
    let host = Host::new();
    let flags = ["--port", "8080", "--start-command", "python3 app.py", "--health-path", "/health"];
    let vm = host.deploy(&heyvm_e2e::apps::examples().join("hello"), &flags);
    assert!(vm.get("/").text().starts_with("Hello from "), "{}", vm.get("/").text());
}

#[test]
fn hooks_run_in_order_with_the_environment_before_the_start_command() {
    let host = Host::new();
    let hook = |text: &str| format!("echo {text} $COLOUR >> order");
    let (first, second) = (hook("one"), hook("two"));
    let start = "echo three >> order; exec python3 web.py";
    let vm = host.deploy(
        &host.web_app(),
        &[
            "--env",
            "COLOUR=dark blue=9",
            "--env",
            "EMPTY=",
            "--setup-hook",
            &first,
            "--setup-hook",
            &second,
            "--port",
            "8080",
            "--start-command",
            start,
            "--health-path",
            "/health",
        ],
    );
    assert_eq!(vm.sh("cat /workspace/order").out(), "one dark blue=9\ntwo dark blue=9\nthree");
    let environment = vm.get("/env").json();
    assert_eq!((&environment["COLOUR"], &environment["EMPTY"]), (&"dark blue=9".into(), &"".into()));
    assert_eq!(vm.sh("echo $COLOUR").out(), "dark blue=9", "exec has the sandbox's environment, too");
}

#[test]
fn a_failing_hook_is_named_with_its_output_and_nothing_is_left() {
    let host = Host::new();
    let flags = [
        "--name",
        "doomed",
        "--setup-hook",
        "true",
        "--setup-hook",
        "echo about to fail; echo why >&2; exit 7",
        "--port",
        "8080",
    ];
    let refusal = host.deploy_refused(&host.web_app(), &flags);
    assert_eq!((refusal.code.as_str(), refusal.step.as_str()), ("setup_hook_failed", "setup_hook"));
    assert!(refusal.log_tail.contains("about to fail") && refusal.log_tail.contains("why"), "{:?}", refusal.error);
    assert!(host.names(&[]).is_empty());
    assert_eq!(leaks::machines_of(host.scratch()).len(), 0);
    assert_eq!(leaks::sandboxes_of(&host.home).len(), 0);
    // What it was is still told of.
    let told = host.json(&["get", "doomed"]);
    assert_eq!((&told["status"], &told["reason"]["code"]), (&"removed".into(), &"failed_step".into()), "{told}");
}

#[test]
fn keep_on_failure_keeps_the_sandbox_to_look_into() {
    let host = Host::new();
    let flags =
        ["--name", "kept", "--keep-on-failure", "--setup-hook", "echo evidence > found; exit 3", "--port", "8080"];
    let refusal = host.deploy_refused(&host.web_app(), &flags);
    assert_eq!(refusal.code, "setup_hook_failed");
    assert!(refusal.error["sandbox_id"].is_string(), "{:?}", refusal.error);
    let told = host.json(&["get", "kept"]);
    assert_eq!((&told["status"], &told["reason"]["code"]), (&"failed".into(), &"failed_step".into()), "{told}");
    assert_eq!(leaks::sandboxes_of(&host.home).len(), 1);
}

#[test]
fn a_start_command_that_exits_at_once_is_told_with_its_last_words() {
    let host = Host::new();
    let flags = ["--port", "8080", "--start-command", "echo cannot open database; exit 4", "--health-path", "/health"];
    let refusal = host.deploy_refused(&host.web_app(), &flags);
    assert_eq!((refusal.code.as_str(), refusal.step.as_str()), ("start_command_failed", "start_command"));
    assert!(refusal.log_tail.contains("cannot open database"), "{:?}", refusal.error);
    assert!(refusal.message.contains('4'), "{}", refusal.message);
    assert!(host.names(&[]).is_empty());
}

#[test]
fn a_health_check_that_never_passes_names_the_step_and_leaves_nothing() {
    let host = Host::new();
    let start = "echo serving nothing; sleep 600";
    let flags = ["--port", "8080", "--start-command", start, "--health-path", "/health", "--health-timeout", "3s"];
    let refusal = host.deploy_refused(&host.web_app(), &flags);
    assert_eq!((refusal.code.as_str(), refusal.step.as_str()), ("health_timeout", "health"));
    assert!(refusal.log_tail.contains("serving nothing"), "{:?}", refusal.error);
    assert!(host.names(&[]).is_empty());
    assert_eq!(leaks::sandboxes_of(&host.home).len(), 0);
}

#[test]
fn an_unhealthy_status_is_not_ready() {
    let host = Host::new();
    let flags = [
        "--port",
        "8080",
        "--start-command",
        "python3 web.py",
        "--health-path",
        "/no-such-page",
        "--health-timeout",
        "3s",
    ];
    assert_eq!(host.deploy_refused(&host.web_app(), &flags).code, "health_timeout");
}

#[test]
fn ignored_files_stay_behind() {
    let host = Host::new();
    let app = host.app(
        "app",
        &[
            ("web.py", "print()"),
            (".gitignore", "*.log\n"),
            (".heyvmignore", "secret\n"),
            ("debug.log", "x"),
            ("secret", "x"),
            (".git/config", "x"),
            ("node_modules/left/pad.js", "x"),
            ("target/binary", "x"),
            ("src/kept.txt", "x"),
        ],
    );
    fs::write(app.join("run.sh"), "#!/bin/sh\necho ran\n").expect("file");
    fs::set_permissions(app.join("run.sh"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("mode");
    std::os::unix::fs::symlink("src/kept.txt", app.join("link")).expect("link");

    let vm = host.deploy(&app, &["--name", "lean"]);
    let found = vm.sh("find . -mindepth 1 ! -type d | sort").out();
    assert_eq!(
        found.lines().filter(|line| !line.ends_with("ignore")).collect::<Vec<_>>(),
        ["./link", "./run.sh", "./src/kept.txt", "./web.py"]
    );
    assert_eq!(vm.sh("./run.sh; readlink link").out(), "ran\nsrc/kept.txt");

    let whole = host.deploy(&app, &["--name", "whole", "--no-ignore"]);
    whole.sh("test -f debug.log && test -f secret && test -f node_modules/left/pad.js && test -f .git/config");
}

#[test]
fn logs_keep_and_follow_what_the_start_command_prints() {
    let host = Host::new();
    let start = "echo first; echo to stderr >&2; for i in 1 2 3; do sleep 0.5; echo tick $i; done; exec sleep 600";
    let vm = host.create(&["--start-command", start]);
    let follower = std::thread::scope(|scope| {
        let follower = scope.spawn(|| host.run(&["logs", "-f", &vm.id]));
        eventually("the log is written", || host.run(&["logs", &vm.id]).out().contains("tick 3").then_some(()));
        vm.does("stop");
        follower.join().expect("follower")
    });
    assert_eq!(follower.succeeded().out().lines().filter(|line| line.starts_with("tick")).count(), 3);
    let log = host.run(&["logs", &vm.id]).succeeded();
    let all = format!("{}\n{}", log.out(), log.err());
    assert!(all.contains("first") && all.contains("to stderr"), "{all}");
    vm.does("rm");
    assert!(host.run(&["logs", &vm.id]).succeeded().out().contains("tick 3"), "kept for a day after the end");
}

#[test]
fn the_same_idempotency_key_gives_the_same_sandbox() {
    let host = Host::new();
    let app = host.web_app();
    let mut flags = vec!["--name", "once", "--idempotency-key", "job-17"];
    flags.extend(WEB_FLAGS);
    let (first, second) = std::thread::scope(|scope| {
        let first = scope.spawn(|| host.deploy(&app, &flags).id);
        let second = scope.spawn(|| host.deploy(&app, &flags).id);
        (first.join().expect("first"), second.join().expect("second"))
    });
    assert_eq!(first, second);
    assert_eq!(host.deploy(&app, &flags).id, first, "also later");
    assert_eq!(host.list(&[]).len(), 1);

    let other = host.deploy_refused(&app, &["--name", "another", "--idempotency-key", "job-17"]);
    assert_eq!(other.code, "idempotency_key_reused");
}

#[test]
fn several_ports_have_a_url_each() {
    let host = Host::new();
    let start = "PORT=9000 python3 web.py & exec python3 web.py";
    let vm = host.deploy(
        &host.web_app(),
        &["--port", "8080", "--port", "9000", "--start-command", start, "--health-path", "/health"],
    );
    let urls = vm.made["urls"].as_array().expect("urls").clone();
    assert_eq!(urls.iter().map(|url| url["port"].as_u64().expect("port")).collect::<Vec<_>>(), [8080, 9000]);
    for url in urls {
        let url = format!("{}/health", url["url"].as_str().expect("url"));
        eventually(&url, || http::try_get(&url).ok().filter(|answer| answer.text() == "ok"));
    }
}

#[test]
fn text_mode_tells_the_url_and_progress_stays_off_standard_output() {
    let host = Host::new();
    let app = host.web_app();
    let mut arguments = vec!["deploy", app.to_str().expect("path"), "--size-class", "micro"];
    arguments.extend(WEB_FLAGS);
    let told = host.run(&arguments).succeeded();
    assert!(told.out().contains("http://"), "{}", told.out());
    assert!(!told.out().contains('\u{1b}'), "no terminal codes on standard output");
}

#[test]
fn what_takes_long_shows_on_a_terminal() {
    let host = Host::new();
    let app = host.web_app();
    let mut command = host.command();
    command.arg("deploy").arg(&app).args(["--size-class", "micro", "--setup-hook", "sleep 4"]);
    let (code, shown) = Ran::on_terminal(&mut command, 100);
    assert_eq!(code, 0, "{shown}");
    assert!(shown.contains("sleep 4"), "the hook that runs is told: {shown:?}");
}

#[test]
fn deployed_files_are_of_today() {
    let host = Host::new();
    let vm = host.deploy(&host.web_app(), &[]);
    assert_eq!(vm.sh("find /workspace -name web.py -newermt '-1 hour' | wc -l").out(), "1");
}
