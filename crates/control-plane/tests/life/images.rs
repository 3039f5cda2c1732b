//! A sandbox and the image its disk lies over.

use heyvm_api::{ErrorCode, images::ImportRequest, sandbox::*};
use heyvm_control_plane::Who;

use crate::daemon::{Daemon, have_image, sink};

fn is_here(daemon: &Daemon, digest: &str) -> bool {
    daemon.home().join(format!("images/sha256-{digest}")).exists()
}

#[test]
fn a_sandbox_keeps_its_image_whatever_the_name_means_later() {
    let mut daemon = Daemon::new();
    let old = daemon.create(daemon.request("old")).unwrap();
    daemon.run(daemon.plane().stop(&Who::owners("old"))).unwrap();
    have_image(daemon.home(), "test:1", "11");
    daemon.create(daemon.request("new")).unwrap();
    assert_eq!(*daemon.machines.booted.lock().unwrap(), "sha256:11");
    daemon.die();
    daemon.revive();
    daemon.run(daemon.plane().start(&Who::owners("old"), sink())).unwrap();
    assert_eq!(*daemon.machines.booted.lock().unwrap(), "sha256:00");
    daemon.run(daemon.plane().remove(&Who::owners(&old.id))).unwrap();
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
    daemon.run(daemon.plane().remove(&Who::owners("web"))).unwrap();
    remove().unwrap();
    assert!(!is_here(&daemon, "22"));
}

#[test]
fn without_its_image_a_sandbox_does_not_start_on_another() {
    let daemon = Daemon::new();
    daemon.create(daemon.request("web")).unwrap();
    daemon.run(daemon.plane().stop(&Who::owners("web"))).unwrap();
    heyvm_trees::remove(&daemon.home().join("images/sha256-00")).unwrap();
    have_image(daemon.home(), "test:1", "11");
    let error = daemon.run(daemon.plane().start(&Who::owners("web"), sink())).unwrap_err();
    assert_eq!((error.code, error.step.as_deref()), (ErrorCode::ImageNotFound, Some("image")));
}

#[test]
fn what_is_to_be_imported_is_named_by_a_whole_path() {
    let daemon = Daemon::new();
    for path in ["", "image.tar", "/tmp/\0"] {
        let kernel = daemon.run(daemon.plane().import_kernel(path)).unwrap_err();
        let request = ImportRequest { path: path.into(), name: None };
        let image = daemon.run(daemon.plane().import_image(request, sink())).unwrap_err();
        for error in [kernel, image] {
            assert_eq!(error.code, ErrorCode::InvalidArgument, "{path:?}");
            assert!(error.message.contains("path"), "{error:?}");
        }
    }
    let nowhere = format!("/{}", "a".repeat(300));
    assert_eq!(daemon.run(daemon.plane().import_kernel(&nowhere)).unwrap_err().code, ErrorCode::ImageInvalid);
    let request = ImportRequest { path: nowhere, name: None };
    assert_eq!(daemon.run(daemon.plane().import_image(request, sink())).unwrap_err().code, ErrorCode::ImageNotFound);
}
