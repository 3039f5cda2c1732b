//! `wait-for`, `bind`, `unbind`.

use std::time::Duration;

use heyvm_e2e::{Host, Ran, apps::WEB_FLAGS, eventually, http};

#[test]
fn wait_for_a_port_inside() {
    let host = Host::new();
    let app = host.web_app();
    let vm = host.deploy(&app, &["--start-command", "sleep 2; exec python3 web.py"]);
    let ready = host.json(&["wait-for", &vm.id, "8080", "--path", "/health", "--timeout", "30s"]);
    assert_eq!(ready, serde_json::json!({"ready": true, "port": 8080}));
    assert_eq!(host.json(&["wait-for", &vm.id, "8080", "--timeout", "5s"])["ready"], true);
}

#[test]
fn wait_for_says_false_at_the_deadline() {
    let host = Host::new();
    let vm = host.deploy(&host.web_app(), &WEB_FLAGS);
    let nothing = host.run(&["wait-for", &vm.id, "9999", "--timeout", "2s", "--format", "json"]).exited(1);
    assert_eq!(nothing.json(), serde_json::json!({"ready": false, "port": 9999}));
    assert!(nothing.took > Duration::from_secs(2) && nothing.took < Duration::from_secs(10), "{:?}", nothing.took);
    let unhealthy = host
        .run(&["wait-for", &vm.id, "8080", "--path", "/no-such-page", "--timeout", "2s", "--format", "json"])
        .exited(1);
    assert_eq!(unhealthy.json()["ready"], false);
}

#[test]
fn wait_for_a_url_goes_through_the_proxy() {
    let host = Host::new();
    let app = host.web_app();
    let vm = host.deploy(&app, &["--port", "8080", "--start-command", "sleep 2; exec python3 web.py"]);
    let url = vm.url("/health");
    let ready = host.json(&["wait-for", "--url", &url, "--timeout", "30s"]);
    assert_eq!(ready, serde_json::json!({"ready": true, "url": url}));
    let missing = url.replacen("http://", "http://no-such-", 1);
    let not = host.run(&["wait-for", "--url", &missing, "--timeout", "1s", "--format", "json"]).exited(1);
    assert_eq!(not.json(), serde_json::json!({"ready": false, "url": missing}));
}

#[test]
fn bind_gives_a_url_and_unbind_takes_it() {
    let host = Host::new();
    let vm = host.deploy(&host.web_app(), &["--start-command", "PORT=3000 exec python3 web.py"]);
    assert_eq!(vm.made["urls"], serde_json::json!([]), "an array, never null");
    let bound = host.json(&["bind", &vm.id, "3000"]);
    assert_eq!((&bound["port"], &bound["is_public"]), (&3000.into(), &true.into()));
    let url = bound["url"].as_str().expect("url").to_owned();
    eventually("the URL answers", 20, || {
        http::try_get(&format!("{url}/health")).ok().filter(|answer| answer.status == 200)
    });
    assert_eq!(host.json(&["bind", &vm.id, "3000"])["url"], bound["url"], "binding again gives the same URL");
    assert_eq!(vm.info()["urls"][0]["url"], bound["url"]);
    let other = host.json(&["bind", &vm.id, "3001"]);
    assert_ne!(other["subdomain"], bound["subdomain"]);

    Ran::of(host.command().args(["unbind", &vm.id, "3000"]), b"").succeeded();
    assert_eq!(http::get(&url).status, 404);
    assert_eq!(host.refused(&["unbind", &vm.id, "3000"]).code, "port_not_bound");
}
