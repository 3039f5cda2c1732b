use std::{
    fs::{self, File},
    io::{Seek, SeekFrom, Write},
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use heyvm_bounded_tar::{Kind, Options, Packer, Rules, Shrunk, unpack};
use tempfile::tempdir;

const RULES: Rules = Rules { shrunk: Shrunk::Refused, owners: false };

fn pack(dir: &Path, names: &[&str]) -> Vec<u8> {
    let mut packer = Packer::new(Vec::new(), RULES);
    for name in names {
        packer.append(&dir.join(name), Path::new(name)).unwrap();
    }
    packer.finish().unwrap()
}

fn through(tar: &[u8], to: &Path, options: &Options) {
    fs::create_dir_all(to).unwrap();
    unpack(to, options, tar).unwrap();
}

fn date(path: &Path, seconds: u64) {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    File::open(path).unwrap().set_modified(time).unwrap();
}

#[test]
fn modes_times_links_and_names_are_kept() {
    let dir = tempdir().unwrap();
    let from = dir.path().join("from");
    let long = "d/".repeat(60) + "file";
    fs::create_dir_all(from.join(&long).parent().unwrap()).unwrap();
    fs::write(from.join(&long), "long").unwrap();
    fs::create_dir(from.join("sub")).unwrap();
    fs::write(from.join("sub/tool"), "tool").unwrap();
    fs::set_permissions(from.join("sub/tool"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::hard_link(from.join("sub/tool"), from.join("z")).unwrap();
    for (name, target) in
        [("absolute", "/usr/bin/python3"), ("dangling", "none"), ("up", "../../out"), ("lock", "me@host.1:2")]
    {
        symlink(target, from.join(name)).unwrap();
    }
    fs::set_permissions(from.join("sub"), fs::Permissions::from_mode(0o2555)).unwrap();
    date(&from.join("sub/tool"), 1_000_000_001);
    date(&from.join("sub"), 1_000_000_002);
    let tar = pack(&from, &["absolute", "dangling", "lock", "sub", "sub/tool", "up", "z", &long]);
    let to = dir.path().join("to");
    through(&tar, &to, &Options::for_a_guest());
    let meta = |name: &str| fs::symlink_metadata(to.join(name)).unwrap();
    assert_eq!((meta("sub/tool").mode() & 0o7777, meta("sub/tool").mtime()), (0o4751, 1_000_000_001));
    assert_eq!((meta("sub").mode() & 0o7777, meta("sub").mtime()), (0o2555, 1_000_000_002));
    assert_eq!((meta("z").ino(), meta("z").nlink()), (meta("sub/tool").ino(), 2));
    assert_eq!(fs::read_to_string(to.join(&long)).unwrap(), "long");
    for (name, target) in
        [("absolute", "/usr/bin/python3"), ("dangling", "none"), ("up", "../../out"), ("lock", "me@host.1:2")]
    {
        assert_eq!(fs::read_link(to.join(name)).unwrap(), Path::new(target));
    }

    let host = dir.path().join("host");
    let (done, _) = {
        fs::create_dir(&host).unwrap();
        unpack(&host, &Options::for_the_host(), &tar[..]).unwrap()
    };
    assert_eq!(done.left_out.names, [Path::new("absolute"), Path::new("up")].map(PathBuf::from));
    assert_eq!((done.left_out.count, fs::metadata(host.join("sub/tool")).unwrap().mode() & 0o7777), (2, 0o751));
    // So that the directory can be removed by any user.
    for dir in [&from, &to, &host] {
        fs::set_permissions(dir.join("sub"), fs::Permissions::from_mode(0o755)).unwrap();
    }
}

fn sparse(path: &Path, pieces: &[u64], size: u64) {
    let mut file = File::create(path).unwrap();
    for at in pieces {
        file.seek(SeekFrom::Start(*at)).unwrap();
        file.write_all(b"data").unwrap();
    }
    file.set_len(size).unwrap();
}

#[test]
fn holes_are_kept_and_other_programs_agree() {
    let dir = tempdir().unwrap();
    let from = dir.path().join("from");
    fs::create_dir(&from).unwrap();
    let many: Vec<u64> = (0..60).map(|number| number << 20).collect();
    let long = "n".repeat(150);
    for (name, pieces, size) in [
        ("middle", &[1 << 30][..], 2 << 30),
        ("empty", &[][..], 1 << 30),
        ("end", &[(1 << 20) - 4][..], 1 << 20),
        ("many", &many[..], 61 << 20),
        (&long, &[0][..], 1 << 20),
    ] {
        sparse(&from.join(name), pieces, size);
    }
    let all = ["middle", "empty", "end", "many", &long];
    let tar = pack(&from, &all);
    assert!(tar.len() < 1 << 20, "{} bytes for {} files of holes", tar.len(), all.len());
    let ours = dir.path().join("ours");
    through(&tar, &ours, &Options::for_a_guest().limits(1 << 20, 10));
    let theirs = dir.path().join("theirs");
    fs::create_dir(&theirs).unwrap();
    fs::write(dir.path().join("tar"), &tar).unwrap();
    let gnu = Command::new("tar").arg("-xf").arg(dir.path().join("tar")).arg("-C").arg(&theirs).status().unwrap();
    assert!(gnu.success());
    for (name, to) in all.iter().flat_map(|name| [(name, &ours), (name, &theirs)]) {
        let (meta, original) = (fs::metadata(to.join(name)).unwrap(), fs::metadata(from.join(name)).unwrap());
        assert_eq!(meta.len(), original.len(), "{name}");
        assert!(meta.blocks() <= original.blocks() + 64, "{name}: {} blocks of {}", meta.blocks(), original.blocks());
        if meta.len() < 100 << 20 {
            assert!(fs::read(to.join(name)).unwrap() == fs::read(from.join(name)).unwrap(), "{name}");
        }
    }
    let mut middle = vec![0; 8];
    std::os::unix::fs::FileExt::read_exact_at(&File::open(ours.join("middle")).unwrap(), &mut middle, 1 << 30).unwrap();
    assert_eq!(middle, b"data\0\0\0\0");
    // And what they pack we unpack.
    let packed =
        Command::new("tar").args(["-S", "-c", "-f"]).arg(dir.path().join("gnu")).arg("-C").arg(&from).arg(".").status();
    assert!(packed.unwrap().success());
    let back = dir.path().join("back");
    through(&fs::read(dir.path().join("gnu")).unwrap(), &back, &Options::for_a_guest().limits(1 << 20, 10));
    assert!(fs::read(back.join("many")).unwrap() == fs::read(from.join("many")).unwrap());
}

#[test]
fn sockets_and_fifos_are_counted_and_left_out() {
    let dir = tempdir().unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
    assert!(Command::new("mkfifo").arg(dir.path().join("fifo")).status().unwrap().success());
    let mut packer = Packer::new(Vec::new(), RULES);
    for name in ["socket", "fifo"] {
        assert_eq!(packer.append(&dir.path().join(name), Path::new(name)).unwrap(), Kind::Special);
    }
    assert_eq!(packer.left_out(), (2, &["socket", "fifo"].map(PathBuf::from)[..]));
    assert!(packer.finish().unwrap().iter().all(|byte| *byte == 0));
}

/// Only root gives files away.
#[test]
fn a_tree_belongs_to_the_user_it_is_unpacked_for() {
    if fs::symlink_metadata("/proc/self").unwrap().uid() != 0 {
        return;
    }
    let from = tempfile::tempdir().unwrap();
    fs::create_dir_all(from.path().join("sub/deep")).unwrap();
    fs::write(from.path().join("sub/deep/tool"), "x").unwrap();
    fs::set_permissions(from.path().join("sub/deep/tool"), fs::Permissions::from_mode(0o4755)).unwrap();
    symlink("/nowhere", from.path().join("sub/link")).unwrap();
    let tar = pack(from.path(), &["sub", "sub/deep", "sub/deep/tool", "sub/link"]);
    let to = tempfile::tempdir().unwrap();
    through(&tar, to.path(), &Options::for_a_guest().owned_by(1234, 567));
    for name in ["", "sub", "sub/deep", "sub/deep/tool", "sub/link"] {
        let meta = fs::symlink_metadata(to.path().join(name)).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (1234, 567), "{name:?}");
    }
    let tool = fs::metadata(to.path().join("sub/deep/tool")).unwrap();
    assert_eq!(tool.permissions().mode() & 0o7777, 0o4755, "a change of the owner would take set-user-id away");
}
