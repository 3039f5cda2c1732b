//! The REST API, as `heyvm --api` serves it, and over the daemon's socket.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Child, Stdio},
};

use heyvm_e2e::{Host, eventually, http, registry::free_port};
use serde_json::{Value, json};

/// `heyvm --api --port N` in the foreground, ended with its test.
pub struct Server {
    process: Child,
    pub url: String,
    token_file: PathBuf,
}

impl Server {
    pub fn start(host: &Host, port: u16, environment: &[(&str, &str)]) -> Self {
        let process = host
            .command()
            .args(["--api", "--port", &port.to_string()])
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("heyvm");
        let token_file = host.home.join(format!("run/api-{port}.token"));
        let server = Self { process, url: format!("http://127.0.0.1:{port}"), token_file };
        eventually("the API answers", || http::try_get(&format!("{}/health", server.url)).ok());
        server
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        http::json(method, &format!("{}{path}", self.url), body)
    }

    /// What a client sends that is the owner.
    pub fn credentials(&self) -> String {
        format!("Bearer {}", fs::read_to_string(&self.token_file).expect("the API's token").trim())
    }

    /// A call of the owner.
    pub fn call_as_owner(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let headers = [("content-type", "application/json"), ("authorization", &self.credentials())];
        let answer = http::call(method, &format!("{}{path}", self.url), &headers, body.to_string());
        (answer.status, answer.json())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// One request over the daemon's socket, with its status and JSON answer.
pub fn over_socket(host: &Host, method: &str, path: &str, kind: &str, body: Vec<u8>) -> (u16, Value) {
    let mut stream = UnixStream::connect(host.home.join("run/daemon.sock")).expect("the daemon's socket");
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).expect("request");
    // The server may refuse before it has read everything.
    stream.write_all(&body).ok();
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).expect("status");
    let status = line
        .split_whitespace()
        .nth(1)
        .and_then(|code| code.parse().ok())
        .unwrap_or_else(|| panic!("no status: {line:?}"));
    let mut chunked = false;
    loop {
        line.clear();
        reader.read_line(&mut line).expect("header");
        if line.trim().is_empty() {
            break;
        }
        chunked |= line.to_lowercase().starts_with("transfer-encoding: chunked");
    }
    let mut text = String::new();
    reader.read_to_string(&mut text).expect("body");
    if chunked {
        text = text.split("\r\n").skip(1).step_by(2).collect();
    }
    (status, serde_json::from_str(&text).unwrap_or(Value::Null))
}

#[test]
fn the_way_through_the_api() {
    let host = Host::new();
    let api = Server::start(&host, free_port(), &[]);
    assert_eq!(http::get(&format!("{}/health", api.url)).json()["status"], "ok");
    let start = "python3 -m http.server 8080 --bind 127.0.0.1";
    let (status, made) = api.call(
        "POST",
        "/sandboxes",
        &json!({"name": "rest", "size_class": "micro", "start_command": start, "open_ports": [8080], "env_vars": {"A": "1"}, "ttl_seconds": 600}),
    );
    assert!(status == 200 || status == 201, "{status} {made}");
    for field in [
        "id",
        "name",
        "slug",
        "status",
        "image",
        "backend_type",
        "region",
        "size_class",
        "is_deployed",
        "created_at",
        "status_changed_at",
        "uptime_secs",
        "ttl_seconds",
        "env_vars",
        "start_command",
        "working_directory",
        "setup_hooks",
        "error_message",
        "urls",
    ] {
        assert!(made.get(field).is_some(), "{field} is missing in {made}");
    }
    assert_eq!((&made["status"], &made["working_directory"]), (&"running".into(), &"/workspace".into()));
    let at = |rest: &str| format!("/sandboxes/{}{rest}", made["id"].as_str().expect("id"));

    let (_, ran) = api.call("POST", &at("/execute"), &json!({"command": "python3", "args": ["-c", "print('hello')"]}));
    assert_eq!((&ran["output"], &ran["exit_code"]), (&"hello\n".into(), &0.into()));
    let (_, ran) = api.call("POST", &at("/execute"), &json!({"command": "echo $A; echo problem >&2; exit 5"}));
    assert_eq!((&ran["stdout"], &ran["stderr"], &ran["exit_code"]), (&"1\n".into(), &"problem\n".into(), &5.into()));

    // Longer than an argument may be.
    let script = format!("echo {} | wc -c", "z".repeat(200 << 10));
    let (_, ran) = api.call("POST", &at("/execute"), &json!({"command": script}));
    assert_eq!((&ran["stdout"], &ran["exit_code"]), (&"204801\n".into(), &0.into()));
    let (status, ran) = api.call("POST", &at("/execute"), &json!({"command": "exec sleep 600", "detach": true}));
    assert!(status == 202 && ran["pid"].as_i64().is_some_and(|pid| pid > 1), "{status} {ran}");
    let comm = json!({"command": format!("cat /proc/{}/comm", ran["pid"])});
    eventually("the shell has become what it runs", || {
        (api.call("POST", &at("/execute"), &comm).1["output"] == "sleep\n").then_some(())
    });

    let upload = json!({"mount_path": "/workspace", "file_path": "deep/script.py", "content": "cHJpbnQoJ2hlbGxvJyk="});
    let (status, uploaded) = api.call("POST", &at("/files/upload"), &upload);
    assert_eq!((status, &uploaded["size"]), (201, &14.into()), "{uploaded}");
    let (_, file) = api.call("GET", &at("/files/download?file_path=deep/script.py"), &Value::Null);
    assert_eq!(file["content"], "cHJpbnQoJ2hlbGxvJyk=");
    let (_, listed) = api.call("GET", &at("/files?file_path=deep"), &Value::Null);
    assert_eq!(listed["entries"][0]["name"], "script.py");
    let escaping = json!({"mount_path": "/workspace", "file_path": "../../etc/passwd", "content": ""});
    assert_eq!(api.call("POST", &at("/files/upload"), &escaping).0, 400);
    assert!(api.call("DELETE", &at("/files?file_path=deep/script.py"), &Value::Null).0 < 300);
    assert_eq!(api.call("GET", &at("/files/download?file_path=deep/script.py"), &Value::Null).0, 404);

    let (_, bound) = api.call("POST", &at("/proxy"), &json!({"port": 9090}));
    assert_eq!((&bound["port"], &bound["sandbox_id"]), (&9090.into(), &made["id"]));
    assert!(bound["subdomain"].is_string() && bound["hostname"].is_string());
    assert_eq!(api.call("GET", &at("/proxy"), &Value::Null).1.as_array().expect("array").len(), 2);

    assert_eq!(api.call("GET", "/sandboxes/rest", &Value::Null).1["id"], made["id"]);
    assert_eq!(api.call("GET", "/sandboxes", &Value::Null).1.as_array().expect("array").len(), 1);
    assert_eq!(api.call("POST", &at("/stop"), &Value::Null).1["status"], "stopped");
    assert_eq!(api.call("GET", "/sandboxes/inactive", &Value::Null).1.as_array().expect("array").len(), 1);
    assert_eq!(api.call("POST", &at("/start"), &Value::Null).1["status"], "running");
    assert_eq!(api.call("POST", &at("/restart"), &Value::Null).1["status"], "running");
    assert_eq!(http::get(&format!("{}{}", api.url, at("/logs"))).status, 200);
    // It is the same API that the command line uses.
    assert_eq!(host.json(&["get", "rest"])["id"], made["id"]);
    assert!(api.call("DELETE", &at(""), &Value::Null).0 < 300);
    assert!(host.names(&[]).is_empty());
}

#[test]
fn errors_have_a_status_a_code_and_a_hint() {
    let host = Host::new();
    let api = Server::start(&host, free_port(), &[]);
    let cases = [
        ("GET", "/sandboxes/nobody", Value::Null, 404, "sandbox_not_found"),
        ("GET", "/no/such/path", Value::Null, 404, "not_found"),
        ("POST", "/sandboxes", json!({"open_ports": [70000]}), 400, "invalid_port"),
        ("POST", "/sandboxes", json!({"size_class": "gigantic"}), 400, "unknown_size_class"),
        ("POST", "/sandboxes", json!({"no_such_field": 1}), 400, "invalid_argument"),
        ("POST", "/sandboxes", json!({"name": 7}), 400, "invalid_argument"),
        ("POST", "/sandboxes", json!([]), 400, "invalid_argument"),
    ];
    for (method, path, body, status, code) in cases {
        let (got, answer) = api.call(method, path, &body);
        assert_eq!((got, &answer["error"]["code"]), (status, &code.into()), "{method} {path} {body}: {answer}");
        assert!(answer["error"]["message"].is_string() && answer["error"]["hint"].is_string(), "{answer}");
    }
    assert!(host.names(&[]).is_empty());
}

#[test]
fn the_document_is_openapi_3_1_and_knows_every_path() {
    let host = Host::new();
    let api = Server::start(&host, free_port(), &[]);
    let document = http::get(&format!("{}/openapi.json", api.url)).json();
    assert!(document["openapi"].as_str().expect("version").starts_with("3.1"), "{}", document["openapi"]);
    let paths = document["paths"].as_object().expect("paths");
    for path in [
        "/health",
        "/sandboxes",
        "/sandboxes/{id}",
        "/sandboxes/{id}/execute",
        "/sandboxes/{id}/files/upload",
        "/sandboxes/{id}/proxy",
        "/sandboxes/{id}/logs",
    ] {
        assert!(paths.contains_key(path), "{path} is not among {:?}", paths.keys().collect::<Vec<_>>());
    }
}

#[test]
fn with_a_secret_every_call_but_health_needs_credentials() {
    let host = Host::new();
    let api = Server::start(&host, free_port(), &[("JWT_SECRET", "a secret of the tests")]);
    assert_eq!(http::get(&format!("{}/health", api.url)).status, 200);
    let (status, answer) = api.call("GET", "/sandboxes", &Value::Null);
    assert_eq!((status, &answer["error"]["code"]), (401, &"unauthorized".into()));
}

#[test]
fn without_the_token_a_mounted_directory_is_out_of_reach() {
    let host = Host::new();
    let directory = host.scratch().join("private");
    fs::create_dir(&directory).expect("directory");
    fs::write(directory.join("secret"), "of the owner").expect("file");
    let api = Server::start(&host, free_port(), &[]);
    let request = json!({
        "name": "box", "size_class": "micro", "ttl_seconds": 600,
        "mounts": [{"host_path": directory, "sandbox_path": "/m"}],
    });
    let (status, answer) = api.call("POST", "/sandboxes", &request);
    assert_eq!((status, &answer["error"]["code"]), (403, &"forbidden".into()), "{answer}");
    let (status, made) = api.call_as_owner("POST", "/sandboxes", &request);
    assert_eq!(status, 201, "{made}");
    // Nor through a sandbox of the owner that sees it.
    let read = json!({"command": "cat", "args": ["/m/secret"]});
    let (status, answer) = api.call("POST", "/sandboxes/box/execute", &read);
    assert_eq!((status, &answer["error"]["code"]), (403, &"forbidden".into()), "{answer}");
    assert_eq!(api.call("GET", "/sandboxes/box/files?mount_path=/m", &Value::Null).0, 403);
    let (status, answer) = api.call("POST", "/sandboxes", &json!({"name": "box", "replace": true}));
    assert_eq!(status, 403, "{answer}");
    let (_, ran) = api.call_as_owner("POST", "/sandboxes/box/execute", &read);
    assert_eq!(ran["output"], "of the owner");
    assert_eq!(api.call_as_owner("DELETE", "/sandboxes/box", &Value::Null).0, 200);
}
