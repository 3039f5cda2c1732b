//! Directories as people have them, and as they must not be.

use std::{
    ffi::OsStr,
    io::Read,
    os::unix::{
        ffi::OsStrExt,
        fs::{PermissionsExt, symlink},
        net::UnixListener,
    },
};

use super::*;

fn pack(directory: &Path, no_ignore: bool) -> Result<File, ApiError> {
    super::pack(directory, no_ignore, |_| {})
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
fn entries(archive: File) -> Vec<(PathBuf, u32, Option<PathBuf>)> {
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(archive));
    let told = |entry: io::Result<tar::Entry<'_, _>>| {
        let entry: tar::Entry<'_, flate2::read::GzDecoder<File>> = entry.unwrap();
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
fn the_same_files_are_the_same_bytes() {
    let bytes = || {
        let mut bytes = Vec::new();
        pack(app(&["b", "a/c"]).path(), false).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    };
    assert_eq!(bytes(), bytes());
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
fn what_is_neither_file_nor_directory_is_refused() {
    let dir = app(&["app.py"]);
    let socket = UnixListener::bind(dir.path().join("app.sock")).unwrap();
    assert!(refusal(dir.path(), "app.sock").message.contains("socket"));
    drop(socket);
    fs::write(dir.path().join(".heyvmignore"), "app.sock\n").unwrap();
    assert!(names(dir.path(), false).contains(&"app.py".to_owned()), "as the hint says");
    nix::unistd::mkfifo(&dir.path().join("queue"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(refusal(dir.path(), "queue").message.contains("pipe"));
}

#[test]
fn links_that_lead_out_or_nowhere_are_refused() {
    for (target, what) in [
        ("/etc/passwd", "outside"),
        ("../outside", "outside"),
        ("sub/../../outside", "outside"),
        ("missing", "not there"),
        ("loop", "not there"),
    ] {
        let dir = app(&["sub/file"]);
        symlink(target, dir.path().join("loop")).unwrap();
        let error = refusal(dir.path(), "/loop");
        assert!(error.message.contains(what) && error.message.contains(target), "{target}: {error:?}");
    }
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
    let root = root_of(dir.path()).unwrap();
    let paths = listing::paths(&root, false).unwrap();
    fs::remove_file(dir.path().join("gone")).unwrap();
    let found: Vec<PathBuf> =
        entries(write(&root, &paths, |_| {}).unwrap()).into_iter().map(|(path, ..)| path).collect();
    assert_eq!(found, [Path::new("a"), Path::new("z")]);
}

#[test]
fn what_becomes_a_pipe_while_it_is_packed_does_not_block() {
    let dir = app(&["log"]);
    let log = dir.path().join("log");
    fs::remove_file(&log).unwrap();
    nix::unistd::mkfifo(&log, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut builder = Builder::new(Vec::new());
    let problem = entry::append_file(&mut builder, &log, Path::new("log"), Purpose::Deploy).unwrap_err();
    assert!(matches!(problem, Problem::Changed { .. }), "{problem}");
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
