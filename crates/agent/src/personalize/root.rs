//! The sandbox's root: its own disk over the image, under what the guest mounted at boot.
//!
//! Files of the host's making are put on the disk before the overlay is there: that is a plain write instead of a copy
//! from one layer to the other.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown},
    },
    path::{Path, PathBuf},
};

use heyvm_agent_protocol::v1::{Network, PersonalizeRequest};
use nix::{
    fcntl::{OFlag, openat},
    libc::{O_NOFOLLOW, O_PATH},
    mount::{MsFlags, mount},
    sys::stat::Mode,
    unistd::{chdir, chroot, fchdir},
};

use super::{PersonalizeError, spare, step};
use crate::{console, disk};

nix::ioctl_none!(flush_buffers, 0x12, 97);

const DISK: &str = "/dev/vdb";
/// Where the disk is mounted; not to be seen from the sandbox's root.
pub const DISK_MOUNT: &str = "/rw";
/// Mounts that go along into the new root.
const MOVED: [&str; 4] = ["/proc", "/sys", "/dev", "/run"];

/// The root that the kernel started with; the disk's mount can be reached from there alone.
pub struct OldRoot(OwnedFd);

impl OldRoot {
    /// Makes it the agent's root again.
    pub fn enter(&self) -> nix::Result<()> {
        fchdir(&self.0)?;
        chroot(".")?;
        chdir("/")
    }

    /// The top of the sandbox's disk.
    pub fn disk(&self) -> io::Result<File> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let top = openat(&self.0, DISK_MOUNT.trim_start_matches('/'), flags, Mode::empty())?;
        Ok(top.into())
    }
}

/// Where a file of the sandbox's is on its disk, as long as nobody has entered the root.
pub fn upper(name: &str) -> PathBuf {
    Path::new(DISK_MOUNT).join("upper").join(name)
}

/// Mounts the root over disk and image and makes it the root of the agent and of all that it starts.
pub fn enter() -> Result<OldRoot, PersonalizeError> {
    // With redirects a directory of the image can be renamed; without them `rename` fails with EXDEV.
    let options = format!("lowerdir=/ro,upperdir={DISK_MOUNT}/upper,workdir={DISK_MOUNT}/work,redirect_dir=on");
    mount(Some("overlay"), "/new", Some("overlay"), MsFlags::MS_NOATIME, Some(options.as_str()))
        .map_err(step("root"))?;
    for dir in MOVED {
        let target = format!("/new{dir}");
        real_directory(Path::new(&target), 0o755).map_err(step("mount point"))?;
        mount(Some(dir), target.as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>).map_err(step("mount move"))?;
    }
    real_directory(Path::new("/new/tmp"), 0o1777).map_err(step("/tmp"))?;
    let old = File::options().read(true).custom_flags(O_PATH).open("/").map_err(step("first root"))?;
    let switched = chdir("/new")
        .and_then(|()| mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>))
        .and_then(|()| chroot("."))
        .and_then(|()| chdir("/"));
    switched.map_err(step("change of root"))?;
    Ok(OldRoot(old.into()))
}

/// Mounts the sandbox's own disk, and grows what is on it where it is to be larger.
pub fn mount_disk(bytes: u64) -> io::Result<()> {
    let device = File::open(DISK)?;
    // The template had another disk in this place; nothing of it may be remembered.
    // SAFETY: touches no memory of ours.
    unsafe { flush_buffers(device.as_raw_fd()) }?;
    drop(device);
    // A new disk is a file of holes: to write zeros over its inode tables would take the first seconds of every sandbox,
    // and 160 MB of the host's disk.
    mount(Some(DISK), DISK_MOUNT, Some("ext4"), MsFlags::MS_NOATIME, Some("discard,noinit_itable"))?;
    if bytes > disk::size(&File::open(DISK)?)?
        && let Err(error) = File::open(DISK_MOUNT).and_then(|top| disk::grow(&top, bytes))
    {
        // A sandbox on a smaller disk is better than none.
        console::say(format_args!("the disk stays as large as it was: {error}"));
    }
    spare::give_up_when_full(Path::new(DISK_MOUNT))?;
    for dir in ["upper", "work"] {
        match fs::create_dir(Path::new(DISK_MOUNT).join(dir)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// A directory in the sandbox's root, in place of anything else that may have that name.
fn real_directory(path: &Path, mode: u32) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => return Ok(()),
        Ok(_) => fs::remove_file(path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    fs::create_dir(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// Writes what the guest is called, on its disk or, once that is the root's upper layer, in the root.
pub fn write_identity(etc: &Path, request: &PersonalizeRequest) -> io::Result<()> {
    match fs::symlink_metadata(etc) {
        Ok(meta) if meta.is_dir() => {}
        // The sandbox has made something of its own of /etc: it is left alone.
        Ok(_) => return Ok(()),
        Err(_) => make_like(etc, Path::new("/ro/etc"))?,
    }
    place(&etc.join("machine-id"), &format!("{}\n", request.machine_id))?;
    place(&etc.join("hostname"), &format!("{}\n", request.hostname))?;
    place(&etc.join("hosts"), &hosts(&request.hostname, request.network.as_ref()))?;
    if let Some(network) = &request.network {
        place(&etc.join("resolv.conf"), &resolv_conf(network))?;
    }
    Ok(())
}

/// A directory that hides nothing of the image's and looks like it.
fn make_like(dir: &Path, model: &Path) -> io::Result<()> {
    fs::create_dir(dir)?;
    if let Ok(meta) = fs::symlink_metadata(model)
        && meta.is_dir()
    {
        lchown(dir, Some(meta.uid()), Some(meta.gid()))?;
        fs::set_permissions(dir, fs::Permissions::from_mode(meta.mode() & 0o7777))?;
    }
    Ok(())
}

/// A regular file with this content, whatever was there; nothing is written when it is as wanted already.
fn place(path: &Path, content: &str) -> io::Result<()> {
    if holds(path, content) {
        return Ok(());
    }
    let half = path.with_file_name(".heyvm-half");
    fs::remove_file(&half).ok();
    let placed = (|| {
        let mut file = File::options().write(true).create_new(true).mode(0o644).open(&half)?;
        file.write_all(content.as_bytes())?;
        fs::rename(&half, path)
    })();
    match placed {
        Err(error) if error.kind() == io::ErrorKind::StorageFull => {
            fs::remove_file(&half).ok();
            // A disk that had no spare room yet. Better an old name than a sandbox that cannot be emptied.
            if overwrite(path, content).is_err() {
                console::say(format_args!("the disk is full: {} stays as it was", path.display()));
            }
            Ok(())
        }
        other => other,
    }
}

/// Writes over a regular file, in the block that it has.
fn overwrite(path: &Path, content: &str) -> io::Result<()> {
    let file = File::options().write(true).custom_flags(O_NOFOLLOW | nix::libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    file.write_all_at(content.as_bytes(), 0)?;
    file.set_len(content.len() as u64)
}

fn holds(path: &Path, content: &str) -> bool {
    let Ok(file) = File::options().read(true).custom_flags(O_NOFOLLOW | nix::libc::O_NONBLOCK).open(path) else {
        return false;
    };
    let mut text = Vec::new();
    file.metadata().is_ok_and(|meta| meta.is_file())
        && file.take(content.len() as u64 + 1).read_to_end(&mut text).is_ok()
        && text == content.as_bytes()
}

fn hosts(hostname: &str, network: Option<&Network>) -> String {
    let own = network.map_or("127.0.1.1", |network| network.address.as_str());
    format!("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{own}\t{hostname}\n")
}

fn resolv_conf(network: &Network) -> String {
    network.nameservers.iter().map(|server| format!("nameserver {server}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_placed_whatever_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hosts");
        std::os::unix::fs::symlink("/nowhere/hosts", &path).unwrap();
        assert!(!holds(&path, "one"));
        place(&path, "one").unwrap();
        assert!(holds(&path, "one") && !holds(&path, "on") && !holds(&path, "one more"));
        let before = fs::metadata(&path).unwrap().ino();
        place(&path, "one").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().ino(), before, "written again");
    }

    #[test]
    fn names_are_told() {
        let network =
            Network { address: "10.90.0.2".into(), nameservers: vec!["169.254.1.1".into()], ..Network::default() };
        assert!(hosts("box", Some(&network)).ends_with("10.90.0.2\tbox\n"));
        assert!(hosts("box", None).contains("127.0.1.1\tbox\n"));
        assert_eq!(resolv_conf(&network), "nameserver 169.254.1.1\n");
    }
}
