//! Streams as an honest sandbox sends them, and as no sandbox should.

use tar::{Builder, Header};

use super::*;

/// An entry whatever its name is: the usual way of writing a tar refuses those that matter here.
fn raw(builder: &mut Builder<Vec<u8>>, kind: EntryType, name: &str, content: &str) {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.set_mode(if kind == EntryType::Directory { 0o555 } else { 0o4750 });
    let is_file = kind == EntryType::Regular;
    header.set_size(if is_file { content.len() as u64 } else { 0 });
    if !is_file && !content.is_empty() {
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

use EntryType::{Directory, Regular, Symlink};

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn a_directory_comes_out_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("copy");
    let sent = tar(&[(Directory, "sub/", ""), (Regular, "sub/file", "text"), (Symlink, "sub/link", "../sub/file")]);
    let copied = directory(&sent[..], &target).unwrap();
    assert_eq!(copied, Copied { bytes: 4, entries: 3, notes: vec![] });
    assert_eq!(fs::read_to_string(target.join("sub/link")).unwrap(), "text");
    assert_eq!(mode(&target.join("sub/file")), 0o750, "without set-uid");
    assert_eq!(mode(&target.join("sub")), 0o555);
}

#[test]
fn links_that_lead_out_are_left_out_and_told_of() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("copy");
    let sent = tar(&[
        (Directory, "a/", ""),
        (Symlink, "absolute", "/etc/passwd"),
        (Symlink, "a/up", "../../x"),
        (Symlink, "a/top", ".."),
        (Symlink, "devious", "a/top/../.."),
        (Symlink, "fine", "a/none"),
    ]);
    let copied = directory(&sent[..], &target).unwrap();
    assert_eq!(copied.notes, ["3 links were left out, which lead out of the copy: absolute, a/up, devious"]);
    for name in ["absolute", "a/up", "devious"] {
        assert!(fs::symlink_metadata(target.join(name)).is_err(), "{name}");
    }
    assert_eq!(fs::read_link(target.join("fine")).unwrap(), Path::new("a/none"));
}

#[test]
fn nothing_is_written_outside_of_the_target() {
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    for (number, entries) in [
        vec![(Regular, "../outside/file", "x")],
        vec![(Regular, "/outside/file", "x")],
        vec![(Directory, "a/", ""), (Regular, "a/../../outside/file", "x")],
        vec![(Directory, "a/", ""), (Symlink, "door", "a"), (Regular, "door/file", "x")],
        vec![(EntryType::Link, "hard", "../outside/file")],
        vec![(EntryType::Fifo, "pipe", "")],
        vec![(EntryType::Char, "device", "")],
    ]
    .into_iter()
    .enumerate()
    {
        fs::create_dir_all(&outside).unwrap();
        let error = directory(&tar(&entries)[..], &dir.path().join(format!("copy{number}"))).unwrap_err();
        assert_eq!(error.code, ErrorCode::ArchiveInvalid, "{entries:?}: {error:?}");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "{entries:?}");
    }
}

#[test]
fn links_that_are_there_already_are_replaced_and_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let (target, outside) = (dir.path().join("copy"), dir.path().join("outside"));
    fs::create_dir(&target).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "mine").unwrap();
    std::os::unix::fs::symlink(outside.join("file"), target.join("file")).unwrap();
    std::os::unix::fs::symlink(&outside, target.join("dir")).unwrap();
    directory(&tar(&[(Regular, "file", "theirs")])[..], &target).unwrap();
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "theirs");
    assert!(directory(&tar(&[(Directory, "dir/", "")])[..], &target).is_err());
    assert!(directory(&tar(&[(Regular, "dir/file", "theirs")])[..], &target).is_err());
    assert_eq!(fs::read_to_string(outside.join("file")).unwrap(), "mine");
}

/// A stream that breaks off where the bytes end.
struct BreaksOff<'a>(&'a [u8]);

impl Read for BreaksOff<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buffer)? {
            0 => Err(io::ErrorKind::ConnectionReset.into()),
            length => Ok(length),
        }
    }
}

fn file(stream: impl Read, target: &Path) -> Result<Copied, ApiError> {
    only(stream, |entry| single(entry, target))
}

#[test]
fn headers_of_gigabytes_are_refused_and_not_held_in_memory() {
    for kind in [EntryType::GNULongName, EntryType::XHeader] {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(8 << 30);
        header.set_cksum();
        let endless = || header.as_bytes().as_slice().chain(io::repeat(b'x'));
        let dir = tempfile::tempdir().unwrap();
        for error in
            [directory(endless(), dir.path()).unwrap_err(), file(endless(), &dir.path().join("f")).unwrap_err()]
        {
            assert_eq!(error.code, ErrorCode::ArchiveInvalid, "{error:?}");
        }
    }
}

#[test]
fn a_file_is_whole_or_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("file");
    let sent = tar(&[(Regular, "name-there", "content")]);
    for length in [0, 100, 515] {
        assert_eq!(file(BreaksOff(&sent[..length]), &target).unwrap_err().code, ErrorCode::SandboxUnreachable);
    }
    assert_eq!(file(&sent[..515], &target).unwrap_err().code, ErrorCode::SandboxUnreachable);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    assert_eq!(file(&sent[..], &target).unwrap().bytes, 7);
    assert_eq!((fs::read_to_string(&target).unwrap().as_str(), mode(&target)), ("content", 0o750));
    let nowhere = file(&sent[..], &dir.path().join("missing/file")).unwrap_err();
    assert!(nowhere.message.contains("missing/file") && nowhere.hint.is_some(), "{nowhere:?}");
}

#[test]
fn a_directory_that_breaks_off_is_an_error_even_behind_its_last_entry() {
    let dir = tempfile::tempdir().unwrap();
    let sent = tar(&[(Regular, "file", "content")]);
    for length in [515, sent.len()] {
        let error = directory(BreaksOff(&sent[..length]), &dir.path().join("copy")).unwrap_err();
        assert_eq!(error.code, ErrorCode::SandboxUnreachable);
    }
}
