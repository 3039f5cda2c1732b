//! The first call after a clone: this guest stops being a copy and becomes one sandbox.
//!
//! Order matters: randomness first, so that nothing random is made before it; then the clock, so that files get true
//! times; then the disk and the root; the network last, when everything it reaches is in place.
//!
//! The kernel draws its boot id when it is first read. Nothing reads it before the template is saved, so every clone draws
//! its own, after its entropy has come. A file mounted over it would do the same, and would forbid every user namespace
//! (bwrap, rootless podman, nix) to mount a /proc of its own.

pub mod network;
mod root;
mod spare;
mod trust;

use std::{
    fs::{self, File},
    io,
    os::{fd::AsRawFd, unix::fs::chown},
    path::Path,
};

use heyvm_agent_protocol::v1::PersonalizeRequest;
use nix::{libc, unistd::sethostname};

pub use root::{DISK_MOUNT, OldRoot};

use crate::{clock, console, process::Identity};

/// Less entropy than this is refused, in bytes.
const MIN_ENTROPY: usize = 32;
/// More than this is of no use.
const MAX_ENTROPY: usize = 512;

/// What went wrong, and where.
#[derive(Debug, thiserror::Error)]
pub enum PersonalizeError {
    /// The request makes no sense.
    #[error("{0}")]
    Request(&'static str),
    /// A step failed.
    #[error("{step}: {source}")]
    Step {
        /// Which.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> PersonalizeError {
    move |error| PersonalizeError::Step { step, source: error.into() }
}

/// The first half, for a clone that is not anyone's yet: its disk and its root. Gives the way back to the first root.
pub fn reserve(request: &PersonalizeRequest) -> Result<OldRoot, PersonalizeError> {
    if request.entropy.len() >= MIN_ENTROPY {
        add_entropy(&request.entropy).map_err(step("entropy"))?;
    }
    root::mount_disk(request.disk_bytes).map_err(step("disk"))?;
    let old_root = root::enter()?;
    install_certificates(request);
    make_working_dir(request)?;
    take_spare_room(&old_root);
    Ok(old_root)
}

/// All of it, or what [`reserve`] has left to do.
pub fn personalize(request: &PersonalizeRequest, reserved: Option<OldRoot>) -> Result<OldRoot, PersonalizeError> {
    check(request)?;
    add_entropy(&request.entropy).map_err(step("entropy"))?;
    clock::set(request.unix_time_ns).map_err(step("clock"))?;
    sethostname(&request.hostname).map_err(step("host name"))?;
    let old_root = match reserved {
        Some(old_root) => {
            root::write_identity(Path::new("/etc"), request).map_err(step("identity"))?;
            old_root
        }
        None => {
            root::mount_disk(request.disk_bytes).map_err(step("disk"))?;
            root::write_identity(&root::upper("etc"), request).map_err(step("identity"))?;
            root::enter()?
        }
    };
    if let Some(wanted) = &request.network {
        network::configure(wanted).map_err(step("network"))?;
    }
    install_certificates(request);
    make_working_dir(request)?;
    take_spare_room(&old_root);
    Ok(old_root)
}

/// A disk that has none left works until it is full.
fn take_spare_room(old_root: &OldRoot) {
    if let Err(error) = old_root.disk().and_then(spare::take) {
        console::say(format_args!("no spare room on the disk: {error}"));
    }
}

/// A full disk must not keep a sandbox from starting.
fn install_certificates(request: &PersonalizeRequest) {
    if let Err(error) = trust::install(Path::new("/"), &request.certificates) {
        console::say(format_args!("the host's certificate authorities could not be added: {error}"));
    }
}

/// Variables for programs that bring authorities of their own along.
pub fn environment(request: &PersonalizeRequest) -> Vec<(String, String)> {
    if request.certificates.is_empty() { Vec::new() } else { trust::environment(Path::new("/")) }
}

fn make_working_dir(request: &PersonalizeRequest) -> Result<(), PersonalizeError> {
    if request.working_dir.is_empty() {
        return Ok(());
    }
    let dir = Path::new(&request.working_dir);
    if dir.exists() {
        return Ok(());
    }
    match fs::create_dir_all(dir) {
        // Commands say that their directory is missing; a sandbox that does not start could not be emptied.
        Err(error) if error.kind() == io::ErrorKind::StorageFull => {
            console::say(format_args!("the disk is full: no working directory"));
            return Ok(());
        }
        made => made.map_err(step("working directory"))?,
    }
    // A user that the image does not have is reported by the first command.
    match Identity::find(&request.user, Path::new("/etc")) {
        Ok(user) if user.uid != 0 => chown(dir, Some(user.uid), Some(user.gid)).map_err(step("working directory")),
        _ => Ok(()),
    }
}

fn check(request: &PersonalizeRequest) -> Result<(), PersonalizeError> {
    let hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let word = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b));
    let problem = if request.entropy.len() < MIN_ENTROPY {
        "there are fewer than 32 bytes of entropy"
    } else if !word(&request.hostname) || request.hostname.len() > 64 {
        "the host name is none"
    } else if request.machine_id.len() != 32 || !hex(&request.machine_id) {
        "the machine id is not 32 hex digits"
    } else if !request.working_dir.is_empty() && !request.working_dir.starts_with('/') {
        "the working directory is not absolute"
    } else if request.env.iter().any(|v| v.name.is_empty() || v.name.contains(['=', '\0']) || v.value.contains('\0')) {
        "the environment holds a name or a value that cannot be"
    } else {
        return Ok(());
    };
    Err(PersonalizeError::Request(problem))
}

#[repr(C)]
struct PoolInfo {
    entropy_bits: libc::c_int,
    bytes: libc::c_int,
    data: [u8; MAX_ENTROPY],
}

nix::ioctl_write_ptr_bad!(add_to_pool, nix::request_code_write!(b'R', 3, 2 * size_of::<libc::c_int>()), PoolInfo);
nix::ioctl_none!(reseed, b'R', 7);

/// Mixes the bytes into the kernel's pool, counts them as entropy and has its generator start over from the pool.
fn add_entropy(entropy: &[u8]) -> io::Result<()> {
    let entropy = &entropy[..entropy.len().min(MAX_ENTROPY)];
    let bytes = libc::c_int::try_from(entropy.len()).unwrap_or_default();
    let mut pool = PoolInfo { entropy_bits: bytes * 8, bytes, data: [0; MAX_ENTROPY] };
    pool.data[..entropy.len()].copy_from_slice(entropy);
    let device = File::open("/dev/urandom")?;
    // SAFETY: the kernel reads the two numbers and as many bytes as they say, which are there.
    unsafe {
        add_to_pool(device.as_raw_fd(), &raw const pool)?;
        reseed(device.as_raw_fd())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> PersonalizeRequest {
        PersonalizeRequest {
            entropy: vec![7; 32],
            hostname: "box-1".into(),
            machine_id: "0123456789abcdef0123456789abcdef".into(),
            working_dir: "/workspace".into(),
            ..PersonalizeRequest::default()
        }
    }

    #[test]
    fn a_request_must_be_whole() {
        check(&request()).unwrap();
        let spoil: [fn(&mut PersonalizeRequest); 5] = [
            |r| r.entropy.truncate(31),
            |r| r.hostname = "a b".into(),
            |r| r.hostname = String::new(),
            |r| r.machine_id.push('0'),
            |r| r.working_dir = "workspace".into(),
        ];
        for spoil in spoil {
            let mut spoiled = request();
            spoil(&mut spoiled);
            assert!(matches!(check(&spoiled), Err(PersonalizeError::Request(_))), "{spoiled:?}");
        }
    }
}
