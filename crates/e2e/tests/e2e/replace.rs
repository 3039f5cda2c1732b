//! `deploy --replace`: a new version under the same name and URLs, the old one serving until the new one is healthy.

use std::{
    fs,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::Duration,
};

use heyvm_e2e::{Host, apps::WEB_FLAGS, http};

fn flags<'a>(extra: &[&'a str]) -> Vec<&'a str> {
    let mut flags = vec!["--name", "shop"];
    flags.extend(WEB_FLAGS);
    flags.extend(extra);
    flags
}

#[test]
fn no_request_fails_while_the_version_changes() {
    let host = Host::new();
    let app = host.web_app();
    fs::write(app.join("version"), "one").expect("file");
    let old = host.deploy(&app, &flags(&[]));
    let url = old.url("/version");
    assert_eq!(http::get(&url).text(), "one");

    fs::write(app.join("version"), "two").expect("file");
    let (done, asked) = (AtomicBool::new(false), AtomicUsize::new(0));
    let new = std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut answers = Vec::new();
            while !done.load(Ordering::Relaxed) {
                answers.push(
                    http::try_get(&url).map(|answer| (answer.status, answer.text())).map_err(|error| error.to_string()),
                );
                asked.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(20));
            }
            answers
        });
        let new = host.deploy(&app, &flags(&["--replace", "--setup-hook", "sleep 1"]));
        std::thread::sleep(Duration::from_millis(500));
        done.store(true, Ordering::Relaxed);
        for answer in asking.join().expect("asking") {
            let (status, text) = answer.expect("every request is answered");
            assert!(status == 200 && (text == "one" || text == "two"), "{status} {text}");
        }
        new
    });
    assert!(asked.load(Ordering::Relaxed) > 20);
    assert_ne!(new.id, old.id);
    assert_eq!(new.made["urls"], old.made["urls"]);
    assert_eq!(http::get(&url).text(), "two");
    assert_eq!(old.becomes("removed")["code"], "replaced");
    assert_eq!(host.names(&[]), ["shop"]);
}

#[test]
fn a_version_that_fails_changes_nothing() {
    let host = Host::new();
    let app = host.web_app();
    fs::write(app.join("version"), "good").expect("file");
    let old = host.deploy(&app, &flags(&[]));
    let refusal = host.deploy_refused(
        &app,
        &["--name", "shop", "--replace", "--port", "8080", "--start-command", "exit 1", "--health-path", "/health"],
    );
    assert_eq!(refusal.code, "start_command_failed");
    assert_eq!(old.get("/version").text(), "good");
    assert_eq!(host.json(&["get", "shop"])["id"], old.id);
    assert_eq!(host.list(&[]).len(), 1);
}

#[test]
fn with_nothing_to_replace_it_is_a_deploy() {
    let host = Host::new();
    let vm = host.deploy(&host.web_app(), &flags(&["--replace"]));
    assert_eq!(vm.get("/health").status, 200);
}
