//! No request leads out of the directory.

use std::{
    fs,
    os::unix::fs::symlink,
    sync::atomic::{AtomicBool, Ordering},
};

use nix::libc::{EINVAL, ELOOP, ENAMETOOLONG, ENOTDIR, EOPNOTSUPP, EPERM, ESTALE, EXDEV, O_CREAT, O_RDWR, O_WRONLY};

use crate::guest::*;

#[test]
fn names_that_lead_elsewhere_are_none() {
    let guest = Guest::new();
    fs::write(guest.shared("file"), "x").unwrap();
    let file = guest.find("file").unwrap();
    for name in ["..", ".", "", "/", "../secret", "/etc/passwd", "file/..", "a/b"] {
        assert_eq!(guest.ask(LOOKUP, ROOT, &text(name)), Err(EINVAL), "{name:?}");
        assert_eq!(guest.create(ROOT, name, O_RDWR, 0o644), Err(EINVAL), "{name:?}");
        assert_eq!(guest.mkdir(ROOT, name), Err(EINVAL), "{name:?}");
        assert_eq!(guest.symlink(ROOT, name, "x"), Err(EINVAL), "{name:?}");
        assert_eq!(guest.ask(UNLINK, ROOT, &text(name)), Err(EINVAL), "{name:?}");
        assert_eq!(guest.ask(RMDIR, ROOT, &text(name)), Err(EINVAL), "{name:?}");
        assert_eq!(guest.rename((ROOT, "file"), (ROOT, name), 0), Err(EINVAL), "{name:?}");
        assert_eq!(guest.rename((ROOT, name), (ROOT, "new"), 0), Err(EINVAL), "{name:?}");
        let link = join(&[&file.to_ne_bytes(), &text(name)]);
        assert_eq!(guest.ask(LINK, ROOT, &link), Err(EINVAL), "{name:?}");
    }
    assert_eq!(guest.ask(LOOKUP, ROOT, &text(&"x".repeat(256))), Err(ENAMETOOLONG));
    assert_eq!(fs::read_to_string(guest.dir.path().join("secret")).unwrap(), "secret");
    assert_eq!(guest.names(ROOT).unwrap(), ["file"]);
}

#[test]
fn links_are_the_guests_to_follow_and_never_ours() {
    let guest = Guest::new();
    for (name, target) in [("file", "../secret"), ("dir", ".."), ("whole", "/"), ("magic", "/proc/self/root")] {
        let link = guest.symlink(ROOT, name, target).unwrap();
        assert_eq!(guest.ask(READLINK, link, &[]).unwrap(), target.as_bytes());
        assert_eq!(guest.open(link, O_RDWR), Err(ELOOP));
        assert_eq!(guest.ask(OPENDIR, link, &[0; 8]), Err(ELOOP));
        assert_eq!(guest.ask(LOOKUP, link, &text("secret")), Err(ENOTDIR));
        assert_eq!(guest.create(link, "made", O_RDWR, 0o644), Err(ENOTDIR));
        assert_eq!(guest.create(ROOT, name, O_RDWR, 0o644), Err(ELOOP), "{name} is not followed");
        // To set a link's size or mode would be to set its target's.
        let size = join(&[&8_u32.to_ne_bytes(), &[0; 12], &0_u64.to_ne_bytes(), &[0; 64]]);
        assert_eq!(guest.ask(SETATTR, link, &size), Err(ELOOP));
        let mode = join(&[&1_u32.to_ne_bytes(), &[0; 64], &0o777_u32.to_ne_bytes(), &[0; 16]]);
        assert_eq!(guest.ask(SETATTR, link, &mode), Err(EOPNOTSUPP));
    }
    assert_eq!(fs::read_to_string(guest.dir.path().join("secret")).unwrap(), "secret");
    assert!(!guest.dir.path().join("made").exists());
}

#[test]
fn a_directory_that_becomes_a_link_is_not_followed() {
    let guest = Guest::new();
    fs::create_dir_all(guest.dir.path().join("outside")).unwrap();
    fs::write(guest.dir.path().join("outside/file"), "secret").unwrap();
    fs::create_dir(guest.shared("dir")).unwrap();
    fs::write(guest.shared("dir/file"), "fine").unwrap();
    let (dir, file) = (guest.find("dir").unwrap(), guest.find("dir/file").unwrap());
    fs::rename(guest.shared("dir"), guest.shared("was")).unwrap();
    symlink("../outside", guest.shared("dir")).unwrap();
    assert!(guest.open(file, O_RDWR).is_err());
    assert!(guest.ask(LOOKUP, dir, &text("file")).is_err());
    assert!(guest.create(dir, "made", O_RDWR, 0o644).is_err());
    assert!(guest.ask(UNLINK, dir, &text("file")).is_err());
    assert!(guest.rename((dir, "file"), (ROOT, "mine"), 0).is_err());
    assert_eq!(fs::read_dir(guest.dir.path().join("outside")).unwrap().count(), 1);
}

/// A directory that is moved out of the tree while it is walked through.
#[test]
fn a_race_is_not_won() {
    let guest = Guest::new();
    let outside = guest.dir.path().join("outside");
    fs::create_dir_all(guest.shared("a/b/c")).unwrap();
    fs::create_dir_all(outside.join("b/c")).unwrap();
    for (place, content) in [(guest.shared("a/b/c/file"), "fine"), (outside.join("b/c/file"), "secret")] {
        fs::write(place, content).unwrap();
    }
    symlink("../outside", guest.shared("swap")).unwrap();
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                // The link and the directory change places, over and over.
                let flags = nix::fcntl::RenameFlags::RENAME_EXCHANGE;
                let (dir, link) = (guest.shared("a"), guest.shared("swap"));
                nix::fcntl::renameat2(nix::fcntl::AT_FDCWD, &dir, nix::fcntl::AT_FDCWD, &link, flags).unwrap();
            }
        });
        let (mut read, mut refused) = (0, 0);
        for _ in 0..3000 {
            let Ok(node) = guest.find("a/b/c/file") else {
                refused += 1;
                continue;
            };
            let Ok(handle) = guest.open(node, O_RDWR) else { continue };
            assert_eq!(guest.read(node, handle, 0, 100).unwrap(), b"fine");
            guest.ask(RELEASE, node, &join(&[&handle.to_ne_bytes(), &[0; 16]])).unwrap();
            read += 1;
        }
        ended.store(true, Ordering::Relaxed);
        assert!(read > 0 && refused > 0, "no race: {read} read, {refused} refused");
    });
}

#[test]
fn devices_pipes_and_sockets_cannot_be_made_or_opened() {
    let guest = Guest::new();
    for kind in [0o010_000_u32, 0o020_000, 0o060_000, 0o140_000, 0o040_000, 0o120_000] {
        let body = join(&[&(kind | 0o666).to_ne_bytes(), &[0; 12], &text("node")]);
        assert_eq!(guest.ask(MKNOD, ROOT, &body), Err(EPERM), "{kind:o}");
    }
    nix::unistd::mkfifo(&guest.shared("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(guest.shared("socket")).unwrap();
    for name in ["pipe", "socket"] {
        let node = guest.find(name).unwrap();
        assert_eq!(guest.open(node, O_RDWR), Err(EOPNOTSUPP), "and does not hang");
        assert_eq!(guest.create(ROOT, name, O_WRONLY | O_CREAT, 0o600), Err(EOPNOTSUPP));
    }
}

#[test]
fn other_file_systems_below_are_not_part_of_it() {
    if !nix::unistd::Uid::effective().is_root() {
        // Only root can mount one.
        return;
    }
    let guest = Guest::new();
    fs::create_dir(guest.shared("proc")).unwrap();
    let none = None::<&str>;
    nix::mount::mount(Some("/proc"), &guest.shared("proc"), none, nix::mount::MsFlags::MS_BIND, none).unwrap();
    let (found, names) = (guest.find("proc"), guest.names(ROOT));
    nix::mount::umount(&guest.shared("proc")).unwrap();
    assert_eq!((found, names), (Err(EXDEV), Ok(vec!["proc".into()])));
}

#[test]
fn numbers_that_were_not_given_out_mean_nothing() {
    let guest = Guest::new();
    let (node, handle) = guest.create(ROOT, "file", O_RDWR, 0o644).unwrap();
    for bad in [0, 2, node + 1, node - 1, u64::MAX] {
        assert_eq!(guest.open(bad, O_RDWR), Err(ESTALE));
        assert_eq!(guest.ask(LOOKUP, bad, &text("file")), Err(ESTALE));
    }
    let (other, _) = guest.create(ROOT, "other", O_RDWR, 0o644).unwrap();
    assert!(guest.read(other, handle, 0, 1).is_err(), "a handle belongs to its file");
    assert_eq!(guest.read(node, handle + 77, 0, 1).unwrap(), b"", "one of an earlier daemon means the file itself");
}
