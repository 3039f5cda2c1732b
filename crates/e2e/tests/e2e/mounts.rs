//! Directories of the host in a sandbox.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use heyvm_e2e::{Host, Ran, Vm, eventually, registry::free_port};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::api::Server;

/// A directory of the test's own to be mounted.
fn directory(host: &Host, name: &str) -> PathBuf {
    let directory = host.scratch().join(name);
    fs::create_dir(&directory).expect("directory");
    directory
}

fn mounted<'h>(host: &'h Host, directory: &Path, options: &str) -> Vm<'h> {
    host.create(&["--size-class", "mini", "--mount", &format!("{}:/data{options}", directory.display())])
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).expect("file")
}

#[test]
fn each_sees_what_the_other_does() {
    let host = Host::new();
    let shared = directory(&host, "shared");
    fs::write(shared.join("from-host"), "hello\n").expect("file");
    let vm = mounted(&host, &shared, "");
    assert_eq!(vm.info()["mounts"][0]["sandbox_path"], "/data");
    assert_eq!(vm.sh("cat /data/from-host").out(), "hello");
    assert_eq!(vm.sh("stat -c '%U %G %a' /data/from-host").out(), "root root 644");

    vm.sh(
        "cd /data && echo one > file && echo two >> file && mkdir -p a/b && mv file a/b/moved && ln -s b/moved a/link",
    );
    assert_eq!(read(&shared.join("a/link")), "one\ntwo\n");
    assert_eq!(vm.sh("cat /data/a/link").out(), "one\ntwo");
    vm.sh("cd /data/a/b && truncate -s 3 moved && chmod 750 moved && ln moved hard && touch -d @1000000000 moved");
    let meta = fs::metadata(shared.join("a/b/hard")).expect("file");
    assert_eq!((meta.len(), meta.mode() & 0o7777, meta.nlink(), meta.mtime()), (3, 0o750, 2, 1_000_000_000));
    assert_eq!(meta.uid(), fs::metadata(&shared).expect("directory").uid());
    vm.exec(&["sh", "-c", "set -C; echo x > /data/a/b/moved"]).exited(2);
    vm.sh("chmod u+s /data/a/b/moved; chown 1000:1000 /data/a/b/moved; umask 077; echo x > /data/private");
    assert_eq!(fs::metadata(shared.join("a/b/moved")).expect("file").mode() & 0o7777, 0o750);
    assert_eq!(fs::metadata(shared.join("private")).expect("file").mode() & 0o7777, 0o600);
    vm.exec(&["mkfifo", "/data/pipe"]).exited(1);
    vm.exec(&["mknod", "/data/null", "c", "1", "3"]).exited(1);
    vm.exec(&["rmdir", "/data/a"]).exited(1);

    // What the host changes is seen within a second, also in a file that is open.
    fs::write(shared.join("from-host"), "changed, and longer\n").expect("file");
    fs::remove_file(shared.join("private")).expect("file");
    eventually("the change is seen", || {
        (vm.sh("cat /data/from-host; ls /data").out() == "changed, and longer\na\nfrom-host").then_some(())
    });
    vm.sh("rm -r /data/a /data/from-host");
    assert_eq!(fs::read_dir(&shared).expect("directory").count(), 0);
    host.run(&["rm", "-y", &vm.id]).succeeded();
    assert!(shared.exists(), "the host's directory stays");
}

#[test]
fn large_files_and_many_small_ones() {
    let host = Host::new();
    let shared = directory(&host, "shared");
    let bytes: Vec<u8> = (0..20_000_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(shared.join("large"), &bytes).expect("file");
    let vm = mounted(&host, &shared, "");
    let in_guest = vm.sh("sha256sum < /data/large && cp /data/large /tmp/copy && cp /tmp/copy /data/back").out();
    let on_host = Ran::of(Command::new("sha256sum").arg(shared.join("large")), b"").out();
    assert_eq!(in_guest.split(' ').next(), on_host.split(' ').next());
    assert!(fs::read(shared.join("back")).expect("file") == bytes, "the bytes differ");

    vm.sh("mkdir /data/tree && cd /usr/lib/python3.* && cp -r asyncio email json unittest /data/tree && cd /data && tar c tree | tar x -C /tmp && diff -r tree /tmp/tree");
    let checked = vm.sh("cd /data && find tree -type f | LC_ALL=C sort | xargs sha256sum | sha256sum").out();
    let mut command = Command::new("sh");
    command.args(["-c", "find tree -type f | LC_ALL=C sort | xargs sha256sum | sha256sum"]).current_dir(&shared);
    assert_eq!(checked, Ran::of(&mut command, b"").succeeded().out());
    vm.sh("python3 -m venv --without-pip /data/env && /data/env/bin/python -c 'import sys; assert sys.prefix == \"/data/env\"'");
    vm.sh(
        "python3 -c 'import sqlite3; d = sqlite3.connect(\"/data/db\"); d.execute(\"create table t(a)\"); d.commit()'",
    );
}

#[test]
fn a_program_in_a_mount_runs_and_works_there() {
    let host = Host::new();
    let shared = directory(&host, "shared");
    fs::write(shared.join("run.sh"), "#!/bin/sh\npwd\necho $1 > ran\n").expect("file");
    fs::set_permissions(shared.join("run.sh"), fs::Permissions::from_mode(0o755)).expect("mode");
    let mount = format!("{}:/workspace", shared.display());
    let vm = host.create(&["--mount", &mount, "--setup-hook", "./run.sh hook && cp ran hooked"]);
    assert_eq!(read(&shared.join("hooked")), "hook\n");
    assert_eq!(vm.exec(&["./run.sh", "exec"]).succeeded().out(), "/workspace");
    assert_eq!(read(&shared.join("ran")), "exec\n");
    // The files API works through it, too.
    let there = host.scratch().join("there");
    fs::write(&there, "copied\n").expect("file");
    host.run(&["cp", there.to_str().expect("path"), &format!("{}:/workspace/copied", vm.id)]).succeeded();
    assert_eq!(read(&shared.join("copied")), "copied\n");
}

#[test]
fn what_is_read_only_cannot_be_changed() {
    let host = Host::new();
    let shared = directory(&host, "shared");
    fs::write(shared.join("file"), "as it was\n").expect("file");
    let vm = mounted(&host, &shared, ":ro");
    assert_eq!(vm.sh("cat /data/file").out(), "as it was");
    for script in
        ["echo x > /data/file", "rm /data/file", "mkdir /data/dir", "chmod 777 /data/file", "mv /data/file /data/b"]
    {
        assert_ne!(vm.exec(&["sh", "-c", script]).code, 0, "{script}");
    }
    // Root in the guest may make its own side of it writable; the host's stays as it is.
    vm.exec(&["mount", "-o", "remount,rw", "/data"]);
    assert_ne!(vm.exec(&["sh", "-c", "echo x > /data/file || echo y > /data/new"]).code, 0);
    assert_eq!(read(&shared.join("file")), "as it was\n");
    assert_eq!(fs::read_dir(&shared).expect("directory").count(), 1);
}

/// Links out of the directory mean files of the guest's, never the host's.
#[test]
fn links_lead_to_the_guests_own_files() {
    let host = Host::new();
    let shared = directory(&host, "shared");
    let secret = host.scratch().join("secret");
    fs::write(&secret, "secret").expect("file");
    std::os::unix::fs::symlink("../secret", shared.join("up")).expect("link");
    std::os::unix::fs::symlink(&secret, shared.join("whole")).expect("link");
    let vm = mounted(&host, &shared, "");
    for name in ["up", "whole"] {
        vm.exec(&["cat", &format!("/data/{name}")]).exited(1);
    }
    vm.sh("ln -s /etc/hostname /data/mine && cat /data/mine && echo x > /data/up && cat /secret");
    assert_eq!(read(&secret), "secret");
}

#[test]
fn mounts_come_again_with_a_start_and_are_added_to_what_runs() {
    let host = Host::new();
    let (first, second) = (directory(&host, "first"), directory(&host, "second"));
    fs::write(second.join("file"), "second\n").expect("file");
    let vm = mounted(&host, &first, "");
    let path = second.to_str().expect("path");
    let add = ["mount-add", "--id", &vm.id, "--host-path", path, "--sandbox-path", "/srv/second", "--read-only"];
    let added = host.json(&add);
    assert_eq!((&added["mounts"][1]["host_path"], &added["mounts"][1]["read_only"]), (&path.into(), &true.into()));
    assert_eq!(vm.sh("cat /srv/second/file").out(), "second");
    assert_eq!(host.json(&add)["mounts"], added["mounts"], "repeating it changes nothing");
    let other = ["mount-add", "--id", &vm.id, "--host-path", path, "--sandbox-path", "/data"];
    assert_eq!(host.refused(&other).code, "invalid_argument");
    assert_eq!(vm.info()["mounts"].as_array().expect("mounts").len(), 2);

    vm.does("stop");
    fs::write(first.join("meanwhile"), "stopped\n").expect("file");
    let third = directory(&host, "third");
    let add = ["mount-add", "--id", &vm.id, "--host-path", third.to_str().expect("path"), "--sandbox-path", "/third"];
    host.run(&add).succeeded();
    vm.does("start");
    assert_eq!(vm.sh("cat /data/meanwhile /srv/second/file; touch /third/x").out(), "stopped\nsecond");
    assert!(third.join("x").exists());

    // Without its directory it does not start, and says so; with it, it does.
    vm.does("stop");
    heyvm_trees::remove(&third).expect("directory");
    let refused = host.refused(&["start", &vm.id]);
    assert_eq!((refused.code.as_str(), refused.step.as_str()), ("invalid_directory", "mount"));
    // Another directory of the same name is mounted when that is asked for.
    fs::create_dir(&third).expect("directory");
    fs::write(third.join("new"), "").expect("file");
    let refused = host.refused(&["start", &vm.id]);
    assert_eq!((refused.code.as_str(), refused.step.as_str()), ("invalid_directory", "mount"));
    host.run(&add).succeeded();
    vm.does("start");
    vm.sh("touch /third/again && test -e /third/new");
}

#[test]
fn a_guest_points_no_mount_at_another_directory() {
    let host = Host::new();
    let (project, secret) = (directory(&host, "project"), directory(&host, "secret"));
    fs::create_dir(project.join("sub")).expect("directory");
    fs::write(secret.join("key"), "of the host\n").expect("file");
    let (outer, inner) = (format!("{}:/data", project.display()), format!("{}:/inner", project.join("sub").display()));
    let vm = host.create(&["--size-class", "mini", "--mount", &outer, "--mount", &inner]);
    let link = format!("rm -r /data/sub && ln -s {} /data/sub", secret.display());
    vm.sh(&link);
    vm.does("stop");
    let refused = host.refused(&["start", &vm.id]);
    assert_eq!((refused.code.as_str(), refused.step.as_str()), ("invalid_directory", "mount"));
    assert!(refused.message.contains("symbolic link"), "{}", refused.message);
    assert_eq!(fs::read_to_string(secret.join("key")).expect("file"), "of the host\n");
}

/// What uses a mount goes on under another daemon: its directory, its open files.
#[test]
fn another_daemon_serves_what_is_in_use() {
    let host = Host::new();
    let shared = directory(&host, "shared");
    let writer = "cd /data && mkdir -p work && cd work && exec 3>log && while :; do date >&3 && date > tick || exit 1; sleep 0.1; done";
    let mount = format!("{}:/data", shared.display());
    let vm = host.create(&["--mount", &mount, "--start-command", writer]);
    let ticks = || fs::metadata(shared.join("work/log")).map(|meta| meta.len()).unwrap_or_default();
    eventually("it writes", || (ticks() > 0).then_some(()));
    for _ in 0..2 {
        host.end_daemon(Signal::SIGKILL);
        std::thread::sleep(Duration::from_millis(500));
        let before = ticks();
        assert_eq!(vm.status(), "running", "the next call starts the daemon again");
        eventually("it writes again", || (ticks() > before + 100).then_some(()));
        assert_eq!(vm.sh("cd /data/work && pwd && ls").out(), "/data/work\nlog\ntick");
    }
    assert_eq!(vm.status(), "running", "no write of it failed");
}

#[test]
fn an_ordinary_user_mounts_what_is_the_users() {
    let host = Host::of_an_ordinary_user();
    let shared = directory(&host, "shared");
    let owner = fs::metadata(&host.home).expect("home").uid();
    std::os::unix::fs::chown(&shared, Some(owner), Some(owner)).expect("owner");
    fs::write(shared.join("of-root"), "x").expect("file");
    fs::set_permissions(shared.join("of-root"), fs::Permissions::from_mode(0o600)).expect("mode");
    let vm = mounted(&host, &shared, "");
    vm.sh("echo x > /data/made && cat /data/made");
    assert_eq!(fs::metadata(shared.join("made")).expect("file").uid(), owner);
    vm.exec(&["cat", "/data/of-root"]).exited(1);
}

#[test]
fn a_directory_that_is_removed_gives_errors_and_no_more() {
    let host = Host::new();
    let shared = directory(&host, "shared");
    fs::write(shared.join("file"), "x").expect("file");
    let vm = mounted(&host, &shared, "");
    vm.sh("cat /data/file");
    heyvm_trees::remove(&shared).expect("directory");
    std::thread::sleep(Duration::from_millis(1100));
    vm.exec(&["cat", "/data/file"]).exited(1);
    assert_ne!(vm.exec(&["sh", "-c", "echo x > /data/new"]).code, 0);
    assert_eq!(vm.sh("echo alive").out(), "alive");
    vm.does("stop");
}

#[test]
fn what_cannot_be_mounted_is_told_before_anything_is_done() {
    let host = Host::new();
    let shared = directory(&host, "shared");
    let file = host.scratch().join("file");
    fs::write(&file, "").expect("file");
    let path = |path: &Path| path.to_str().expect("path").to_owned();
    for (mount, code) in [
        ("nonsense".to_owned(), "invalid_argument"),
        (format!("{}:data", path(&shared)), "invalid_argument"),
        (format!("{}:/proc/x", path(&shared)), "invalid_argument"),
        (format!("{}:/data/../../x", path(&shared)), "invalid_argument"),
        (format!("{}:/data", path(&host.scratch().join("nowhere"))), "invalid_directory"),
        (format!("{}:/data", path(&file)), "invalid_directory"),
        ("/:/data".to_owned(), "forbidden"),
        ("/proc:/data".to_owned(), "forbidden"),
        (format!("{}:/data", path(&host.home)), "forbidden"),
        (format!("{}:/data", path(host.scratch())), "forbidden"),
    ] {
        assert_eq!(host.refused(&["create", "--mount", &mount]).code, code, "{mount}");
    }
    let api = Server::start(&host, free_port(), &[]);
    let mount = json!({"host_path": shared, "sandbox_path": "/data"});
    let (status, answer) = api.call_as_owner("POST", "/sandboxes/nobody/mounts", &mount);
    assert_eq!((status, &answer["error"]["code"]), (404, &"sandbox_not_found".into()));
    let body = json!({"mounts": [mount, mount]});
    let (status, answer) = api.call_as_owner("POST", "/sandboxes", &body);
    assert_eq!((status, &answer["error"]["code"]), (400, &"invalid_argument".into()));
    assert!(host.names(&[]).is_empty());
}

#[test]
fn an_update_touches_nothing_of_the_host() {
    let host = Host::new();
    let shared = directory(&host, "shared");
    fs::create_dir_all(shared.join(".git")).expect("directory");
    fs::create_dir(shared.join("sub")).expect("directory");
    for file in [".git/HEAD", "main.c", "sub/file"] {
        fs::write(shared.join(file), file).expect("file");
    }
    let of_host =
        || Ran::of(Command::new("find").arg(&shared).arg("-printf").arg("%P %s %T@\n"), b"").succeeded().out();
    let before = of_host();
    let at = format!("{}:/workspace/data", shared.display());
    let vm = host.create(&["--name", "box", "--size-class", "mini", "--mount", &at]);
    vm.sh("echo old > /workspace/old.py; ln -s /workspace/data /srv/link; mkdir -p /srv/app/a/b /srv/fine/x");
    vm.sh("mount --bind /workspace/data /srv/app/a/b; echo kept > /srv/app/own");
    let app = host.app("app", &[("version", "2")]);
    let archive = host.json(&["archive-dir", app.to_str().expect("a path")])["id"].as_str().expect("an id").to_owned();
    // The last three only the guest knows of.
    for path in [
        "/workspace",
        "/workspace/data",
        "/workspace/data/sub",
        "/srv/app",
        "/srv/app/a/b",
        "/srv/link",
        "/srv/link/sub",
    ] {
        let refusal = host.refused(&["update", "box", "--archive", &archive, "--path", path]);
        assert_eq!(refusal.code, "invalid_state", "{path}: {refusal:?}");
        assert_eq!(of_host(), before, "{path}");
    }
    assert_eq!(
        vm.sh("cat /workspace/old.py /srv/app/own; ls -A /srv/app /workspace").out(),
        "old\nkept\n/srv/app:\na\nown\n\n/workspace:\ndata\nold.py"
    );
    host.json(&["update", "box", "--archive", &archive, "--path", "/srv/fine", "--no-restart"]);
    assert_eq!(vm.sh("ls -A /srv/fine").out(), "version");
    assert_eq!(of_host(), before);
}
