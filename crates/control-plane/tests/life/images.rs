//! A sandbox and the image its disk lies over.

use heyvm_api::{ErrorCode, sandbox::*};

use crate::daemon::{Daemon, have_image, sink};

fn is_here(daemon: &Daemon, digest: &str) -> bool {
    daemon.home().join(format!("images/sha256-{digest}")).exists()
}

#[test]
fn a_sandbox_keeps_its_image_whatever_the_name_means_later() {
    let mut daemon = Daemon::new();
    let old = daemon.create(daemon.request("old")).unwrap();
    daemon.run(daemon.plane().stop("old")).unwrap();
    have_image(daemon.home(), "test:1", "11");
    daemon.create(daemon.request("new")).unwrap();
    assert_eq!(*daemon.machines.booted.lock().unwrap(), "sha256:11");
    daemon.die();
    daemon.revive();
    daemon.run(daemon.plane().start("old", sink())).unwrap();
    assert_eq!(*daemon.machines.booted.lock().unwrap(), "sha256:00");
    daemon.run(daemon.plane().remove(&old.id)).unwrap();
    assert!(!is_here(&daemon, "00"), "nobody means it any more");
    assert!(is_here(&daemon, "11"));
}

#[test]
fn an_image_goes_when_no_sandbox_runs_it_however_its_name_was_written() {
    let daemon = Daemon::new();
    have_image(daemon.home(), "docker.io/library/app:latest", "22");
    daemon.create(CreateRequest { image: Some("app".into()), ..daemon.request("web") }).unwrap();
    let remove = || daemon.run(daemon.plane().remove_image("docker.io/library/app:latest"));
    let refused = remove().unwrap_err();
    assert_eq!(refused.code, ErrorCode::InvalidState, "{refused:?}");
    assert!(refused.message.contains("web"));
    daemon.run(daemon.plane().remove("web")).unwrap();
    remove().unwrap();
    assert!(!is_here(&daemon, "22"));
}

#[test]
fn without_its_image_a_sandbox_does_not_start_on_another() {
    let daemon = Daemon::new();
    daemon.create(daemon.request("web")).unwrap();
    daemon.run(daemon.plane().stop("web")).unwrap();
    std::fs::remove_dir_all(daemon.home().join("images/sha256-00")).unwrap();
    have_image(daemon.home(), "test:1", "11");
    let error = daemon.run(daemon.plane().start("web", sink())).unwrap_err();
    assert_eq!((error.code, error.step.as_deref()), (ErrorCode::ImageNotFound, Some("image")));
}
