//! `heyvm cp`: files and directories in and out.

use std::{fs, os::unix::fs::PermissionsExt};

use heyvm_e2e::{Host, Ran};

#[test]
fn files_and_directories_go_in_and_come_back_the_same() {
    let host = Host::new();
    let vm = host.create(&["--name", "box"]);
    let there = host.app("tree", &[("a.txt", "alpha\n"), ("sub/b.bin", "\u{0}\u{1}beta"), ("sub/deep/empty", "")]);
    fs::set_permissions(there.join("a.txt"), fs::Permissions::from_mode(0o750)).expect("mode");
    std::os::unix::fs::symlink("a.txt", there.join("link")).expect("link");
    let path = |path: &std::path::Path| path.to_str().expect("UTF-8").to_owned();

    host.run(&["cp", &path(&there.join("a.txt")), "box:/tmp/single.txt"]).succeeded();
    assert_eq!(vm.sh("cat /tmp/single.txt").out(), "alpha");
    host.run(&["cp", &path(&there), "box:/srv/tree"]).succeeded();
    assert_eq!(
        vm.sh("cd /srv/tree && readlink link && stat -c %a a.txt && find . | sort | tr '\\n' ' '").out().lines().next(),
        Some("a.txt")
    );
    vm.sh("test -f /srv/tree/sub/deep/empty && test -x /srv/tree/a.txt");

    let back = host.scratch().join("back");
    host.run(&["cp", "box:/srv/tree", &path(&back)]).succeeded();
    assert_eq!(fs::read(back.join("sub/b.bin")).expect("file"), b"\0\x01beta");
    assert_eq!(fs::read_link(back.join("link")).expect("link"), std::path::Path::new("a.txt"));
    assert_eq!(fs::metadata(back.join("a.txt")).expect("file").permissions().mode() & 0o777, 0o750);
    let one = host.scratch().join("one");
    host.run(&["cp", "box:/srv/tree/a.txt", &path(&one)]).succeeded();
    assert_eq!(fs::read_to_string(one).expect("file"), "alpha\n");

    assert_eq!(host.refused(&["cp", "box:/no/such/file", &path(&host.scratch().join("x"))]).code, "file_not_found");
    assert!(!host.scratch().join("x").exists());
}

#[test]
fn a_large_file_survives_the_way_in_and_out() {
    let host = Host::new();
    let vm = host.create(&["--size-class", "small"]);
    let bytes: Vec<u8> = (0..20_000_000u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let there = host.scratch().join("large");
    fs::write(&there, &bytes).expect("file");
    let remote = format!("{}:/workspace/large", vm.id);
    host.run(&["cp", there.to_str().expect("path"), &remote]).succeeded();
    let back = host.scratch().join("large-back");
    host.run(&["cp", &remote, back.to_str().expect("path")]).succeeded();
    assert!(fs::read(back).expect("file") == bytes, "the bytes differ");
}

/// As people have their directories: what means something in the guest alone is kept, what means nothing there is counted.
#[test]
fn odd_files_are_kept_or_left_out_with_one_note() {
    let host = Host::new();
    let tree = host.app("tree", &[("tool", "tool\n"), ("a.txt", "a\n")]);
    fs::set_permissions(tree.join("tool"), fs::Permissions::from_mode(0o4751)).expect("mode");
    fs::hard_link(tree.join("tool"), tree.join("twin")).expect("link");
    let links = [("python", "/usr/bin/python3"), ("dangling", "none"), ("up", "../../x"), (".#a.txt", "me@host.1:2")];
    for (name, target) in links {
        std::os::unix::fs::symlink(target, tree.join(name)).expect("link");
    }
    fs::File::create(tree.join("sparse")).expect("file").set_len(1 << 30).expect("size");
    let then = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    fs::File::open(tree.join("a.txt")).expect("file").set_modified(then).expect("time");
    let _socket = std::os::unix::net::UnixListener::bind(tree.join("app.sock")).expect("socket");
    nix::unistd::mkfifo(&tree.join("queue"), nix::sys::stat::Mode::S_IRWXU).expect("fifo");
    let path = tree.to_str().expect("UTF-8");
    let note = "2 sockets, FIFOs and devices were left out: app.sock, queue";

    let deployed = host.run(&["deploy", path, "--name", "box", "--size-class", "mini"]).succeeded();
    assert!(deployed.err().contains(note), "{}", deployed.err());
    let copied = host.run(&["cp", path, "box:/srv/copy"]).succeeded();
    assert!(copied.err().contains(note), "{}", copied.err());
    for directory in ["/workspace", "/srv/copy"] {
        let looked = host.run(&[
            "exec",
            "box",
            "--",
            &format!(
                "cd {directory} && stat -c '%a %h' tool && stat -c %Y a.txt && stat -c '%s %b' sparse && \
                 readlink python dangling up '.#a.txt' && ls -A | wc -l"
            ),
        ]);
        let links: String = links.map(|(_, target)| format!("{target}\n")).concat();
        assert_eq!(looked.succeeded().out(), format!("4751 2\n1000000000\n1073741824 0\n{links}8"), "{directory}");
    }
    let kept = host.json(&["archive", "box", "--path", "/srv/copy"]);
    host.run(&["update", "box", "--archive", kept["id"].as_str().expect("an id"), "--path", "/srv/again"]).succeeded();
    assert_eq!(host.run(&["exec", "box", "--", "readlink /srv/again/python"]).out(), "/usr/bin/python3");

    // Pipes and the standard input and output.
    let cp = |script: &str| {
        let mut bash = std::process::Command::new("bash");
        host.environment(&mut bash);
        Ran::of(bash.args(["-c", script]), b"from-stdin").succeeded().out()
    };
    cp("heyvm cp <(echo from-pipe) box:/srv/pipe");
    cp("heyvm cp /dev/stdin box:/srv/stdin");
    cp("heyvm cp - box:/srv/dash < <(echo from-dash)");
    assert_eq!(
        cp("heyvm cp box:/srv/pipe - && heyvm cp box:/srv/stdin - && heyvm cp box:/srv/dash -"),
        "from-pipe\nfrom-stdinfrom-dash"
    );
    assert_eq!(host.refused(&["cp", "box:/srv", "-"]).code, "invalid_argument");
    assert_eq!(host.refused(&["cp", "-", "box:/srv"]).code, "invalid_argument");
}

/// What a guest packs is hostile input: a link in it must not lead whoever follows it out of the copy.
#[test]
fn links_that_lead_out_of_a_copy_stay_behind() {
    let host = Host::new();
    let vm = host.create(&[]);
    vm.sh(
        "mkdir -p /srv/trap/real && cd /srv/trap && ln -s /etc door && ln -s ../../etc hatch && ln -s real inside && \
           echo fine > real/file",
    );
    let target = host.scratch().join("copied");
    let ran = host.run(&["cp", &format!("{}:/srv/trap", vm.id), target.to_str().expect("path")]).succeeded();
    assert_eq!(fs::read_to_string(target.join("inside/file")).expect("file"), "fine\n");
    for link in ["door", "hatch"] {
        assert!(fs::symlink_metadata(target.join(link)).is_err(), "{link} leads out of the copy");
        assert!(ran.err().contains(link), "what is left out is told: {}", ran.err());
    }
}

#[test]
fn a_copy_goes_through_a_link_and_keeps_its_time() {
    let host = Host::new();
    let vm = host.create(&[]);
    vm.sh("echo new > /srv/config && touch -d @1000000000 /srv/config");
    let (real, link) = (host.scratch().join("real"), host.scratch().join("link"));
    fs::write(&real, "old and longer").expect("file");
    std::os::unix::fs::symlink("real", &link).expect("link");
    let remote = format!("{}:/srv/config", vm.id);
    host.run(&["cp", &remote, link.to_str().expect("path")]).succeeded();
    assert_eq!(fs::read_to_string(&real).expect("file"), "new\n");
    assert!(fs::symlink_metadata(&link).expect("link").is_symlink());

    let modified = |path: &std::path::Path| fs::metadata(path).expect("file").modified().expect("time");
    let copy = host.scratch().join("copy");
    host.run(&["cp", &remote, copy.to_str().expect("path")]).succeeded();
    let then = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    assert_eq!(modified(&copy), then);
    host.run(&["cp", copy.to_str().expect("path"), &format!("{}:/srv/back", vm.id)]).succeeded();
    assert_eq!(vm.sh("stat -c %Y /srv/back").out(), "1000000000");
}
