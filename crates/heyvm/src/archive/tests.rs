//! Directories as people have them, and as they must not be.

use std::{
    ffi::OsStr,
    os::unix::{
        ffi::OsStrExt,
        fs::{PermissionsExt, symlink},
        net::UnixListener,
    },
};

use super::*;

fn pack(directory: &Path, no_ignore: bool) -> Result<Vec<u8>, ApiError> {
    packed(&Plan::of(directory, no_ignore)?).map(|(tar, _)| tar)
}

fn packed(plan: &Plan) -> Result<(Vec<u8>, Option<String>), ApiError> {
    let mut tar = Vec::new();
    let note = plan.write(&mut tar, |_| {}).map_err(|problem| refuse(&problem))?;
    Ok((tar, note))
}

fn app(files: &[&str]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in files {
        fs::create_dir_all(dir.path().join(name).parent().unwrap()).unwrap();
        fs::write(dir.path().join(name), "x").unwrap();
    }
    dir
}

/// Name, permissions and link target of every entry.
fn entries(tar: Vec<u8>) -> Vec<(PathBuf, u32, Option<PathBuf>)> {
    let mut archive = tar::Archive::new(&tar[..]);
    let told = |entry: io::Result<tar::Entry<'_, &[u8]>>| {
        let entry = entry.unwrap();
        let target = entry.link_name().unwrap().map(|target| target.into_owned());
        (entry.path().unwrap().into_owned(), entry.header().mode().unwrap(), target)
    };
    archive.entries().unwrap().map(told).collect()
}

fn names(directory: &Path, no_ignore: bool) -> Vec<String> {
    let entries = entries(pack(directory, no_ignore).unwrap());
    entries.into_iter().map(|(name, ..)| name.display().to_string()).collect()
}

/// The error of packing, which must name `what` and say what to do.
fn refusal(directory: &Path, what: &str) -> ApiError {
    let error = pack(directory, false).unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidDirectory, "{error:?}");
    assert!(error.message.contains(what), "{what} is not named: {error:?}");
    assert!(error.hint.is_some() && error.step.as_deref() == Some("archive"), "{error:?}");
    error
}

#[test]
fn ignored_files_stay_behind() {
    let dir = app(&["app.py", "kept/file", "node_modules/m/index.js", "deep/target/x", "secret.env", "big.bin"]);
    fs::write(dir.path().join(".gitignore"), "*.env\n").unwrap();
    fs::write(dir.path().join(".heyvmignore"), "big.bin\n").unwrap();
    assert_eq!(names(dir.path(), false), [".gitignore", ".heyvmignore", "app.py", "deep", "kept", "kept/file"]);
    let all = names(dir.path(), true);
    for name in ["node_modules/m/index.js", "deep/target/x", "secret.env", "big.bin"] {
        assert!(all.iter().any(|other| other == name), "{name} is missing: {all:?}");
    }
}

#[test]
fn our_list_yields_to_the_users_and_gits_to_ours() {
    let dir = app(&["target/program", "node_modules/m.js", "dist/bundle.js", "sub/local.txt"]);
    fs::write(dir.path().join(".gitignore"), "dist/\n").unwrap();
    fs::write(dir.path().join(".heyvmignore"), "!target/\n!dist/\n").unwrap();
    fs::write(dir.path().join("sub/.heyvmignore"), "local.txt\n").unwrap();
    let found = names(dir.path(), false);
    assert_eq!(
        found,
        [".gitignore", ".heyvmignore", "dist", "dist/bundle.js", "sub", "sub/.heyvmignore", "target", "target/program"]
    );
}

#[test]
fn a_pattern_that_means_nothing_is_told_of() {
    let dir = app(&["app.py"]);
    fs::write(dir.path().join(".heyvmignore"), "secrets[z-a]\n").unwrap();
    refusal(dir.path(), ".heyvmignore");
    assert!(names(dir.path(), true).contains(&"app.py".to_owned()));
}

#[test]
fn the_same_files_of_the_same_times_are_the_same_bytes() {
    for compression in [Compression::Gzip, Compression::Zstd] {
        let bytes = || {
            let dir = app(&["b", "a/c"]);
            for path in ["b", "a/c", "a"] {
                let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
                fs::File::open(dir.path().join(path)).unwrap().set_modified(time).unwrap();
            }
            let mut packed = Compressor::new(compression, Vec::new()).unwrap();
            Plan::of(dir.path(), false).unwrap().write(&mut packed, |_| {}).unwrap();
            packed.finish().unwrap()
        };
        assert_eq!(bytes(), bytes());
        heyvm_archives::check(&bytes()[..], &Limits::STANDARD).unwrap();
    }
}

#[test]
fn permissions_links_and_empty_directories_are_kept() {
    let dir = app(&["run.sh", "data"]);
    fs::set_permissions(dir.path().join("run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(dir.path().join("data"), fs::Permissions::from_mode(0o640)).unwrap();
    fs::create_dir_all(dir.path().join("empty/inner")).unwrap();
    symlink("../run.sh", dir.path().join("empty/link")).unwrap();
    let found = entries(pack(dir.path(), false).unwrap());
    let of = |name: &str| found.iter().find(|(path, ..)| path == Path::new(name)).unwrap_or_else(|| panic!("{name}"));
    assert_eq!(of("run.sh").1, 0o755);
    assert_eq!(of("data").1, 0o640);
    assert!(of("empty/inner").2.is_none());
    assert_eq!(of("empty/link").2.as_deref(), Some(Path::new("../run.sh")));
}

#[test]
fn names_are_bytes_of_any_kind_and_length() {
    let dir = tempfile::tempdir().unwrap();
    let odd = OsStr::from_bytes(b"\xff\xfe name\n");
    let long = PathBuf::from("d".repeat(120)).join("f".repeat(200));
    fs::write(dir.path().join(odd), "x").unwrap();
    fs::create_dir(dir.path().join(long.parent().unwrap())).unwrap();
    fs::write(dir.path().join(&long), "x").unwrap();
    let found: Vec<PathBuf> = entries(pack(dir.path(), false).unwrap()).into_iter().map(|(path, ..)| path).collect();
    assert!(found.contains(&PathBuf::from(odd)) && found.contains(&long), "{found:?}");
}

#[test]
fn sockets_and_fifos_are_left_out_with_one_note() {
    let dir = app(&["app.py"]);
    let _socket = UnixListener::bind(dir.path().join("app.sock")).unwrap();
    let note = |dir: &Path| packed(&Plan::of(dir, false).unwrap()).unwrap().1.unwrap();
    assert_eq!(note(dir.path()), "1 socket, FIFO or device was left out: app.sock");
    for number in 1..8 {
        nix::unistd::mkfifo(&dir.path().join(format!("queue{number}")), nix::sys::stat::Mode::S_IRWXU).unwrap();
    }
    assert_eq!(
        note(dir.path()),
        "8 sockets, FIFOs and devices were left out: app.sock, queue1, queue2, queue3, queue4 and 3 more"
    );
    assert_eq!(names(dir.path(), false), ["app.py"]);
}

#[test]
fn links_are_kept_wherever_they_lead() {
    let dir = app(&["sub/file"]);
    let links =
        [("a", "/usr/bin/python3"), ("b", "../outside"), ("c", "missing"), ("d", "d"), (".#file", "me@host.1:2")];
    for (name, target) in links {
        symlink(target, dir.path().join(name)).unwrap();
    }
    let found = entries(pack(dir.path(), false).unwrap());
    for (name, target) in links {
        assert!(found.iter().any(|(path, _, to)| path == Path::new(name) && to.as_deref() == Some(Path::new(target))));
    }
    heyvm_archives::check(&compressed(&pack(dir.path(), false).unwrap())[..], &Limits::STANDARD).unwrap();
}

fn compressed(tar: &[u8]) -> Vec<u8> {
    let mut packed = Compressor::new(Compression::Zstd, Vec::new()).unwrap();
    packed.write_all(tar).unwrap();
    packed.finish().unwrap()
}

#[test]
fn one_line_says_how_much_is_ignored_and_why() {
    let dir = app(&["app.py", "node_modules/m/index.js", "dist/built.js", "a.log", "sub/b.log", ".git/config"]);
    let note = |no_ignore| Plan::of(dir.path(), no_ignore).unwrap().ignored();
    assert_eq!(
        note(false).unwrap(),
        "1 file or directory is ignored (1 by the default list): node_modules/; --no-ignore takes all"
    );
    fs::write(dir.path().join(".gitignore"), "*.log\ndist/\n").unwrap();
    let line = note(false).unwrap();
    assert!(
        line.starts_with(
            "4 files and directories are ignored (3 by .gitignore or .heyvmignore, 1 by the default list): "
        ),
        "{line}"
    );
    for name in ["a.log", "dist/", "node_modules/", "sub/b.log"] {
        assert!(line.contains(name), "{line}");
    }
    assert_eq!(note(true), None);
}

#[test]
fn what_a_server_would_refuse_is_refused_at_once() {
    let dir = app(&["app.py"]);
    fs::File::create(dir.path().join("large")).unwrap().set_len(9 << 30).unwrap();
    let plan = Plan::of(dir.path(), false).unwrap();
    let error = plan.check(&Limits::STANDARD).unwrap_err();
    let hint = error.hint.unwrap();
    assert!(error.code == ErrorCode::TooLarge && hint.contains("heyvm cp") && hint.contains("--mount"), "{hint}");
    plan.check(&Limits::NONE).unwrap();
}

#[test]
fn a_directory_must_be_one_and_hold_something() {
    let dir = app(&["file"]);
    refusal(&dir.path().join("missing"), "missing");
    refusal(&dir.path().join("file"), "not a directory");
    let empty = tempfile::tempdir().unwrap();
    refusal(empty.path(), &empty.path().display().to_string());
    let ignored = app(&["node_modules/x.js"]);
    assert!(refusal(ignored.path(), "nothing to deploy").hint.unwrap().contains("--no-ignore"));
}

#[test]
fn what_may_not_be_read_is_refused_by_name() {
    for name in ["private", "private/file"] {
        let dir = app(&["app.py", "private/file"]);
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(dir.path().join(name), fs::Permissions::from_mode(0o000)).unwrap();
        let (path, name) = (dir.path().to_owned(), name.to_owned());
        // Root reads everything: this thread's file accesses are those of nobody.
        let checked = std::thread::spawn(move || {
            nix::unistd::setfsuid(65534.into());
            refusal(&path, &name)
        });
        let error = checked.join().unwrap();
        assert!(error.message.to_lowercase().contains("permission denied"), "{error:?}");
        fs::set_permissions(dir.path().join("private"), fs::Permissions::from_mode(0o700)).unwrap();
    }
}

#[test]
fn what_vanishes_while_it_is_packed_was_never_there() {
    let dir = app(&["a", "gone", "z"]);
    let plan = Plan::of(dir.path(), false).unwrap();
    fs::remove_file(dir.path().join("gone")).unwrap();
    let found: Vec<PathBuf> = entries(packed(&plan).unwrap().0).into_iter().map(|(path, ..)| path).collect();
    assert_eq!(found, [Path::new("a"), Path::new("z")]);
}

#[test]
fn what_the_repository_above_leaves_out_stays_out() {
    let dir = app(&["services/api/app.py", "services/api/.env", "services/api/local.log", "dist/built.js"]);
    fs::create_dir_all(dir.path().join(".git/info")).unwrap();
    fs::write(dir.path().join(".gitignore"), ".env\ndist/\n").unwrap();
    fs::write(dir.path().join(".git/info/exclude"), "*.log\n").unwrap();
    assert_eq!(names(&dir.path().join("services/api"), false), ["app.py"]);
    assert_eq!(names(&dir.path().join("services/api"), true), [".env", "app.py", "local.log"]);
    assert_eq!(names(&dir.path().join("dist"), false), ["built.js"], "what is named on the command line goes along");
}
