//! Ways to a port beside its URL, and ports that are flooded.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use heyvm_e2e::{Host, apps::WEB_FLAGS, eventually, http};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(240);

/// A running `heyvm port-forward` and what it has printed.
struct Forward {
    child: Child,
    told: Value,
}

impl Forward {
    fn start(host: &Host, arguments: &[&str]) -> Self {
        let mut command = host.command();
        command.args(["port-forward", "--format", "json"]).args(arguments).stdout(Stdio::piped());
        let mut child = command.spawn().expect("heyvm");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut text = String::new();
        // One document, over several lines; it goes on running behind it.
        let told = loop {
            text += &lines.next().expect("it ended").expect("a line");
            if let Ok(told) = serde_json::from_str(&text) {
                break told;
            }
        };
        Self { child, told }
    }

    fn address(&self, number: usize) -> SocketAddr {
        self.told["forwards"][number]["listen"].as_str().expect("listen").parse().expect("address")
    }

    fn end(mut self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).expect("pid")), signal).expect("kill");
        let give_up = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
                break status;
            }
            assert!(Instant::now() < give_up, "it goes on");
            std::thread::sleep(Duration::from_millis(20));
        };
        assert!(status.success(), "{status}");
    }
}

/// A server for the line `word`: repeats what comes behind it, on the guest's loopback alone.
const ECHO: &str = "import socketserver\n\
    class Echo(socketserver.StreamRequestHandler):\n\
    \x20   def handle(self):\n\
    \x20       for line in self.rfile: self.wfile.write(b'echo ' + line)\n\
    socketserver.ThreadingTCPServer(('127.0.0.1', 5432), Echo).serve_forever()\n";

#[test]
fn ports_of_this_machine_lead_to_ports_of_a_sandbox() {
    let host = Host::new();
    let vm = host.deploy(&host.web_app(), &WEB_FLAGS);
    vm.sh(&format!("cat > /echo.py <<'END'\n{ECHO}END\nsetsid python3 /echo.py >/dev/null 2>&1 </dev/null &"));
    host.json(&["wait-for", &vm.id, "5432", "--timeout", "120s"]);

    let forward = Forward::start(&host, &[&vm.id, "0:5432", "0:8080"]);
    assert_eq!(forward.told["forwards"][0]["port"], 5432);
    let mut echo = TcpStream::connect(forward.address(0)).expect("connect");
    echo.set_read_timeout(Some(PATIENCE)).expect("time-out");
    echo.write_all(b"hello\n").expect("write");
    echo.shutdown(std::net::Shutdown::Write).expect("shutdown");
    let mut answer = String::new();
    echo.read_to_string(&mut answer).expect("read");
    assert_eq!(answer, "echo hello\n");
    assert_eq!(http::get(&format!("http://{}/health", forward.address(1))).status, 200);
    forward.end(Signal::SIGINT);

    // A port on which nothing listens: the connection ends, and the forwarding goes on.
    let forward = Forward::start(&host, &[&vm.id, "0:9"]);
    for _ in 0..2 {
        let mut nothing = TcpStream::connect(forward.address(0)).expect("connect");
        nothing.set_read_timeout(Some(PATIENCE)).expect("time-out");
        assert!(matches!(nothing.read(&mut [0]), Ok(0) | Err(_)));
    }
    forward.end(Signal::SIGTERM);
    assert_eq!(host.refused(&["port-forward", "no-such-sandbox", "80"]).code, "sandbox_not_found");
    assert_eq!(host.refused(&["port-forward", &vm.id, "x:80"]).code, "invalid_port");
}

#[test]
fn a_local_url_needs_no_resolver_and_stays_the_same() {
    let host = Host::new();
    let vm = host.deploy(&host.web_app(), &WEB_FLAGS);
    let local = |info: &Value| info["urls"][0]["local_url"].as_str().expect("local_url").to_owned();
    let url = local(&vm.info());
    assert!(url.starts_with("http://127.0.0.1:"), "{url}");
    assert_eq!(http::get(&format!("{url}/health")).status, 200);
    let python = format!("import urllib.request; print(urllib.request.urlopen('{url}/health').status)");
    let ran = std::process::Command::new("/usr/bin/python3").args(["-c", &python]).output().expect("python");
    assert_eq!(String::from_utf8_lossy(&ran.stdout).trim(), "200", "{ran:?}");

    host.end_daemon(Signal::SIGTERM);
    assert_eq!(local(&vm.info()), url, "with another daemon");
    eventually("the local URL answers again", || {
        http::try_get(&format!("{url}/health")).ok().filter(|answer| answer.status == 200)
    });
    host.json(&["unbind", &vm.id, "8080"]);
    assert!(http::try_get(&format!("{url}/health")).is_err(), "no one listens any more");
}

#[test]
fn a_flooded_port_keeps_neither_commands_nor_other_ports_waiting() {
    let host = Host::new();
    let vm = host.deploy(&host.web_app(), &WEB_FLAGS);
    let stuck = "import socket\n\
        s = socket.socket(); s.bind(('0.0.0.0', 8081)); s.listen(1024); kept = []\n\
        while True: kept.append(s.accept())\n";
    let loud = "import socket, threading\n\
        def answer(c):\n\
        \x20   c.recv(4096); c.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 1000000000000\\r\\n\\r\\n')\n\
        \x20   while True: c.sendall(b'x' * 65536)\n\
        s = socket.socket(); s.bind(('0.0.0.0', 8082)); s.listen(1024)\n\
        while True: threading.Thread(target=answer, args=(s.accept()[0],), daemon=True).start()\n";
    for (name, program, port) in [("stuck", stuck, "8081"), ("loud", loud, "8082")] {
        let start = format!("setsid python3 /{name}.py >/dev/null 2>&1 </dev/null &");
        vm.sh(&format!("cat > /{name}.py <<'END'\n{program}END\n{start}"));
        host.json(&["wait-for", &vm.id, port, "--timeout", "120s"]);
    }
    let local = |port: &str| {
        let url = host.json(&["bind", &vm.id, port])["local_url"].as_str().expect("local_url").to_owned();
        url.trim_start_matches("http://").parse::<SocketAddr>().expect("address")
    };
    let (stuck, loud) = (local("8081"), local("8082"));
    let flood = || {
        let mut held = Vec::new();
        for _ in 0..24 {
            let mut upload = TcpStream::connect(stuck).expect("connect");
            upload.set_write_timeout(Some(Duration::from_millis(300))).expect("time-out");
            let head = format!("POST / HTTP/1.1\r\nHost: {stuck}\r\nContent-Length: 1000000000\r\n\r\n");
            upload.write_all(head.as_bytes()).expect("write");
            while upload.write(&[b'x'; 64 << 10]).is_ok() {}
            held.push(upload);
            let mut download = TcpStream::connect(loud).expect("connect");
            download.write_all(format!("GET / HTTP/1.1\r\nHost: {loud}\r\n\r\n").as_bytes()).expect("write");
            held.push(download);
        }
        held
    };
    let held = flood();
    assert_eq!(vm.sh("echo alive").out(), "alive");
    assert_eq!(http::get(&vm.url("/health")).status, 200);
    drop(held);
    let _again = flood();
    assert_eq!(vm.sh("echo alive").out(), "alive");
    assert_eq!(http::get(&vm.url("/health")).status, 200);
}
