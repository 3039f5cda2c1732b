//! The first app of a new user: the obvious hook works at the first try on the default image, also behind a host with a
//! certificate authority of its own.

use std::{fs, process::Command};

use heyvm_e2e::{Host, Ran};

#[test]
fn a_python_app_installs_what_it_needs() {
    let host = Host::new();
    let app = host.app(
        "app",
        &[
            ("requirements.txt", "flask\nrequests\n"),
            (
                "app.py",
                "from flask import Flask\napp = Flask(__name__)\n@app.get('/')\ndef hello(): return 'hello from flask'\n\
                 app.run(host='127.0.0.1', port=8080)\n",
            ),
        ],
    );
    let start = ["--port", "8080", "--start-command", "python app.py"];
    let vm = host.deploy(&app, &[&["--setup-hook", "pip install -r requirements.txt"][..], &start[..]].concat());
    assert_eq!(vm.get("/").text(), "hello from flask");
    // Each with its own idea of where authorities are.
    let everyone = "set -e\n\
        export INDEX=$(python -c 'from pip._internal.models.index import PyPI; print(PyPI.simple_url)')/flask/\n\
        curl -sSf -o /dev/null $INDEX\n\
        python -c 'import os, urllib.request as u; u.urlopen(os.environ[\"INDEX\"])'\n\
        python -c 'import os, requests; requests.get(os.environ[\"INDEX\"]).raise_for_status()'\n";
    vm.sh(everyone).succeeded();
}

#[test]
fn a_node_app_installs_what_it_needs() {
    let host = Host::new();
    let lock = r#"{"name": "app", "version": "1.0.0", "lockfileVersion": 3, "requires": true, "packages": {
        "": {"name": "app", "version": "1.0.0", "dependencies": {"ms": "2.1.3"}},
        "node_modules/ms": {"version": "2.1.3",
        "integrity": "sha512-6FlzubTLZG3J2a/NVCAleEhjzq5oxgHyaCU9yYXvcLsvoVaHJq/s5xXI6/XXP6tz7R9xAOtHnSO/tXtF3WRTlA=="}}}"#;
    let package = r#"{"name": "app", "version": "1.0.0", "dependencies": {"ms": "2.1.3"}}"#;
    let app = host.app("node", &[("package.json", package), ("package-lock.json", lock)]);
    let vm = host.deploy(&app, &["--setup-hook", "npm ci"]);
    assert_eq!(vm.exec(&["node", "-p", "require('ms')('2 days')"]).succeeded().out(), "172800000");
    // Node ends once the whole answer is read.
    let fetched = "fetch(process.argv[1] + 'ms').then(async r => console.log(r.status, !!await r.text()))";
    assert_eq!(vm.sh(&format!("node -e \"{fetched}\" $(npm config get registry)")).succeeded().out(), "200 true");
}

#[test]
fn the_default_image_has_what_hooks_call() {
    let host = Host::new();
    let vm = host.create(&[]);
    let wanted = "python python3 pip node npm git curl wget sudo less jq unzip nano ssh";
    let missing = vm.sh(&format!("for p in {wanted}; do command -v $p >/dev/null || echo $p; done"));
    assert_eq!(missing.succeeded().out(), "");
    vm.sh("python3 -m venv /tmp/venv && test -x /tmp/venv/bin/pip && ! ls /usr/lib/python3*/EXTERNALLY-MANAGED")
        .succeeded();
}

#[test]
fn certificates_of_the_host_are_known_to_programs_in_sandboxes() {
    let host = Host::new();
    let authority = host.scratch().join("authority.pem");
    let openssl = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "9"];
    let made = ["-subj", "/CN=Authority of the test", "-keyout", "/dev/null", "-out"];
    Ran::of(Command::new("openssl").args(openssl).args(made).arg(&authority), b"").succeeded();
    host.configure(&format!("[network]\ncertificates = [\"{}\"]\n", authority.display()));
    let vm = host.create(&["--env", "CURL_CA_BUNDLE=/mine"]);
    let body = fs::read_to_string(&authority).expect("file");
    let line = body.lines().nth(2).expect("a line of the certificate");
    let holds = |file: &str| assert_eq!(vm.exec(&["grep", "-c", "-F", line, file]).succeeded().out(), "1", "{file}");
    holds("/etc/ssl/certs/ca-certificates.crt");
    holds(&vm.sh("echo $NODE_EXTRA_CA_CERTS").out());
    assert_eq!(vm.sh("echo $SSL_CERT_FILE $CURL_CA_BUNDLE").out(), "/etc/ssl/certs/ca-certificates.crt /mine");
    let before = vm.sh("grep -c BEGIN /etc/ssl/certs/ca-certificates.crt").out();
    // The distribution's own tool writes the bundle again, and a restart adds nothing twice.
    vm.sh("update-ca-certificates").succeeded();
    vm.does("restart");
    assert_eq!(vm.sh("grep -c BEGIN /etc/ssl/certs/ca-certificates.crt").out(), before);
    holds("/etc/ssl/certs/ca-certificates.crt");
}
