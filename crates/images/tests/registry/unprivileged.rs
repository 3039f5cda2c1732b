//! A daemon without root's rights.

use std::{fs, os::unix::fs::PermissionsExt, process::Command};

use nix::unistd::getuid;
use serde_json::json;

use crate::{
    layout::{device, dir, file, tar},
    place::{Place, Root, mode, silent},
};

#[tokio::test]
async fn an_image_is_whole_without_roots_rights() {
    if getuid().is_root() {
        return again_as_nobody("unprivileged::an_image_is_whole_without_roots_rights");
    }
    let place = Place::new(json!({}));
    let path = place.home().join("base.tar");
    let items = vec![
        dir("etc").mode(0o555),
        file("etc/shadow", "secret").mode(0),
        dir("home/user").owned_by(1000, 1000).mode(0o750),
        file("home/user/tool", "x").owned_by(1000, 1000).mode(0o4755),
        device("null", 1, 3),
    ];
    fs::write(&path, tar(items)).unwrap();
    let image = place.store.import(&path, None, silent()).await.unwrap();
    let root = Root::of(&image);
    assert_eq!(root.text("home/user/tool"), "x");
    assert!(!root.has("null"), "the guest has devices of its own");
    let modes = ["etc", "etc/shadow", "home/user", "home/user/tool"].map(|name| mode(&image, name));
    assert_eq!(modes, [0o755, 0o400, 0o750, 0o4755]);
    let told = Command::new("dump.erofs").arg("--path=/home/user/tool").arg(&image.rootfs).output().unwrap();
    assert!(String::from_utf8(told.stdout).unwrap().contains("Uid: 0   Gid: 0"), "all is root's: see docs/images.md");
}

/// Runs one test of this program as a user who owns nothing.
fn again_as_nobody(test: &str) {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = dir.path().join("test");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--pdeathsig", "KILL"])
        .arg(&program)
        .args([test, "--exact"])
        .current_dir(dir.path())
        .env_remove("TMPDIR")
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && told.contains("1 passed"), "{told}{}", String::from_utf8_lossy(&output.stderr));
}
