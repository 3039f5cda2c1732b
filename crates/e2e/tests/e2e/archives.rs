//! Archives: made of a directory here or in a sandbox, listed, put into a sandbox, removed; by the daemon as by a server.

use heyvm_e2e::{
    Host, Ran,
    apps::packed,
    cloud::{Cloud, Machine},
    eventually, http,
};
use serde_json::{Value, json};

/// What the commands do, whoever carries them out.
fn walk(host: &Host, heyvm: &dyn Fn(&[&str]) -> Ran) {
    let json = |arguments: &[&str]| heyvm(&[&["--format", "json"], arguments].concat()).succeeded().json();
    let refused = |arguments: &[&str]| heyvm(&[&["--format", "json"], arguments].concat()).refusal().code;
    let first = host.app("first", &[("version", "1"), ("old", "x"), (".gitignore", "ignored\n"), ("ignored", "x")]);
    let second = host.app("second", &[("version", "2"), ("deep/down/new", "x")]);
    let first = first.to_str().expect("a path");
    let (one, two) = (json(&["archive-dir", first]), json(&["archive-dir", second.to_str().expect("a path")]));
    let id = |archive: &Value| archive["id"].as_str().expect("an id").to_owned();
    let names = || {
        let all = json(&["list-archives"]);
        let mut names: Vec<_> =
            all.as_array().expect("a list").iter().map(|one| one["name"].as_str().unwrap_or("-").to_owned()).collect();
        names.sort();
        names
    };
    assert_eq!(names(), ["first", "second"]);
    let whole = heyvm(&["archive-dir", first, "--no-ignore", "--name", "whole"]).succeeded().out();
    let whole = whole.strip_prefix("ID: ").expect("an id").to_owned();

    let start = "cat version >> /versions; exec sleep 600";
    json(&["create", "--name", "box", "--size-class", "micro", "--start-command", start]);
    let sh = |command: &str| heyvm(&["exec", "box", "--", command]).succeeded().out();
    sh("echo mine > own");
    json(&["update", "box", "--archive", &id(&one)]);
    assert_eq!(sh("ls -A; cat /versions"), ".gitignore\nold\nversion\n1");
    let updated = json(&["update", "box", "--archive", &id(&two)]);
    assert_eq!((&updated["status"], &updated["archive_id"]), (&"running".into(), &id(&two).into()));
    assert_eq!(sh("find . -type f | sort; cat /versions"), "./deep/down/new\n./version\n12");
    json(&["update", "box", "--archive", &whole, "--path", "/srv/app", "--no-restart"]);
    assert_eq!(sh("cat /srv/app/ignored /versions"), "x12");

    sh("echo kept > deep/down/kept && chmod 750 deep/down/kept && ln -s down/kept deep/link");
    let kept = json(&["archive", "box", "--name", "kept"]);
    let part = json(&["archive", "box", "--path", "/workspace/deep"]);
    assert_eq!(names(), ["box", "first", "kept", "second", "whole"]);
    sh("rm -rf /workspace/*");
    json(&["update", "box", "--archive", &id(&kept), "--no-restart"]);
    assert_eq!(sh("cat deep/link; stat -c %a deep/down/kept; cat version"), "kept\n750\n2");
    json(&["update", "box", "--archive", &id(&part), "--path", "/srv/app", "--no-restart"]);
    assert_eq!(sh("cat /srv/app/link; ls /srv/app"), "kept\ndown\nlink");

    for bad in ["/", "/etc", "relative", "/srv/../etc"] {
        assert_eq!(refused(&["update", "box", "--archive", &whole, "--path", bad]), "invalid_argument", "{bad}");
    }
    assert_eq!(refused(&["archive", "box", "--path", "/nowhere"]), "file_not_found");
    assert_eq!(refused(&["archive", "nobody"]), "sandbox_not_found");
    assert_eq!(refused(&["archive-dir", "/nowhere"]), "invalid_directory");
    json(&["delete-archive", &whole]);
    assert_eq!(names(), ["box", "first", "kept", "second"]);
    assert_eq!(refused(&["update", "box", "--archive", &whole]), "archive_not_found");
    assert_eq!(refused(&["delete-archive", &whole]), "archive_not_found");
    assert_eq!(sh("cat version"), "2", "what was refused has changed nothing");
    heyvm(&["stop", "box"]).succeeded();
    assert_eq!(refused(&["update", "box", "--archive", &id(&one)]), "invalid_state");
    heyvm(&["rm", "-y", "box"]).succeeded();
}

#[test]
fn archives_are_made_put_into_sandboxes_and_removed() {
    let host = Host::new();
    walk(&host, &|arguments| host.run(arguments));
}

#[test]
fn archives_of_an_account_are_made_put_into_sandboxes_and_removed() {
    let host = Host::new();
    let cloud = Cloud::over(&host, None, "");
    let key = cloud.key("ada", "deploy");
    let machine = Machine::new(&cloud, &key);
    walk(&host, &|arguments| machine.run(arguments));
    let daemons_own = host.json(&["list-archives"]);
    assert_eq!(daemons_own, json!([]), "the account's are the server's, not the daemon's own");
    // What a deploy sends is for that deploy alone.
    machine.json(&["deploy", host.web_app().to_str().expect("a path"), "--name", "web", "--size-class", "micro"]);
    assert_eq!(machine.json(&["list-archives"]).as_array().map(Vec::len), Some(4));
}

#[test]
fn files_named_from_the_sandboxs_root_land_there() {
    let host = Host::new();
    let cloud = Cloud::over(&host, None, "");
    let key = cloud.key("ada", "deploy");
    let call = |method: &str, path: &str, body: Value| {
        let (status, answer) = cloud.call(method, path, &key, &body);
        assert!(status < 300, "{method} {path}: {status} {answer}");
        answer
    };
    let upload = |bytes: Vec<u8>| {
        let ticket = call("POST", "/sandbox-archives/presign", Value::Null);
        let url = ticket["upload_url"].as_str().expect("a URL");
        assert_eq!(http::call("PUT", url, &[("content-type", "application/gzip")], bytes).status, 200);
        let id = ticket["archive_id"].as_str().expect("an id").to_owned();
        call("POST", &format!("/sandbox-archives/{id}/finalize"), json!({"sandbox_id": "app"}));
        id
    };
    let app = host.app("app", &[("main.py", "print('main')"), ("lib/x.py", "")]);
    let (rooted, plain) = (upload(packed("workspace", &app)), upload(packed("", &app)));
    let made = |body: Value| {
        let id = call("POST", "/sandbox-deploy", body)["id"].as_str().expect("an id").to_owned();
        eventually("it runs", || {
            let info = call("GET", &format!("/deployed-sandboxes/{id}"), Value::Null);
            assert_ne!(info["status"], "failed", "{info}");
            (info["status"] == "running").then_some(())
        });
        id
    };
    let files = |id: &str| {
        let find = json!({"command": "find . -type f | sort"});
        call("POST", &format!("/sandbox/{id}/exec"), find)["stdout"].as_str().expect("text").to_owned()
    };
    let id = made(json!({"archive_id": rooted, "size_class": "micro"}));
    assert_eq!(files(&id), "./lib/x.py\n./main.py\n");
    let elsewhere = upload(packed("srv/app", &app));
    let request = json!({"archive_id": elsewhere, "sandbox_path": "/srv/app"});
    call("POST", &format!("/deployed-sandboxes/{id}/replace-mount"), request);
    let list = json!({"command": "find . -type f | sort", "cwd": "/srv/app"});
    assert_eq!(call("POST", &format!("/sandbox/{id}/exec"), list)["stdout"], "./lib/x.py\n./main.py\n");
    call("POST", &format!("/deployed-sandboxes/{id}/replace-mount"), json!({"archive_id": plain}));
    assert_eq!(files(&id), "./lib/x.py\n./main.py\n");
    // Named from somewhere else, it is not ours to move.
    call("POST", &format!("/deployed-sandboxes/{id}/replace-mount"), json!({"archive_id": elsewhere}));
    assert_eq!(files(&id), "./srv/app/lib/x.py\n./srv/app/main.py\n");
}
