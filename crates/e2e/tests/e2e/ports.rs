//! `wait-for`, `bind`, `unbind`.

use std::{
    io::{BufRead, BufReader},
    process::Stdio,
    time::Duration,
};

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
    assert!(nothing.took > Duration::from_secs(2), "{:?}", nothing.took);
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
    eventually("the URL answers", || {
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

/// A server with a certificate of its own making: ready for those who trust it, and for nobody else.
#[test]
fn wait_for_an_https_url_that_is_trusted() {
    let host = Host::new();
    let directory = host.app("tls", &[("health", "ok")]);
    let (key, certificate) = (directory.join("key.pem"), directory.join("cert.pem"));
    let mut openssl = std::process::Command::new("openssl");
    openssl.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]);
    openssl.args(["-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE"]);
    Ran::of(openssl.arg("-keyout").arg(&key).arg("-out").arg(&certificate), b"").succeeded();
    let serve = "import http.server, ssl, sys\n\
                 server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), http.server.SimpleHTTPRequestHandler)\n\
                 context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)\n\
                 context.load_cert_chain('cert.pem', 'key.pem')\n\
                 server.socket = context.wrap_socket(server.socket, server_side=True)\n\
                 print(server.server_address[1], flush=True)\n\
                 server.serve_forever()";
    let mut server = std::process::Command::new("/usr/bin/python3");
    server.args(["-c", serve]).current_dir(&directory).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut server = server.spawn().expect("a server");
    let mut port = String::new();
    BufReader::new(server.stdout.take().expect("piped")).read_line(&mut port).expect("port");
    let url = format!("https://localhost:{}/health", port.trim());
    let wait = |trusted: Option<&std::path::Path>, timeout: &str| {
        let mut command = host.command();
        command.args(["wait-for", "--url", &url, "--timeout", timeout, "--format", "json"]);
        trusted.map(|file| command.env("SSL_CERT_FILE", file));
        Ran::of(&mut command, b"")
    };
    let (trusted, untrusted) = (wait(Some(&certificate), "20s"), wait(None, "1s"));
    server.kill().expect("kill");
    server.wait().expect("wait");
    assert_eq!(trusted.succeeded().json(), serde_json::json!({"ready": true, "url": url}));
    assert_eq!(untrusted.exited(1).json()["ready"], false);
}
