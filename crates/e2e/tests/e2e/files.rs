//! `heyvm cp`: files and directories in and out.

use std::{fs, os::unix::fs::PermissionsExt};

use heyvm_e2e::Host;

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
