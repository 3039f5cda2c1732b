//! Images: honest names, a real registry on loopback, imports.

use std::{fs, path::PathBuf, process::Command};

use heyvm_e2e::{
    Host, Ran,
    cloud::{Cloud, Machine},
    registry::{Registry, oci_layout},
};

/// A root file system just large enough to run a shell: a static busybox from the guest's own default image will not
/// do, so the host's dynamic shell comes with its libraries.
fn small_root(host: &Host, marker: &str) -> PathBuf {
    let root = host.scratch().join(format!("root-{marker}"));
    for directory in ["bin", "etc", "tmp", "proc", "sys", "dev"] {
        fs::create_dir_all(root.join(directory)).expect("directory");
    }
    fs::write(root.join("etc/marker"), marker).expect("file");
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").expect("file");
    for program in ["sh", "cat", "ls", "true", "sleep"] {
        let path = format!("/bin/{program}");
        let libraries = Ran::of(Command::new("ldd").arg(&path), b"").succeeded().out();
        for file in libraries.split_whitespace().filter(|word| word.starts_with('/')).chain([path.as_str()]) {
            let target = root.join(file.trim_start_matches('/'));
            fs::create_dir_all(target.parent().expect("parent")).expect("directory");
            fs::copy(file, target).expect("copy");
        }
    }
    root
}

fn insecure(registry: &Registry) -> String {
    format!("[registries.\"{}\"]\ninsecure = true\n", registry.address)
}

#[test]
fn list_and_deploy_say_which_image_a_sandbox_really_runs() {
    let host = Host::new();
    let vm = host.create(&["--image", "ubuntu:24.04"]);
    let info = vm.info();
    let images = host.json(&["images", "list"]);
    let names: Vec<&str> =
        images.as_array().expect("array").iter().filter_map(|image| image["name"].as_str()).collect();
    assert!(names.contains(&info["image"].as_str().expect("image")), "{info} is not among {names:?}");
    let release = vm.sh(". /etc/os-release; echo $ID").out();
    if info["image"] == "ubuntu:24.04" {
        assert_eq!(release, "ubuntu");
    } else {
        assert!(info["image"].as_str().expect("image").contains(&release), "{release} is told as {}", info["image"]);
        assert_eq!(info["image_requested"], "ubuntu:24.04");
        assert!(!info["warnings"].as_array().expect("warnings").is_empty());
    }
}

#[test]
fn pull_from_a_registry_and_run() {
    let host = Host::with_own_images();
    let registry = Registry::start(host.scratch());
    host.configure(&insecure(&registry));
    let reference = registry.push("team/tiny:1", &small_root(&host, "one"));

    let pulled = host.json(&["pull", &reference]);
    assert!(pulled["digest"].as_str().expect("digest").starts_with("sha256:"), "{pulled}");
    assert_eq!(pulled["source"], "registry");
    let vm = host.create(&["--image", &reference]);
    assert_eq!(vm.info()["image"], reference.as_str());
    assert_eq!(vm.exec(&["cat", "/etc/marker"]).succeeded().out(), "one");
    vm.does("rm");

    // Under the same name something else is there now: pulling again takes it.
    registry.push("team/tiny:1", &small_root(&host, "two"));
    let again = host.json(&["pull", &reference]);
    assert_ne!(again["digest"], pulled["digest"]);
    assert_eq!(host.create(&["--image", &reference]).exec(&["cat", "/etc/marker"]).out(), "two");

    // Deploying an image that is not here yet pulls it.
    let other = registry.push("team/other:1", &small_root(&host, "three"));
    assert_eq!(host.create(&["--image", &other]).exec(&["cat", "/etc/marker"]).out(), "three");
    assert_eq!(host.refused(&["pull", &format!("{}/team/missing:1", registry.address)]).code, "image_not_found");
}

#[test]
fn what_an_image_says_about_running_it_is_honoured() {
    let host = Host::with_own_images();
    let registry = Registry::start(host.scratch());
    host.configure(&insecure(&registry));
    let root = small_root(&host, "one");
    let passwd = "root:x:0:0:root:/root:/bin/sh\napp:x:1234:1234::/srv/app:/bin/sh\n";
    fs::write(root.join("etc/passwd"), passwd).expect("file");
    fs::create_dir_all(root.join("srv/app")).expect("directory");
    std::os::unix::fs::chown(root.join("srv/app"), Some(1234), Some(1234)).expect("chown");
    let entry = "#!/bin/sh\ntrap 'echo quit > ended; exit 0' QUIT\ntrap '' TERM\necho \"started with $@ by $MARK\"\n\
                 while :; do sleep 1 & wait; done\n";
    fs::write(root.join("entry"), entry).expect("file");
    fs::set_permissions(root.join("entry"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("mode");
    let configuration = [
        "--config.user=app",
        "--config.workingdir=/srv/app",
        "--config.env=MARK=the image",
        "--config.entrypoint=/entry",
        "--config.cmd=one",
        "--config.cmd=two words",
        "--config.exposedports=8080/tcp",
        "--config.stopsignal=SIGQUIT",
    ];
    let image = registry.push_configured("team/configured:1", &root, &configuration);

    let vm = host.create(&["--image", &image]);
    let info = vm.info();
    assert_eq!(info["working_directory"], "/srv/app");
    assert_eq!(info["image_command"], serde_json::json!(["/entry", "one", "two words"]));
    assert_eq!((&info["exposed_ports"], &info["urls"]), (&serde_json::json!([8080]), &serde_json::json!([])));
    let whoami = [
        "sh",
        "-c",
        "while read -r name id rest; do case $name in Uid:) echo $id;; esac; done < /proc/self/status; pwd; echo $HOME $MARK",
    ];
    assert_eq!(vm.exec(&whoami).succeeded().out(), "1234\n/srv/app\n/srv/app the image");
    let as_root = vm.exec_with(&["--user", "root", "--cwd", "/etc"], &whoami, b"").succeeded().out();
    assert_eq!(as_root, "0\n/etc\n/root the image");
    let started = heyvm_e2e::eventually("the entry point's words are in the log", || {
        Some(host.run(&["logs", &vm.id]).succeeded().out()).filter(|log| log.contains("started with"))
    });
    assert!(started.contains("started with one two words by the image"), "{started}");

    // It ignores SIGTERM.
    vm.does("stop");
    vm.does("start");
    assert_eq!(vm.exec(&["cat", "ended"]).succeeded().out(), "quit");
    vm.does("rm");

    // A request goes first; what it brings belongs to the image's user.
    let app = host.scratch().join("app");
    fs::create_dir_all(app.join("sub")).expect("directory");
    fs::write(app.join("sub/file"), "x").expect("file");
    let hook = "echo > sub/made-by-a-hook";
    let deployed = host
        .deploy(&app, &["--image", &image, "--setup-hook", hook, "--start-command", "echo mine > started; sleep 1000"]);
    let started = ["sh", "-c", "while ! cat started; do sleep 1; done; ls -ln sub"];
    let listed = deployed.exec(&started).succeeded().out();
    assert!(listed.contains("mine") && listed.matches("1234 1234").count() == 2, "{listed}");
    assert_eq!(deployed.info().get("image_command"), None);
    deployed.does("rm");

    // A shell without a terminal would end at once: the sandbox is there for commands, as ever.
    let shell = registry.push_configured("team/shell:1", &small_root(&host, "two"), &["--config.cmd=sh"]);
    let vm = host.create(&["--image", &shell]);
    assert_eq!((vm.status().as_str(), vm.info().get("image_command")), ("running", None));
    vm.does("rm");
    // One that ends in order leaves its sandbox running, too.
    let done = registry.push_configured("team/done:1", &small_root(&host, "three"), &["--config.cmd=true"]);
    let vm = host.create(&["--image", &done]);
    assert_eq!(vm.exec(&["cat", "/etc/marker"]).succeeded().out(), "three");
}

#[test]
fn bytes_that_do_not_match_their_digest_are_refused() {
    let host = Host::with_own_images();
    let registry = Registry::start(host.scratch());
    host.configure(&insecure(&registry));
    let reference = registry.push("team/tiny:1", &small_root(&host, "good"));
    // The layer is the largest blob; one bit of it changes in the registry's storage.
    let blob = registry
        .blobs()
        .into_iter()
        .max_by_key(|path| fs::metadata(path).map(|file| file.len()).unwrap_or(0))
        .expect("blob");
    let mut bytes = fs::read(&blob).expect("blob");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&blob, bytes).expect("blob");
    let refusal = host.refused(&["pull", &reference]);
    assert_eq!(refusal.code, "image_invalid", "{}", refusal.message);
    assert_eq!(host.refused(&["create", "--image", &reference]).code, "image_invalid");
}

#[test]
fn a_registry_that_does_not_answer_is_told_apart_from_a_missing_image() {
    let host = Host::with_own_images();
    let port = heyvm_e2e::registry::free_port();
    host.configure(&format!("[registries.\"127.0.0.1:{port}\"]\ninsecure = true\n"));
    let refusal = host.refused(&["pull", &format!("127.0.0.1:{port}/team/app:1")]);
    assert_eq!(refusal.code, "registry_unavailable", "{}", refusal.message);
}

#[test]
fn an_account_pulls_an_image_into_its_region_and_runs_it() {
    let host = Host::with_own_images();
    let registry = Registry::start(host.scratch());
    let allowed = format!("[images]\nallowed_registries = [\"{}\"]\n", registry.address);
    host.configure(&format!("{}{allowed}", insecure(&registry)));
    let cloud = Cloud::over(&host, None, "");
    let key = cloud.key("ada", "deploy");
    let machine = Machine::new(&cloud, &key);
    let reference = registry.push("team/tiny:1", &small_root(&host, "one"));
    let names = || {
        let all = machine.json(&["images"]);
        all.as_array().expect("array").iter().map(|image| image["name"].as_str().expect("name").to_owned()).collect()
    };
    let before: Vec<String> = names();
    assert!(!before.is_empty() && !before.contains(&reference), "{before:?}");
    assert_eq!(machine.json(&["pull", &reference])["source"], "registry");
    let after: Vec<String> = names();
    assert!(after.contains(&reference), "{after:?}");
    machine.json(&["create", "--name", "tiny", "--image", &reference, "--size-class", "micro"]);
    assert_eq!(machine.run(&["exec", "tiny", "--", "cat", "/etc/marker"]).succeeded().out(), "one");
    assert_eq!(machine.refused(&["pull", &format!("{}/none:1", registry.address)]).code, "image_not_found");
    assert!(!machine.has_daemon());
}

#[test]
fn import_of_a_layout_a_docker_archive_and_a_root_tar() {
    let host = Host::with_own_images();
    let root = small_root(&host, "imported");
    let layout = oci_layout(host.scratch(), &root);
    let docker = host.scratch().join("docker.tar");
    let source = format!("oci:{}:latest", layout.display());
    Ran::of(
        Command::new("skopeo").args([
            "copy",
            "--quiet",
            "--insecure-policy",
            &source,
            &format!("docker-archive:{}:mine:2", docker.display()),
        ]),
        b"",
    )
    .succeeded();
    let tar = host.scratch().join("root.tar");
    Ran::of(Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&tar).arg("."), b"").succeeded();

    for (path, name) in [(&layout, "from-layout:1"), (&docker, "from-docker:1"), (&tar, "from-tar:1")] {
        let imported = host.json(&["images", "import", path.to_str().expect("path"), "--name", name]);
        assert_eq!((&imported["name"], &imported["source"]), (&name.into(), &"import".into()));
        let vm = host.create(&["--image", name]);
        assert_eq!(vm.exec(&["cat", "/etc/marker"]).succeeded().out(), "imported");
        vm.does("rm");
    }
    let nonsense = host.scratch().join("nonsense");
    fs::write(&nonsense, "not an image at all").expect("file");
    assert_eq!(
        host.refused(&["images", "import", nonsense.to_str().expect("path"), "--name", "x:1"]).code,
        "image_invalid"
    );

    host.run(&["images", "rm", "from-tar:1"]).succeeded();
    let gone = host.refused(&["create", "--image", "from-tar:1"]);
    assert!(["image_not_found", "registry_unavailable"].contains(&gone.code.as_str()), "{}", gone.code);
}
