//! Bad input: each a clear error with a code and a hint on standard error, nothing half-done left behind.

use std::{
    fs,
    io::{Read, Write},
    path::Path,
    process::Command,
};

use flate2::{Compression, write::GzEncoder};
use heyvm_e2e::{Host, Ran, leaks};
use serde_json::json;

/// Nothing is left of a refused request.
#[track_caller]
fn nothing_left(host: &Host) {
    assert!(host.names(&[]).is_empty());
    assert_eq!(leaks::machines_of(host.scratch()).len(), 0);
    assert_eq!(leaks::sandboxes_of(&host.home).len(), 0);
}

#[test]
fn unknown_sandbox() {
    let host = Host::new();
    for command in [
        &["get", "nobody"][..],
        &["stop", "nobody"],
        &["start", "nobody"],
        &["restart", "nobody"],
        &["rm", "-y", "nobody"],
        &["logs", "nobody"],
        &["bind", "nobody", "80"],
        &["unbind", "nobody", "80"],
        &["exec", "nobody", "--", "true"],
        &["wait-for", "nobody", "80", "--timeout", "1s"],
        &["cp", "nobody:/etc/passwd", "/dev/null"],
    ] {
        assert_eq!(host.refused(command).code, "sandbox_not_found", "{command:?}");
    }
}

#[test]
fn values_that_cannot_be() {
    let host = Host::new();
    let app = host.web_app();
    let app = app.to_str().expect("path");
    let cases: &[(&[&str], &str)] = &[
        (&["create", "--name", ""], "invalid_name"),
        (&["create", "--name", "../etc"], "invalid_name"),
        (&["create", "--name", "line\nbreak"], "invalid_name"),
        (&["create", "--open-port", "0"], "invalid_port"),
        (&["create", "--open-port", "70000"], "invalid_port"),
        (&["deploy", app, "--port", "0"], "invalid_port"),
        (&["deploy", app, "--port", "70000"], "invalid_port"),
        (&["deploy", app, "--port", "eighty"], "invalid_port"),
        (&["deploy", app, "--size-class", "gigantic"], "unknown_size_class"),
        (&["deploy", app, "--region", "MOON"], "unknown_region"),
        (&["deploy", app, "--env", "NOVALUE"], "invalid_argument"),
        (&["deploy", app, "--env", "=x"], "invalid_argument"),
        (&["deploy", app, "--health-timeout", "soon"], "invalid_argument"),
        (&["deploy", app, "--ttl-seconds", "-5"], "invalid_argument"),
        (&["deploy", app, "--no-such-flag"], "invalid_argument"),
    ];
    for (arguments, code) in cases {
        let refusal = host.refused(arguments);
        assert_eq!(&refusal.code, code, "{arguments:?}: {}", refusal.message);
    }
    let long = "n".repeat(300);
    assert_eq!(host.refused(&["create", "--name", &long]).code, "invalid_name");
    nothing_left(&host);
}

#[test]
fn bad_durations_and_ports_of_a_running_sandbox() {
    let host = Host::new();
    let vm = host.create(&[]);
    assert_eq!(host.refused(&["exec", &vm.id, "--timeout", "30 bananas", "--", "true"]).code, "invalid_argument");
    assert_eq!(host.refused(&["exec", &vm.id, "--env", "X", "--", "true"]).code, "invalid_argument");
    assert_eq!(host.refused(&["wait-for", &vm.id, "0", "--timeout", "1s"]).code, "invalid_port");
    assert_eq!(host.refused(&["wait-for", &vm.id, "80", "--timeout", "x"]).code, "invalid_argument");
    assert_eq!(host.refused(&["bind", &vm.id, "0"]).code, "invalid_port");
    assert_eq!(host.refused(&["bind", &vm.id, "70000"]).code, "invalid_port");
    assert_eq!(vm.sh("echo alive").out(), "alive");
}

#[test]
fn directories_that_cannot_be_deployed() {
    let host = Host::new();
    let root = host.scratch();
    let refused = |path: &Path| host.deploy_refused(path, &["--name", "doomed"]);
    assert_eq!(refused(&root.join("missing")).code, "invalid_directory");
    fs::create_dir(root.join("empty")).expect("directory");
    assert_eq!(refused(&root.join("empty")).code, "invalid_directory");
    fs::write(root.join("file"), "x").expect("file");
    assert_eq!(refused(&root.join("file")).code, "invalid_directory");

    nothing_left(&host);
}

/// A tar.gz with one entry whose name the tar library itself would refuse to write.
fn archive(name: &str, content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    builder.append(&header, content).expect("entry");
    builder.into_inner().expect("tar").finish().expect("gzip")
}

fn cut_in_half(mut archive: Vec<u8>) -> Vec<u8> {
    archive.truncate(archive.len() / 2);
    archive
}

/// One entry of zeros, all of them there: a thousandth of its size when compressed.
fn whole_bomb(kind: tar::EntryType, size: u64) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_path("bomb").expect("path");
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o644);
    header.set_cksum();
    let mut bomb = GzEncoder::new(Vec::new(), Compression::fast());
    bomb.write_all(header.as_bytes()).expect("header");
    let head = bomb.finish().expect("gzip");
    // Gzip members may follow one another: what is the same is compressed once.
    let mut piece = GzEncoder::new(Vec::new(), Compression::best());
    piece.write_all(&vec![0; 1 << 20]).expect("zeros");
    let piece = piece.finish().expect("gzip");
    let mut whole = head;
    (0..(size >> 20) + 1).for_each(|_| whole.extend_from_slice(&piece));
    whole
}

#[test]
fn archives_that_are_none_or_leave_their_directory_or_blow_up() {
    let host = Host::new();
    host.list(&[]); // starts the daemon
    let put = |body: Vec<u8>| crate::api::over_socket(&host, "PUT", "/archives", "application/gzip", body);
    let good = put(archive("fine.txt", b"fine"));
    assert!(good.1["archive_id"].as_str().expect("archive_id").starts_with("ar-"), "{good:?}");
    for (what, body, why) in [
        ("no archive", b"this is no archive".to_vec(), "gzip"),
        ("empty", Vec::new(), ""),
        ("parent directory", archive("../outside", b"x"), "leaves its directory"),
        ("deep parent directory", archive("a/../../outside", b"x"), "leaves its directory"),
        ("absolute", archive("/etc/cron.d/evil", b"x"), "leaves its directory"),
        ("cut off", cut_in_half(archive("fine.txt", &[7; 9000])), ""),
        ("a name of a GiB", whole_bomb(tar::EntryType::GNULongName, 1 << 30), "header"),
    ] {
        let (status, answer) = put(body);
        assert_eq!((status, &answer["error"]["code"]), (422, &"archive_invalid".into()), "{what}: {answer}");
        assert!(answer["error"]["message"].as_str().is_some_and(|text| text.contains(why)), "{what}: {answer}");
        assert!(answer["error"]["hint"].is_string(), "{what}: {answer}");
    }
    assert_eq!(
        leaks::entries(&host.home.join("archives")).filter(|path| path.is_file()).count(),
        1,
        "only the good one is kept"
    );
    let unknown = crate::api::over_socket(
        &host,
        "POST",
        "/sandboxes",
        "application/json",
        json!({"archive_id": "ar-000000"}).to_string().into_bytes(),
    );
    assert_eq!((unknown.0, &unknown.1["error"]["code"]), (404, &"archive_not_found".into()));
    nothing_left(&host);
}

#[test]
fn an_image_that_does_not_exist() {
    let host = Host::new();
    let refusal = host.refused(&["create", "--image", "127.0.0.1:9/no/such:image"]);
    assert!(["image_not_found", "registry_unavailable"].contains(&refusal.code.as_str()), "{}", refusal.code);
    assert_eq!(host.refused(&["create", "--image", "UPPER CASE?"]).code, "image_invalid");
    nothing_left(&host);
}

/// A small file system of its own in the place of a directory, gone at the end of the test.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn over(directory: std::path::PathBuf, size: &str) -> Self {
        fs::create_dir_all(&directory).expect("directory");
        let options = ["-t", "tmpfs", "-o", size, "heyvm-e2e"];
        Ran::of(Command::new("mount").args(options).arg(&directory), b"").succeeded();
        Self(directory)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        Ran::of(Command::new("umount").arg("-l").arg(&self.0), b"");
    }
}

#[test]
fn no_disk_space() {
    let host = Host::new();
    let app = host.app("large", &[("server.py", "x")]);
    let mut noise = fs::File::create(app.join("noise")).expect("file");
    let random = fs::File::open("/dev/urandom").expect("urandom");
    std::io::copy(&mut random.take(64 << 20), &mut noise).expect("noise");

    let archives = SmallDisk::over(host.home.join("archives"), "size=24m");
    let refusal = host.deploy_refused(&app, &["--name", "doomed"]);
    assert_eq!(refusal.code, "out_of_resources", "{}", refusal.message);
    assert_eq!(leaks::entries(&archives.0).count(), 0, "no half-written archive stays");
    drop(archives);

    let sandboxes = SmallDisk::over(host.home.join("sandboxes"), "size=64k");
    let refusal = host.refused(&["create", "--name", "doomed"]);
    assert_eq!(refusal.code, "out_of_resources", "{}", refusal.message);
    drop(sandboxes);
    nothing_left(&host);
}

#[test]
fn what_this_version_cannot_give_is_refused_by_name() {
    let host = Host::new();
    let app = host.web_app();
    let app = app.to_str().expect("path");
    let private = host.refused(&["deploy", app, "--port", "8080", "--private"]);
    assert_eq!(private.code, "unsupported", "{}", private.message);
    assert_eq!(host.refused(&["create", "--backend", "firecracker"]).code, "unsupported");
    nothing_left(&host);
}

#[test]
fn text_mode_tells_errors_on_standard_error() {
    let host = Host::new();
    let ran = host.run(&["get", "nobody"]);
    assert_eq!((ran.code, ran.out().as_str()), (1, ""));
    assert!(ran.err().contains("nobody"), "{}", ran.err());
    assert!(ran.err().to_lowercase().contains("hint"), "{}", ran.err());
}
