//! Whose files they are, and what their modes may be.

use std::{
    fs,
    os::unix::fs::{MetadataExt, chown},
    sync::Arc,
};

use bytes::Bytes;
use nix::libc::{EACCES, O_RDWR};
use tokio::sync::mpsc;

use crate::guest::*;

#[test]
fn nothing_lends_its_owners_rights() {
    let guest = Guest::new();
    let mode = |name: &str| fs::metadata(guest.shared(name)).unwrap().mode() & 0o7777;
    let (made, _) = guest.create(ROOT, "made", O_RDWR, 0o6755).unwrap();
    assert_eq!(mode("made") & 0o7000, 0);
    let change = join(&[&1_u32.to_ne_bytes(), &[0; 64], &0o7777_u32.to_ne_bytes(), &[0; 16]]);
    guest.ask(SETATTR, made, &change).unwrap();
    assert_eq!(mode("made"), 0o1777);
    guest.ask(MKDIR, ROOT, &join(&[&0o6777_u32.to_ne_bytes(), &[0; 4], &text("dir")])).unwrap();
    assert_eq!(mode("dir") & 0o6000, 0);
    // Nor is it shown of those that the host has.
    nix::sys::stat::fchmodat(
        nix::fcntl::AT_FDCWD,
        &guest.shared("made"),
        nix::sys::stat::Mode::from_bits_truncate(0o6755),
        nix::sys::stat::FchmodatFlags::FollowSymlink,
    )
    .unwrap();
    let attributes = guest.ask(GETATTR, made, &[0; 16]).unwrap();
    let shown = |at: usize| u32::from_ne_bytes(attributes[16 + at..16 + at + 4].try_into().unwrap());
    assert_eq!((shown(60) & 0o7777, shown(68), shown(72)), (0o755, 0, 0), "mode, user, group");
}

/// The threads of a daemon that is root have the rights of the directory's owner.
#[test]
fn roots_daemon_does_what_the_owner_could() {
    const OWNER: u32 = 12345;
    if !nix::unistd::Uid::effective().is_root() {
        // Who is not root has no other rights than its own.
        return;
    }
    let guest = Guest::new();
    chown(guest.dir.path().join("shared"), Some(OWNER), Some(OWNER + 1)).unwrap();
    fs::set_permissions(guest.dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    fs::write(guest.shared("of-root"), "").unwrap();
    fs::set_permissions(guest.shared("of-root"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let of_root = guest.find("of-root").unwrap();
    let shared = guest.shared("made");

    let (to_server, requests) = mpsc::channel(4);
    let (answers, mut from_server) = mpsc::channel::<Bytes>(4);
    Arc::new(guest.server).serve(requests, answers).unwrap();
    let mut ask = |operation, node, body: &[u8]| {
        to_server.blocking_send(request(operation, node, body).into()).unwrap();
        from_server.blocking_recv().unwrap()
    };
    let body = join(&[&O_RDWR.to_ne_bytes(), &0o666_u32.to_ne_bytes(), &[0; 8], &text("made")]);
    assert_eq!(ask(CREATE, ROOT, &body)[4..8], [0; 4]);
    let made = fs::metadata(shared).unwrap();
    assert_eq!((made.uid(), made.gid(), made.mode() & 0o7777), (OWNER, OWNER + 1, 0o666), "also the mode as asked for");
    let opened = ask(OPEN, of_root, &join(&[&O_RDWR.to_ne_bytes(), &[0; 4]]));
    assert_eq!(opened[4..8], (-EACCES).to_ne_bytes());
    // This thread is who it was.
    fs::write(guest.dir.path().join("secret"), "").unwrap();
    assert_eq!(fs::metadata(guest.dir.path().join("secret")).unwrap().uid(), 0);
}
