use std::{
    fs,
    io::{self, Read},
    os::unix::fs::symlink,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use heyvm_bounded_tar::{EntryType, Error, Options, unpack};
use tar::{Builder, Header};
use tempfile::tempdir;

/// An entry whatever its name is: the usual way of writing a tar refuses those that matter here.
fn raw(builder: &mut Builder<Vec<u8>>, kind: EntryType, name: &str, content: &str) {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.set_mode(if kind == EntryType::Directory { 0o755 } else { 0o644 });
    let is_file = kind == EntryType::Regular;
    header.set_size(if is_file { content.len() as u64 } else { 0 });
    if !is_file {
        header.as_mut_bytes()[157..157 + content.len()].copy_from_slice(content.as_bytes());
    }
    header.set_cksum();
    builder.append(&header, if is_file { content.as_bytes() } else { b"" }).unwrap();
}

fn tar(entries: &[(EntryType, &str, &str)]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    entries.iter().for_each(|(kind, name, content)| raw(&mut builder, *kind, name, content));
    builder.into_inner().unwrap()
}

use EntryType::{Directory, Link, Regular, Symlink};

#[test]
fn nothing_is_written_outside() {
    for entries in [
        vec![(Regular, "../outside/file", "x")],
        vec![(Regular, "/outside/file", "x")],
        vec![(Directory, "a/", ""), (Regular, "a/../../outside/file", "x")],
        vec![(Symlink, "door", "../outside"), (Regular, "door/file", "x")],
        vec![(Symlink, "door", "../outside"), (Directory, "door/dir", "")],
        vec![(Link, "hard", "../outside/kept"), (Regular, "hard", "x")],
        vec![(Symlink, "door", "../outside"), (Link, "hard", "door/kept")],
        vec![(Symlink, "door", "../outside"), (Symlink, "door/link", "x")],
    ] {
        for options in [Options::for_a_guest(), Options::for_the_host()] {
            let dir = tempdir().unwrap();
            let (inside, outside) = (dir.path().join("inside"), dir.path().join("outside"));
            fs::create_dir(&inside).unwrap();
            fs::create_dir(&outside).unwrap();
            fs::write(outside.join("kept"), "mine").unwrap();
            // Left out is the link, or refused what goes through it.
            if let Err(error) = unpack(&inside, &options, &tar(&entries)[..]) {
                assert!(matches!(error, Error::Refused { .. } | Error::Io { .. }), "{entries:?}: {error}");
            }
            let names: Vec<_> = fs::read_dir(&outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(names, ["kept"], "{entries:?}");
            assert_eq!(fs::read_to_string(outside.join("kept")).unwrap(), "mine");
        }
    }
}

/// Someone swaps a directory of the copy for a link out of it, again and again, while files are written below it.
#[test]
fn a_directory_that_is_swapped_meanwhile_leads_nowhere() {
    let dir = tempdir().unwrap();
    let (inside, outside) = (dir.path().join("inside"), dir.path().join("outside"));
    fs::create_dir_all(inside.join("d")).unwrap();
    fs::create_dir(&outside).unwrap();
    symlink(&outside, dir.path().join("link")).unwrap();
    let entries: Vec<_> = (0..200).flat_map(|n| [(Regular, format!("d/{n}")), (Directory, format!("e/{n}"))]).collect();
    let entries: Vec<_> = entries.iter().map(|(kind, name)| (*kind, name.as_str(), "")).collect();
    let (tar, ended) = (tar(&entries), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            use rustix::fs::{CWD, RenameFlags, renameat_with};
            while !ended.load(Ordering::Relaxed) {
                renameat_with(CWD, inside.join("d"), CWD, dir.path().join("link"), RenameFlags::EXCHANGE).ok();
            }
        });
        for _ in 0..50 {
            for options in [Options::for_the_host(), Options::for_a_guest()] {
                unpack(&inside, &options, &tar[..]).ok();
            }
        }
        ended.store(true, Ordering::Relaxed);
    });
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}

#[test]
fn limits_hold() {
    let dir = tempdir().unwrap();
    let two = tar(&[(Regular, "a", "12345"), (Regular, "b", "12345")]);
    for (bytes, entries, fits) in [(10, 2, true), (9, 2, false), (10, 1, false), (0, 0, true)] {
        let done = unpack(dir.path(), &Options::for_a_guest().limits(bytes, entries), &two[..]);
        assert_eq!(done.is_ok(), fits, "{bytes} {entries}");
    }
    for length in [0, 100, 515, 1023] {
        let error = unpack(dir.path(), &Options::for_a_guest(), (&two[..length]).chain(BreaksOff)).unwrap_err();
        assert!(matches!(error, Error::Broken(_)), "{length}");
    }
}

#[derive(Debug)]
struct BreaksOff;

impl Read for BreaksOff {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ConnectionReset.into())
    }
}

#[test]
fn only_what_lies_below_a_root_is_unpacked() {
    let dir = tempdir().unwrap();
    let sent =
        tar(&[(Regular, "app/a", "1"), (Regular, "other", "2"), (Link, "app/b", "app/a"), (Link, "app/c", "other")]);
    let options = Options::for_a_guest().below("app").unwrap();
    assert!(
        matches!(unpack(dir.path(), &options, &sent[..]), Err(Error::Refused { path, .. }) if path == Path::new("c"))
    );
    assert_eq!(fs::read_to_string(dir.path().join("b")).unwrap(), "1");
    assert!(!dir.path().join("other").exists());
    let none = unpack(dir.path(), &Options::for_a_guest().below("none").unwrap(), &sent[..]);
    assert!(matches!(none, Err(Error::Refused { .. })));
    assert!(Options::for_a_guest().below("../x").is_err());
}
