use std::{fs, os::unix::fs::symlink};

use heyvm_trees::{Error, check, remove};
use tempfile::tempdir;

use crate::{make, namespace, tree};

#[test]
fn everything_below_goes_and_links_are_not_followed() {
    let dir = tempdir().unwrap();
    make(dir.path(), &["outside/kept", "tree/a/b/c/file", "tree/file", "tree/a/other"]);
    symlink(dir.path().join("outside"), dir.path().join("tree/a/link")).unwrap();
    fs::create_dir(dir.path().join("tree/empty")).unwrap();
    remove(&dir.path().join("tree")).unwrap();
    symlink("outside", dir.path().join("link")).unwrap();
    remove(&dir.path().join("link")).unwrap();
    assert_eq!(tree(dir.path()).keys().collect::<Vec<_>>(), ["outside", "outside/kept"]);
    remove(&dir.path().join("outside/kept")).unwrap();
    assert!(
        matches!(remove(&dir.path().join("none")), Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound)
    );
}

#[test]
fn depth_has_no_limit() {
    let dir = tempdir().unwrap();
    let top = dir.path().join("top");
    fs::create_dir(&top).unwrap();
    let mut at = rustix::fs::open(&top, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    for _ in 0..3000 {
        rustix::fs::mkdirat(&at, "deeper", rustix::fs::Mode::RWXU).unwrap();
        at = rustix::fs::openat(&at, "deeper", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    }
    remove(&top).unwrap();
    assert!(!top.exists());
}

#[test]
fn nothing_is_removed_where_a_mount_lies_at_or_below() {
    if !namespace::inside("removal::nothing_is_removed_where_a_mount_lies_at_or_below") {
        return;
    }
    let dir = tempdir().unwrap();
    make(dir.path(), &["host/.git/HEAD", "host/main.c", "host/single", "tree/a/data/x", "tree/first", "tree/z/single"]);
    // A bind mount is of the same device: no comparison of numbers shows it.
    for (from, at) in [("host", "tree/a/data"), ("host/single", "tree/z/single"), ("host", "tree")] {
        let before = tree(&dir.path().join("host"));
        namespace::bind(&dir.path().join(from), &dir.path().join(at));
        let all = tree(dir.path());
        for refused in [check(&dir.path().join("tree")), remove(&dir.path().join("tree"))] {
            assert!(matches!(&refused, Err(Error::Mount(path)) if *path == dir.path().join(at)), "{at}: {refused:?}");
        }
        assert_eq!((tree(&dir.path().join("host")), tree(dir.path())), (before, all), "{at}");
        nix::mount::umount(&dir.path().join(at)).unwrap();
    }
    namespace::tmpfs(&dir.path().join("tree/a"), "size=1m");
    assert!(matches!(remove(&dir.path().join("tree")), Err(Error::Mount(_))));
    assert!(dir.path().join("tree/first").exists());
    // What lies within a mount can be removed from within.
    make(&dir.path().join("tree/a"), &["b/c"]);
    remove(&dir.path().join("tree/a/b")).unwrap();
}
