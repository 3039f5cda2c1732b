use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
};

use heyvm_trees::{Error, Replacement};
use tempfile::tempdir;

use crate::{make, namespace, tree};

fn replace(dir: &Path, names: &[&str]) -> Result<(), Error> {
    let new = Replacement::begin(dir)?;
    make(&new.staging(), names);
    assert!(new.commit()?.is_none());
    Ok(())
}

#[test]
fn new_content_takes_the_place_of_all_else() {
    let dir = tempdir().unwrap();
    make(dir.path(), &["old/deep/file", "both", "dir/kept", ".heyvm-old/left", ".heyvm-new/cut-off"]);
    symlink("/etc", dir.path().join("link")).unwrap();
    let inode = fs::metadata(dir.path()).unwrap().ino();
    replace(dir.path(), &["both", "new/file", ".heyvm-old-1/mine"]).unwrap();
    let found = tree(dir.path());
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        [".heyvm-old-1", ".heyvm-old-1/mine", "both", "new", "new/file"],
        "and nothing else"
    );
    assert_eq!(fs::metadata(dir.path()).unwrap().ino(), inode, "programs that run in it stay in it");
}

#[test]
fn what_is_given_up_leaves_nothing() {
    let dir = tempdir().unwrap();
    make(dir.path(), &["a/b"]);
    let before = tree(dir.path());
    let new = Replacement::begin(dir.path()).unwrap();
    make(&new.staging(), &["x/y"]);
    drop(new);
    assert_eq!(tree(dir.path()), before);
}

#[test]
fn a_mount_at_or_below_is_refused_at_the_beginning_and_at_the_end() {
    if !namespace::inside("replacement::a_mount_at_or_below_is_refused_at_the_beginning_and_at_the_end") {
        return;
    }
    let dir = tempdir().unwrap();
    make(dir.path(), &["host/.git/HEAD", "host/main.c", "app/data/x", "app/old.py", "app/a/b/c"]);
    let (host, app) = (dir.path().join("host"), dir.path().join("app"));
    for at in [app.join("data"), app.join("a/b"), app.clone()] {
        let (of_host, of_app) = (tree(&host), tree(&app));
        let begun = Replacement::begin(&app).unwrap();
        make(&begun.staging(), &["new"]);
        namespace::bind(&host, &at);
        assert!(matches!(replace(&app, &["new"]), Err(Error::Mount(_))), "{}", at.display());
        // One that has begun holds the directory beneath a later mount at its own place: the mount stays as it is.
        match begun.commit() {
            Err(Error::Mount(path)) => assert_eq!(path, at),
            done => assert!(at == app && matches!(done, Ok(None)), "{}: {done:?}", at.display()),
        }
        assert_eq!(tree(&host), of_host, "{}", at.display());
        nix::mount::umount(&at).unwrap();
        if at == app {
            assert_eq!(tree(&app).keys().collect::<Vec<_>>(), ["new"]);
        } else {
            assert_eq!(tree(&app), of_app);
        }
    }
    assert_eq!(tree(&host).len(), 3);
}

/// A directory `root` whose lower half is an image's, as in a sandbox; its upper half has so much room.
fn overlay(dir: &Path, room: &str) {
    for name in ["lower", "disk", "root"] {
        fs::create_dir_all(dir.join(name)).unwrap();
    }
    make(&dir.join("lower"), &["app/src/deep/a", "app/src/b", "app/c"]);
    fs::set_permissions(dir.join("lower/app/src"), fs::Permissions::from_mode(0o2750)).unwrap();
    namespace::tmpfs(&dir.join("disk"), room);
    fs::create_dir_all(dir.join("disk/work")).unwrap();
    make(&dir.join("disk"), &["upper/app/d", "upper/app/src/e"]);
    namespace::overlay(&dir.join("lower"), &dir.join("disk/upper"), &dir.join("disk/work"), &dir.join("root"));
}

#[test]
fn directories_of_an_image_are_replaced() {
    if !namespace::inside("replacement::directories_of_an_image_are_replaced") {
        return;
    }
    let dir = tempdir().unwrap();
    overlay(dir.path(), "size=1m");
    let app = dir.path().join("root/app");
    replace(&app, &["new/file", "src/file"]).unwrap();
    assert_eq!(tree(&app).keys().collect::<Vec<_>>(), ["new", "new/file", "src", "src/file"]);
    assert!(dir.path().join("lower/app/src/deep/a").exists());
}

#[test]
fn a_step_that_fails_leaves_everything_as_it_was() {
    if !namespace::inside("replacement::a_step_that_fails_leaves_everything_as_it_was") {
        return;
    }
    let dir = tempdir().unwrap();
    overlay(dir.path(), "size=256k");
    // To move it takes more room than there is, and that shows only when its turn comes.
    fs::write(dir.path().join("lower/app/src/deep/large"), "x".repeat(1 << 20)).unwrap();
    let app = dir.path().join("root/app");
    let (before, mode) = (tree(&app), fs::metadata(app.join("src")).unwrap().mode());
    let error = replace(&app, &["new/file"]).unwrap_err();
    assert_eq!(error.io_kind(), Some(std::io::ErrorKind::StorageFull), "{error}");
    assert_eq!(tree(&app), before);
    assert_eq!(fs::metadata(app.join("src")).unwrap().mode(), mode);
}

#[test]
fn what_could_not_be_removed_is_refused_before_anything_is_moved() {
    let dir = tempdir().unwrap();
    make(dir.path(), &["a/b/protected", "c"]);
    let protect = |flag: &str| {
        let path = dir.path().join("a/b/protected");
        std::process::Command::new("chattr").arg(flag).arg(path).status().is_ok_and(|status| status.success())
    };
    if !protect("+i") {
        eprintln!("SKIPPED: no file can be made immutable here");
        return;
    }
    let before = tree(dir.path());
    let refused = [replace(dir.path(), &["new"]).unwrap_err(), heyvm_trees::remove(&dir.path().join("a")).unwrap_err()];
    assert!(refused.iter().all(|error| matches!(error, Error::Protected(_))), "{refused:?}");
    assert_eq!(tree(dir.path()), before);
    assert!(protect("-i"));
    replace(dir.path(), &["new"]).unwrap();
}
