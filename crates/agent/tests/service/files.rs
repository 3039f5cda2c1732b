//! Files and archives.

use std::{
    fs,
    io::Read,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
};

use heyvm_agent_protocol::v1::*;
use tonic::{Code, Status, Streaming};

use crate::harness::{Agent, Client};

async fn client() -> (tempfile::TempDir, Client) {
    let dir = tempfile::tempdir().unwrap();
    let client = Agent::personalized(dir.path()).client().await;
    (dir, client)
}

async fn collect(mut chunks: Streaming<FileChunk>) -> Result<Vec<u8>, Status> {
    let mut all = Vec::new();
    while let Some(chunk) = chunks.message().await? {
        all.extend(chunk.data);
    }
    Ok(all)
}

async fn read(client: &mut Client, path: &Path) -> Result<Vec<u8>, Status> {
    collect(client.read_file(ReadFileRequest { path: path.to_str().unwrap().into() }).await?.into_inner()).await
}

async fn write(client: &mut Client, path: &Path, mode: u32, content: &[u8], parents: bool) -> Result<u64, Status> {
    let first = WriteFileInput { path: path.to_str().unwrap().into(), mode, create_parents: parents, data: Vec::new() };
    let rest = content.chunks(60_000).map(|data| WriteFileInput { data: data.to_vec(), ..WriteFileInput::default() });
    let messages: Vec<_> = [first].into_iter().chain(rest).collect();
    Ok(client.write_file(tokio_stream::iter(messages)).await?.into_inner().size)
}

#[tokio::test]
async fn a_file_comes_back_as_it_went() {
    let (dir, mut client) = client().await;
    let path = dir.path().join("a/b/file");
    let content: Vec<u8> = (0..1_000_003_u32).map(|n| (n % 253) as u8).collect();
    assert_eq!(write(&mut client, &path, 0o750, &content, false).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(write(&mut client, &path, 0o750, &content, true).await.unwrap(), content.len() as u64);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o750);
    assert!(read(&mut client, &path).await.unwrap() == content);
    assert_eq!(write(&mut client, &path, 0, b"short", false).await.unwrap(), 5);
    assert_eq!(read(&mut client, &path).await.unwrap(), b"short");
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "something half-made is left");
}

#[tokio::test]
async fn writing_through_a_link_keeps_the_link() {
    let (dir, mut client) = client().await;
    let link = dir.path().join("link");
    fs::write(dir.path().join("real"), "old").unwrap();
    symlink("real", &link).unwrap();
    write(&mut client, &link, 0, b"new", false).await.unwrap();
    assert!(link.is_symlink());
    assert_eq!(fs::read(dir.path().join("real")).unwrap(), b"new");
}

#[tokio::test]
async fn what_is_not_a_file_is_neither_read_nor_written() {
    let (dir, mut client) = client().await;
    let fifo = dir.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    for path in [dir.path(), &fifo, Path::new("/dev/zero"), Path::new("relative")] {
        let refused = read(&mut client, path).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{path:?}");
        let refused = write(&mut client, path, 0, b"x", false).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{path:?}");
    }
    assert_eq!(read(&mut client, &dir.path().join("none")).await.unwrap_err().code(), Code::NotFound);
}

/// Kind, name, target of a link, content.
type Entry<'a> = (tar::EntryType, &'a str, &'a str, &'a [u8]);

/// An archive of entries that the `tar` crate itself would refuse to write.
fn archive(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (kind, name, link, content) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(0o640);
        header.set_mtime(1_000_000_000);
        header.set_size(content.len() as u64);
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_gnu_mut().unwrap().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        builder.append(&header, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

async fn unpack(client: &mut Client, first: UnpackInput, archive: &[u8]) -> Result<UnpackReply, Status> {
    let rest = archive.chunks(10_000).map(|data| UnpackInput { data: data.to_vec(), ..UnpackInput::default() });
    let messages: Vec<_> = [first].into_iter().chain(rest).collect();
    Ok(client.unpack(tokio_stream::iter(messages)).await?.into_inner())
}

fn into(dir: &Path) -> UnpackInput {
    UnpackInput { path: dir.to_str().unwrap().into(), ..UnpackInput::default() }
}

use tar::EntryType::{Char, Directory, Fifo, Link, Regular, Symlink};

#[tokio::test]
async fn an_archive_is_unpacked_and_packed_again() {
    let (dir, mut client) = client().await;
    let target = dir.path().join("work");
    let content = vec![b'c'; 200_000];
    let entries = [
        (Directory, "./", "", &b""[..]),
        (Directory, "./src/", "", b""),
        (Regular, "./src/main.py", "", &content),
        (Regular, "deep/down/here", "", b"deep"),
        (Symlink, "src/link", "../deep/down/here", b""),
        (Link, "hard", "src/main.py", b""),
    ];
    let done = unpack(&mut client, into(&target), &archive(&entries)).await.unwrap();
    assert_eq!((done.bytes, done.entries), (200_004, 6));
    assert_eq!(fs::read(target.join("src/link")).unwrap(), b"deep");
    assert_eq!(fs::read(target.join("hard")).unwrap(), content);
    let meta = fs::metadata(target.join("deep/down/here")).unwrap();
    assert_eq!(meta.permissions().mode() & 0o7777, 0o640);
    assert_eq!(meta.modified().unwrap().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs(), 1_000_000_000);

    let request = PackRequest { path: target.to_str().unwrap().into() };
    let packed = collect(client.pack(request).await.unwrap().into_inner()).await.unwrap();
    let again = dir.path().join("again");
    unpack(&mut client, into(&again), &packed).await.unwrap();
    let same = std::process::Command::new("diff").arg("-r").args([&target, &again]).status().unwrap();
    assert!(same.success());
    assert_eq!(fs::read_link(again.join("src/link")).unwrap(), Path::new("../deep/down/here"));

    let request = PackRequest { path: target.join("hard").to_str().unwrap().into() };
    let packed = collect(client.pack(request).await.unwrap().into_inner()).await.unwrap();
    let mut single = tar::Archive::new(&packed[..]);
    let mut entry = single.entries().unwrap().next().unwrap().unwrap();
    let mut text = Vec::new();
    entry.read_to_end(&mut text).unwrap();
    assert_eq!((entry.path().unwrap().as_ref(), text), (Path::new("hard"), content));
}

#[tokio::test]
async fn unpacking_again_replaces_and_clean_empties() {
    let (dir, mut client) = client().await;
    let target = dir.path().join("work");
    unpack(&mut client, into(&target), &archive(&[(Regular, "a", "", b"1"), (Symlink, "b", "a", b"")])).await.unwrap();
    fs::create_dir(target.join("own")).unwrap();
    // A link that is there is replaced, not followed.
    unpack(&mut client, into(&target), &archive(&[(Regular, "b", "", b"2")])).await.unwrap();
    assert_eq!((fs::read(target.join("a")).unwrap(), fs::read(target.join("b")).unwrap()), (b"1".into(), b"2".into()));
    assert!(target.join("own").is_dir());
    let clean = UnpackInput { clean: true, ..into(&target) };
    unpack(&mut client, clean, &archive(&[(Regular, "c", "", b"3")])).await.unwrap();
    let left = || fs::read_dir(&target).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
    assert_eq!(left(), ["c"]);
    let clean = UnpackInput { clean: true, ..into(&target) };
    let hostile = archive(&[(Regular, "d", "", b"4"), (Regular, "../x", "", b"5")]);
    unpack(&mut client, clean, &hostile).await.unwrap_err();
    assert_eq!(left(), ["c"], "an archive that fails leaves everything as it was");
}

#[tokio::test]
async fn one_directory_of_an_archive_is_unpacked_without_its_name() {
    let (dir, mut client) = client().await;
    let target = dir.path().join("work");
    let entries = [
        (Directory, "srv/", "", &b""[..]),
        (Directory, "srv/app/", "", b""),
        (Regular, "./srv/app/a", "", b"1"),
        (Link, "srv/app/b", "srv/app/a", b""),
        (Symlink, "srv/app/down/c", "../a", b""),
        (Regular, "srv/apple", "", b"beside"),
        (Regular, "x", "", b"beside"),
    ];
    let below = |root: &str| UnpackInput { root: root.into(), clean: true, ..into(&target) };
    unpack(&mut client, below("srv/app"), &archive(&entries)).await.unwrap();
    let mut left: Vec<_> = fs::read_dir(&target).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["a", "b", "down"]);
    assert_eq!(
        (fs::read(target.join("b")).unwrap(), fs::read(target.join("down/c")).unwrap()),
        (b"1".into(), b"1".into())
    );
    for root in ["srv/ap", "none", "../work", "/srv"] {
        unpack(&mut client, below(root), &archive(&entries)).await.unwrap_err();
    }
    let leads_out = [(Regular, "x", "", &b"1"[..]), (Link, "srv/app/y", "x", b"")];
    unpack(&mut client, below("srv/app"), &archive(&leads_out)).await.unwrap_err();
    assert!(target.join("a").exists(), "what is refused changes nothing");
}

#[tokio::test]
async fn nothing_gets_out_of_the_directory() {
    let (dir, mut client) = client().await;
    let outside = dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "secret").unwrap();
    let target = dir.path().join("work");
    fs::create_dir(&target).unwrap();
    // One that was there before, as a program in the sandbox may have left it.
    symlink("../outside", target.join("trap")).unwrap();
    let bad: [&[Entry<'_>]; 10] = [
        &[(Regular, "../outside/x", "", b"x")],
        &[(Regular, "/tmp/heyvm-x", "", b"x")],
        &[(Regular, "a/../../outside/x", "", b"x")],
        &[(Symlink, "s", "../outside", b""), (Regular, "s/x", "", b"x")],
        &[(Symlink, "d/s", "../../outside", b""), (Link, "h", "d/s/secret", b"")],
        &[(Link, "h", "../outside/secret", b"")],
        &[(Link, "h", "trap/secret", b"")],
        &[(Regular, "trap/x", "", b"x")],
        &[(Char, "null", "", b"")],
        &[(Fifo, "pipe", "", b"")],
    ];
    for entries in bad {
        let refused = unpack(&mut client, into(&target), &archive(entries)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{entries:?}: {refused}");
    }
    let there: Vec<_> = fs::read_dir(&outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(there, ["secret"]);
    assert!(!target.join("h").exists() && !Path::new("/tmp/heyvm-x").exists());
}

#[tokio::test]
async fn links_are_the_sandboxs_own_and_kept_as_they_are() {
    let (dir, mut client) = client().await;
    let target = dir.path().join("work");
    let links = [("python", "/usr/bin/python3"), ("dangling", "none"), (".#file", "me@host.1:2"), ("d/up", "../../x")];
    let entries: Vec<Entry<'_>> = links.iter().map(|(name, to)| (Symlink, *name, *to, &b""[..])).collect();
    unpack(&mut client, into(&target), &archive(&entries)).await.unwrap();
    for (name, to) in links {
        assert_eq!(fs::read_link(target.join(name)).unwrap(), Path::new(to));
    }
}

#[tokio::test]
async fn nothing_behind_a_mount_is_removed() {
    let (_dir, mut client) = client().await;
    // Every Linux has one, and removing it would not succeed even where nothing else was in the way.
    for path in ["/proc"] {
        let clean = UnpackInput { path: path.into(), clean: true, ..UnpackInput::default() };
        unpack(&mut client, clean, &archive(&[(Regular, "x", "", b"")])).await.unwrap_err();
    }
    let refused = client.remove(RemoveRequest { path: "/proc".into(), recursive: true }).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
}

#[tokio::test]
async fn an_archive_may_not_be_larger_than_allowed() {
    let (dir, mut client) = client().await;
    let many: Vec<_> = (0..20).map(|_| (Regular, "same", "", &b"12345678"[..])).collect();
    let within = UnpackInput { max_bytes: 160, max_entries: 20, ..into(dir.path()) };
    unpack(&mut client, within.clone(), &archive(&many)).await.unwrap();
    for tight in [UnpackInput { max_bytes: 159, ..within.clone() }, UnpackInput { max_entries: 19, ..within }] {
        let refused = unpack(&mut client, tight, &archive(&many)).await.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted);
    }
}

#[tokio::test]
async fn a_broken_archive_is_refused() {
    let (dir, mut client) = client().await;
    let whole = archive(&[(Regular, "a", "", &[b'a'; 5000])]);
    let long_name = archive(&[(tar::EntryType::GNULongName, "././@LongLink", "", &[b'n'; 3 << 20])]);
    for broken in [&whole[..2000], &[7; 5000][..], &long_name] {
        let refused = unpack(&mut client, into(dir.path()), broken).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    }
    let name = "n/".repeat(60_000);
    let mut deep = tar::Builder::new(Vec::new());
    deep.append_data(&mut tar::Header::new_gnu(), &name[..4], &b""[..]).unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::GNULongName);
    header.set_size(name.len() as u64);
    header.set_cksum();
    deep.append(&header, name.as_bytes()).unwrap();
    deep.append(&header_of("x"), &b""[..]).unwrap();
    let refused = unpack(&mut client, into(dir.path()), &deep.into_inner().unwrap()).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
}

fn header_of(name: &str) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_path(name).unwrap();
    header.set_size(0);
    header.set_cksum();
    header
}
