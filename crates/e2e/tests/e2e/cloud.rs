//! `heyvm server`: what the command line does on this machine, it does there; and what other clients speak.

use std::{os::unix::fs::PermissionsExt, path::Path};

use base64::{Engine, engine::general_purpose::STANDARD};
use heyvm_e2e::{
    Host, Ran,
    cloud::{Cloud, Machine},
    eventually, http,
};
use serde_json::{Value, json};

#[test]
fn commands_work_against_a_server_as_they_do_here() {
    let host = Host::new();
    let cloud = Cloud::over(&host, None, "");
    let key = cloud.key("ada", "deploy");
    let app = host.web_app();
    let (here, there) = (Machine::new(&cloud, &key), Machine::new(&cloud, &key));

    let made = here.json(&[
        "deploy",
        app.to_str().unwrap(),
        "--name",
        "web",
        "--size-class",
        "micro",
        "--port",
        "8080",
        "--start-command",
        "python3 web.py",
        "--health-path",
        "/health",
        "--ttl-seconds",
        "900",
    ]);
    assert_eq!((&made["status"], &made["region"]), (&json!("running"), &json!("US")));
    let url = made["urls"][0]["url"].as_str().unwrap().to_owned();
    assert!(url.ends_with(&format!(".localhost:{}", cloud.edge)), "{url}");
    assert_eq!(http::get(&format!("{url}/health")).status, 200);

    // A second machine sees the same.
    let listed = there.json(&["list"]);
    assert_eq!((&listed[0]["id"], &listed[0]["urls"]), (&made["id"], &made["urls"]));
    let told = there.json(&["exec", "web", "--", "python3", "-c", "print('hello')"]);
    assert_eq!(told, json!({"exit_code": 0, "stdout": "hello\n", "stderr": ""}));
    there.run(&["exec", "web", "--", "exit 3"]).exited(3);
    let piped = Ran::of(there.command().args(["exec", "web", "--", "cat"]), b"through the server").succeeded();
    assert_eq!(piped.out(), "through the server");
    there.run(&["cp", &format!("{}/web.py", app.display()), "web:/tmp/x"]).succeeded();
    let copied = there.run(&["exec", "web", "--", "cmp /tmp/x /workspace/web.py"]);
    copied.succeeded();
    assert_eq!(there.json(&["wait-for", "web", "8080", "--path", "/health"]), json!({"ready": true, "port": 8080}));
    let bound = there.json(&["bind", "web", "9090"]);
    assert!(bound["url"].as_str().unwrap().contains(&format!(":{}", cloud.edge)), "{bound}");
    there.json(&["unbind", "web", "9090"]);
    assert!(!there.run(&["logs", "web"]).succeeded().out().is_empty());
    let mount = ["mount-add", "--id", "web", "--host-path", "/tmp", "--sandbox-path", "/mnt"];
    assert_eq!(there.refused(&mount).code, "forbidden");
    assert_eq!(there.refused(&["create", "--mount", "/tmp:/mnt"]).code, "forbidden");

    assert_eq!(there.json(&["stop", "web"])["status"], "stopped");
    assert_eq!(here.json(&["list"]), json!([]));
    assert_eq!(here.json(&["list", "--stopped"])[0]["name"], "web");
    assert_eq!(there.json(&["start", "web"])["status"], "running");
    assert_eq!(there.json(&["rm", "-y", "web"])["status"], "removed");
    assert_eq!(here.json(&["get", "web"])["status"], "removed");
    assert!(!here.has_daemon() && !there.has_daemon(), "a machine that is logged in needs no daemon");
}

#[test]
fn a_login_is_kept_renewed_and_ended() {
    let host = Host::new();
    let cloud = Cloud::over(&host, None, "[tokens]\nlifetime_seconds = 61\n");
    cloud.key("ada", "admin");
    let machine = Machine::new(&cloud, "");
    let heyvm = |arguments: &[&str], input: &[u8]| {
        Ran::of(machine.bare_command().args(["--format", "json"]).args(arguments), input)
    };
    let login = ["login", "--cloud-url", &cloud.url, "--email", "ada@example.org"];
    assert_eq!(heyvm(&login, b"wrong\n").refusal().code, "unauthorized");
    assert!(!machine.home().join("token.json").exists());
    let told = heyvm(&login, b"correct horse\n").succeeded();
    assert!(!told.out().contains("eyJ"), "a token is shown");
    let kept = machine.home().join("token.json");
    assert_eq!(kept.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let token = |path: &Path| {
        let text = std::fs::read_to_string(path).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["access_token"].as_str().unwrap().to_owned()
    };
    let first = token(&kept);
    assert_eq!(heyvm(&["whoami"], b"").succeeded().json()["email"], "ada@example.org");
    // It ends within a minute, so that the next command gets another one; several at once get one together.
    std::thread::sleep(std::time::Duration::from_secs(2));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| heyvm(&["list"], b"").succeeded());
        }
    });
    assert_ne!(token(&kept), first);
    let last = token(&kept);
    assert_eq!(cloud.call("GET", "/sandboxes", &last, &Value::Null).0, 200);
    heyvm(&["logout"], b"").succeeded();
    heyvm(&["logout"], b"").succeeded();
    assert!(!kept.exists());
    assert_eq!(cloud.call("GET", "/sandboxes", &last, &Value::Null).0, 401, "the session has ended");
    assert_eq!(heyvm(&["whoami"], b"").succeeded().json()["local"], true);
}

#[test]
fn the_api_that_other_clients_speak() {
    let host = Host::new();
    let cloud = Cloud::over(&host, None, "");
    let key = cloud.key("ada", "deploy");
    let call = |method: &str, path: &str, body: Value| cloud.call(method, path, &key, &body);
    let deploy = json!({"name": "box", "driver": "kvm", "image": "ubuntu:24.04", "region": "US", "size_class": "micro",
        "ttl_seconds": 900, "open_ports": [8080], "env_vars": {"COLOUR": "blue"}, "setup_hooks": ["touch /hooked"]});
    let (status, begun) = call("POST", "/sandbox-deploy", deploy.clone());
    assert_eq!((status, &begun["status"], &begun["name"]), (201, &json!("provisioning"), &json!("box")));
    let id = begun["id"].as_str().unwrap();
    assert_eq!(call("POST", "/sandbox-deploy", deploy).0, 409);
    let info = eventually("it runs", || {
        let (status, info) = call("GET", &format!("/deployed-sandboxes/{id}"), Value::Null);
        assert_eq!(status, 200, "{info}");
        (info["status"] == "running").then_some(info)
    });
    assert_eq!((&info["urls"][0]["port"], &info["region"]), (&json!(8080), &json!("US")));
    assert_eq!(call("GET", "/deployed-sandboxes?name=box", Value::Null).1[0]["id"], *id);
    assert_eq!(call("GET", "/deployed-sandboxes?name=bo", Value::Null).1, json!([]));

    let exec = json!({"command": "echo $COLOUR; ls /hooked; echo bad >&2; pwd", "cwd": "/tmp", "env": {"X": "1"}});
    let (status, told) = call("POST", &format!("/sandbox/{id}/exec"), exec);
    assert_eq!((status, &told["exit_code"]), (200, &json!(0)));
    assert_eq!((&told["stdout"], &told["stderr"]), (&json!("blue\n/hooked\n/tmp\n"), &json!("bad\n")));
    let content = STANDARD.encode("written");
    let file = json!({"mount_path": "/workspace", "file_path": "a/b.txt", "content": content});
    let (status, written) = call("POST", &format!("/sandbox/{id}/write-file"), file);
    assert_eq!((status, &written["status"]), (201, &json!("created")));
    let (_, read) = call("POST", &format!("/sandbox/{id}/read-file"), json!({"file_path": "a/b.txt"}));
    assert_eq!(read["content"], content);
    assert_eq!(call("POST", &format!("/sandbox/{id}/read-file"), json!({"file_path": "no"})).0, 404);

    let (status, bound) = call("POST", "/proxy-endpoints/for-deployed", json!({"sandbox_id": id, "port": 3000}));
    assert_eq!((status, &bound["port"], &bound["is_public"]), (201, &json!(3000), &json!(true)));
    assert_eq!(call("POST", &format!("/deployed-sandboxes/{id}/ttl"), json!({"ttl_seconds": 60})).0, 200);
    assert_eq!(call("POST", &format!("/sandbox/{id}/stop"), Value::Null).1["status"], "stopped");
    assert_eq!(call("GET", &format!("/sandbox/{id}/status"), Value::Null).1["status"], "stopped");
    assert_eq!(call("POST", &format!("/sandbox/{id}/start"), Value::Null).1["status"], "running");
    assert_eq!(call("POST", &format!("/deployed-sandboxes/{id}/restart"), Value::Null).1["status"], "running");
    let (_, images) = call("GET", "/public-images?backend=kvm", Value::Null);
    assert!(images["images"][0]["id"].is_string(), "{images}");
    assert_eq!(call("GET", "/public-images?backend=abacus", Value::Null).1, json!({"images": []}));
    assert_eq!(call("DELETE", &format!("/deployed-sandboxes/{id}"), Value::Null).0, 200);
    assert_eq!(call("GET", &format!("/deployed-sandboxes/{id}"), Value::Null).0, 404);

    // One that cannot be made says so.
    let (_, begun) = call("POST", "/sandbox-deploy", json!({"setup_hooks": ["exit 7"], "size_class": "micro"}));
    let path = format!("/deployed-sandboxes/{}", begun["id"].as_str().unwrap());
    let info = eventually("it has failed", || {
        let (_, info) = call("GET", &path, Value::Null);
        (info["status"] == "failed").then_some(info)
    });
    assert!(info["error_message"].as_str().unwrap().contains("exit"), "{info}");
    for (bad, code) in [
        (json!({"driver": "abacus"}), "invalid_argument"),
        (json!({"open_ports": [0]}), "invalid_port"),
        (json!({"region": "MOON"}), "unknown_region"),
        (json!({"size_class": "giant"}), "unknown_size_class"),
        (json!({"nmae": "x"}), "invalid_argument"),
        (json!({"archive_id": "ar-none"}), "archive_not_found"),
    ] {
        let (status, error) = call("POST", "/sandbox-deploy", bad.clone());
        assert_eq!(error["error"]["code"], code, "{bad} {status}");
        assert!(error["error"]["hint"].is_string() && (400..500).contains(&status), "{bad}: {error}");
    }
}

#[test]
fn a_private_port_answers_its_accounts_members_alone() {
    let host = Host::new();
    let cloud = Cloud::over(&host, None, "");
    let (ada, bob) = (cloud.key("ada", "deploy"), cloud.key("bob", "read"));
    let machine = Machine::new(&cloud, &ada);
    let made = machine.json(&[
        "deploy",
        host.web_app().to_str().unwrap(),
        "--name",
        "echo",
        "--size-class",
        "micro",
        "--port",
        "8080",
        "--private",
        "--start-command",
        "python3 web.py",
        "--health-path",
        "/health",
    ]);
    assert_eq!(made["urls"][0]["is_public"], false);
    let url = made["urls"][0]["url"].as_str().unwrap();
    let get = |headers: &[(&str, &str)]| http::call("GET", &format!("{url}/headers"), headers, "");
    let bearer = |key: &str| format!("Bearer {key}");
    assert_eq!(get(&[]).status, 401);
    assert_eq!(get(&[("authorization", "Bearer nonsense")]).status, 401);
    assert_eq!(get(&[("authorization", &bearer(&bob))]).status, 403);
    let page = get(&[("accept", "text/html")]);
    assert_eq!(page.status, 303);
    assert!(page.header("location").starts_with(&format!("http://login.localhost:{}/login?return_to=", cloud.edge)));
    let welcome = get(&[("authorization", &bearer(&ada)), ("x-mine", "yes")]);
    assert_eq!(welcome.status, 200);
    assert!(
        welcome.text().to_lowercase().contains("x-mine") && !welcome.text().contains("heyo_api_"),
        "{}",
        welcome.text()
    );
    let login = json!({"email": "ada@example.org", "password": "correct horse"});
    let (_, tokens) = cloud.call("POST", "/api/auth/login", "", &login);
    let cookie = format!("mine=1; __heyo_token={}", tokens["access_token"].as_str().unwrap());
    let welcome = get(&[("cookie", &cookie)]);
    assert!(welcome.status == 200 && welcome.text().contains("mine=1") && !welcome.text().contains("eyJ"));

    // The same URL, public and private again.
    assert_eq!(machine.json(&["bind", "echo", "8080", "--public"])["url"], *url);
    eventually("it is public", || (get(&[]).status == 200).then_some(()));
    let bound = machine.json(&["bind", "echo", "8080", "--private"]);
    assert_eq!((&bound["url"], &bound["is_public"]), (&json!(url), &json!(false)));
    eventually("it is private", || (get(&[]).status == 401).then_some(()));
    machine.json(&["unbind", "echo", "8080"]);
    eventually("it is gone", || (get(&[]).status == 404).then_some(()));
}

#[test]
fn an_account_gets_no_more_than_its_quota() {
    let host = Host::new();
    let cloud = Cloud::over(&host, None, "[quotas]\nmax_running = 1\nmax_ttl_seconds = 600\n");
    let key = cloud.key("ada", "deploy");
    let machine = Machine::new(&cloud, &key);
    let made = machine.json(&["create", "--name", "one", "--size-class", "micro"]);
    assert_eq!(made["ttl_seconds"], 600, "who asks for no end gets the latest");
    let refused = machine.refused(&["create", "--name", "two", "--size-class", "micro"]);
    assert_eq!(refused.code, "quota_exceeded");
    assert!(refused.message.contains("1 sandboxes run"), "{}", refused.message);
    assert_eq!(machine.refused(&["create", "--ttl-seconds", "601"]).code, "quota_exceeded");
    assert_eq!(cloud.call("POST", "/sandbox-deploy", &key, &json!({})).0, 402);
    machine.json(&["stop", "one"]);
    machine.json(&["create", "--name", "two", "--size-class", "micro"]);
    assert_eq!(machine.refused(&["start", "one"]).code, "quota_exceeded");
    cloud.admin(&["server", "admin", "account", "quota", "ada", "--max-running", "5"], b"").succeeded();
    machine.json(&["start", "one"]);
}

#[test]
fn a_revoked_keys_commands_and_shells_end() {
    let host = Host::new();
    let cloud = Cloud::over(&host, None, "");
    let (admin, key) = (cloud.key("ada", "admin"), cloud.key("ada", "deploy"));
    let (operator, machine) = (Machine::new(&cloud, &admin), Machine::new(&cloud, &key));
    machine.json(&["create", "--name", "box", "--size-class", "micro", "--ttl-seconds", "900"]);
    let mut running = machine.command().args(["exec", "box", "--", "sleep 1000"]).spawn().expect("heyvm");
    let sleeps = || operator.run(&["exec", "box", "--", "pgrep -x sleep"]).code == 0;
    eventually("the command runs", || sleeps().then_some(()));
    let (_, keys) = cloud.call("GET", "/api/api-keys", &admin, &Value::Null);
    let of_key =
        keys.as_array().unwrap().iter().find(|each| key.starts_with(each["prefix"].as_str().unwrap())).unwrap();
    let (status, _) =
        cloud.call("DELETE", &format!("/api/api-keys/{}", of_key["id"].as_str().unwrap()), &admin, &Value::Null);
    assert_eq!(status, 204);
    assert!(!running.wait().expect("heyvm").success());
    eventually("the command has ended", || (!sleeps()).then_some(()));
}
