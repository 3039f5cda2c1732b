//! What a guest does with files and directories, and what the host sees of it, and the other way round.

use std::{fs, os::unix::fs::PermissionsExt};

use nix::libc::{
    EBADF, EEXIST, EISDIR, ENFILE, ENOENT, ENOSYS, ENOTEMPTY, EROFS, ESTALE, O_APPEND, O_EXCL, O_RDONLY, O_RDWR,
    O_TRUNC, O_WRONLY,
};

use crate::guest::*;

#[test]
fn what_one_writes_the_other_reads() {
    let guest = Guest::new();
    let (node, handle) = guest.create(ROOT, "made", O_RDWR | O_EXCL, 0o640).unwrap();
    assert_eq!(guest.create(ROOT, "made", O_RDWR | O_EXCL, 0o640), Err(EEXIST));
    guest.write(node, handle, 0, b"hello").unwrap();
    guest.write(node, handle, 8, b"later").unwrap();
    assert_eq!(fs::read(guest.shared("made")).unwrap(), b"hello\0\0\0later");
    fs::write(guest.shared("made"), "from the host").unwrap();
    assert_eq!(guest.read(node, handle, 5, 100).unwrap(), b"the host");
    assert_eq!(guest.read(node, handle, 1 << 40, 100).unwrap(), b"");
    let emptied = guest.open(node, O_WRONLY | O_TRUNC).unwrap();
    assert_eq!(fs::read(guest.shared("made")).unwrap(), b"");
    assert_eq!(guest.read(node, emptied, 0, 1), Err(EBADF));
    assert_eq!(guest.find("nothing"), Err(ENOENT));
    assert_eq!(guest.open(ROOT, O_RDWR), Err(EISDIR));
}

#[test]
fn appending_goes_to_the_end_whatever_the_guest_takes_for_it() {
    let guest = Guest::new();
    fs::write(guest.shared("log"), "host\n").unwrap();
    let node = guest.find("log").unwrap();
    let handle = guest.open(node, O_WRONLY | O_APPEND).unwrap();
    guest.write(node, handle, 0, b"guest\n").unwrap();
    assert_eq!(fs::read_to_string(guest.shared("log")).unwrap(), "host\nguest\n");
}

#[test]
fn directories_names_and_links() {
    let guest = Guest::new();
    let dir = guest.mkdir(ROOT, "dir").unwrap();
    let (file, handle) = guest.create(dir, "file", O_RDWR, 0o644).unwrap();
    guest.write(file, handle, 0, b"x").unwrap();
    assert_eq!(guest.ask(RMDIR, ROOT, &text("dir")), Err(ENOTEMPTY));
    guest.ask(LINK, ROOT, &join(&[&file.to_ne_bytes(), &text("hard")])).unwrap();
    guest.symlink(dir, "soft", "../hard").unwrap();
    assert_eq!(fs::read_to_string(guest.shared("dir/soft")).unwrap(), "x");
    guest.rename((ROOT, "dir"), (ROOT, "moved"), 0).unwrap();
    assert_eq!(guest.names(dir).unwrap(), ["file", "soft"]);
    assert_eq!(guest.rename((ROOT, "hard"), (dir, "file"), 1), Err(EEXIST), "RENAME_NOREPLACE");
    for index in 0..300 {
        fs::write(guest.shared(&format!("moved/{index:03}-{}", "n".repeat(40))), "").unwrap();
    }
    let names = guest.names(dir).unwrap();
    assert!(names.len() == 302 && names[299].starts_with("299"), "in several pieces");
    for name in names {
        guest.ask(UNLINK, dir, &text(&name)).unwrap();
    }
    guest.ask(RMDIR, ROOT, &text("moved")).unwrap();
    assert_eq!(guest.names(ROOT).unwrap(), ["hard"]);
}

#[test]
fn an_open_file_outlives_its_name() {
    let guest = Guest::new();
    let (node, handle) = guest.create(ROOT, "gone", O_RDWR, 0o600).unwrap();
    guest.write(node, handle, 0, b"still").unwrap();
    guest.ask(UNLINK, ROOT, &text("gone")).unwrap();
    assert_eq!(guest.read(node, handle, 0, 9).unwrap(), b"still");
    assert_eq!(number(&guest.ask(GETATTR, node, &[0; 16]).unwrap(), 24), 5, "its size, without a handle");
    guest.ask(RELEASE, node, &join(&[&handle.to_ne_bytes(), &[0; 16]])).unwrap();
    assert_eq!(guest.ask(GETATTR, node, &[0; 16]), Err(ESTALE));
}

#[test]
fn a_file_that_the_host_replaces_is_another_one() {
    let guest = Guest::new();
    fs::write(guest.shared("config"), "old").unwrap();
    let old = guest.find("config").unwrap();
    let handle = guest.open(old, O_RDONLY).unwrap();
    fs::write(guest.shared("half"), "new").unwrap();
    fs::rename(guest.shared("half"), guest.shared("config")).unwrap();
    let new = guest.find("config").unwrap();
    assert_ne!(old, new);
    assert_eq!(guest.read(old, handle, 0, 9).unwrap(), b"old");
    let handle = guest.open(new, O_RDONLY).unwrap();
    assert_eq!(guest.read(new, handle, 0, 9).unwrap(), b"new");
}

#[test]
fn another_daemon_goes_on() {
    let guest = Guest::new();
    let dir = guest.mkdir(ROOT, "dir").unwrap();
    let (file, handle) = guest.create(dir, "file", O_RDWR, 0o644).unwrap();
    guest.write(file, handle, 0, b"before").unwrap();
    guest.rename((ROOT, "dir"), (ROOT, "moved"), 0).unwrap();
    let (gone, gone_handle) = guest.create(ROOT, "gone", O_RDWR, 0o644).unwrap();
    guest.ask(UNLINK, ROOT, &text("gone")).unwrap();
    let guest = guest.adopted();
    assert_eq!(guest.read(file, handle, 0, 9).unwrap(), b"before", "by a handle of the last one");
    guest.write(file, handle, 6, b", after").unwrap();
    assert_eq!(fs::read_to_string(guest.shared("moved/file")).unwrap(), "before, after");
    assert_eq!(guest.names(dir).unwrap(), ["file"]);
    assert_eq!(guest.read(gone, gone_handle, 0, 9), Err(ESTALE), "what only the last one had is lost");
}

#[test]
fn a_directory_that_is_gone_gives_errors() {
    let guest = Guest::new();
    let (file, handle) = guest.create(ROOT, "file", O_RDWR, 0o644).unwrap();
    heyvm_trees::remove(&guest.dir.path().join("shared")).unwrap();
    assert_eq!(guest.find("file"), Err(ENOENT));
    assert_eq!(guest.create(ROOT, "new", O_RDWR, 0o644), Err(ENOENT));
    guest.write(file, handle, 0, b"nobody reads it").unwrap();
    assert_eq!(guest.names(ROOT), Err(ENOENT));
}

#[test]
fn what_is_read_only_stays_as_it_is() {
    let guest = Guest::read_only();
    fs::write(guest.shared("file"), "as it was").unwrap();
    fs::set_permissions(guest.shared("file"), fs::Permissions::from_mode(0o600)).unwrap();
    let file = guest.find("file").unwrap();
    let handle = guest.open(file, O_RDONLY).unwrap();
    assert_eq!(guest.read(file, handle, 0, 99).unwrap(), b"as it was");
    for flags in [O_WRONLY, O_RDWR, 3, O_RDONLY | O_TRUNC, O_RDONLY | O_APPEND] {
        assert_eq!(guest.open(file, flags), Err(EROFS), "{flags:o}");
    }
    assert_eq!(guest.write(file, handle, 0, b"x"), Err(EROFS));
    assert_eq!(guest.create(ROOT, "file", O_RDWR, 0o666), Err(EROFS));
    assert_eq!(guest.mkdir(ROOT, "dir"), Err(EROFS));
    assert_eq!(guest.symlink(ROOT, "link", "x"), Err(EROFS));
    assert_eq!(guest.rename((ROOT, "file"), (ROOT, "moved"), 0), Err(EROFS));
    assert_eq!(guest.ask(LINK, ROOT, &join(&[&file.to_ne_bytes(), &text("hard")])), Err(EROFS));
    assert_eq!(guest.ask(UNLINK, ROOT, &text("file")), Err(EROFS));
    assert_eq!(guest.ask(SETATTR, file, &[0xff; 88]), Err(EROFS));
    let make = join(&[&0o100_644_u32.to_ne_bytes(), &[0; 12], &text("made")]);
    for (operation, node, body) in [(43, file, vec![0; 32]), (47, file, vec![0; 56]), (MKNOD, ROOT, make)] {
        assert_eq!(guest.ask(operation, node, &body), Err(EROFS), "{operation}");
    }
    assert_eq!(guest.ask(21, file, &[0; 8]), Err(ENOSYS), "no attributes beside the file's own");
    assert_eq!(guest.names(ROOT).unwrap(), ["file"]);
    assert_eq!(fs::metadata(guest.shared("file")).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn what_may_be_open_has_a_bound() {
    let guest = Guest::new();
    let (node, first) = guest.create(ROOT, "file", O_RDWR, 0o644).unwrap();
    let opened = (0..).map_while(|_| guest.open(node, O_RDONLY).ok()).count();
    assert_eq!(opened, heyvm_mounts::MAX_HANDLES - 1);
    assert_eq!(guest.open(node, O_RDONLY), Err(ENFILE));
    assert_eq!(guest.create(ROOT, "another", O_RDWR, 0o644), Err(ENFILE));
    guest.ask(RELEASE, node, &join(&[&first.to_ne_bytes(), &[0; 16]])).unwrap();
    guest.open(node, O_RDONLY).unwrap();
}

#[test]
fn all_mounts_of_a_sandbox_share_one_budget() {
    let (dir, journal) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let shared = fs::canonicalize(dir.path()).unwrap();
    // Few descriptors in all: a sandbox still gets as many as it can work with.
    let budget = heyvm_mounts::HandleBudget::new(1024);
    let servers = ["one", "two"].map(|name| {
        let history = heyvm_mounts::History::Fresh(journal.path().join(name));
        let directory = heyvm_mounts::Directory::open(&shared).unwrap();
        heyvm_mounts::Server::open(directory, false, &history, &budget)
    });
    let open = |server: &heyvm_mounts::Server| {
        let answer = server.answer(&request(OPENDIR, ROOT, &[0; 8])).unwrap();
        i32::from_ne_bytes(answer[4..8].try_into().unwrap())
    };
    let opened = (0..).take_while(|_| open(&servers[0]) == 0).count();
    assert_eq!((opened, open(&servers[1])), (64, -ENFILE));
    drop(servers.into_iter().next());
    let again = heyvm_mounts::Server::open(
        heyvm_mounts::Directory::open(&shared).unwrap(),
        false,
        &heyvm_mounts::History::Fresh(journal.path().join("three")),
        &budget,
    );
    assert_eq!(open(&again), 0, "what a mount held is given back with it");
}
