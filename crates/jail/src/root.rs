//! The root directory of every jail: copies of QEMU, the libraries it is linked with, its accelerator modules and the
//! firmware of the `microvm` machine. Made once per QEMU build; a copy, so that an upgrade of the host's QEMU does not
//! pull files away from running VMs.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use sha2::{Digest, Sha256};

use crate::{Error, launcher::DESCRIPTORS_DIR};

/// The program that every VM is.
const QEMU: &str = "qemu-system-x86_64";
/// Firmware of the `microvm` machine: the one that starts a kernel by itself. The machine's default is another one in
/// some builds (SeaBIOS, which does not without an option ROM).
const FIRMWARE: &str = "qboot.rom";
/// Where distributions keep QEMU's loadable modules.
const MODULE_DIRS: [&str; 3] = ["/usr/lib/x86_64-linux-gnu/qemu", "/usr/lib/qemu", "/usr/lib64/qemu"];
/// Where distributions keep QEMU's firmware.
const FIRMWARE_DIRS: [&str; 4] =
    ["/usr/share/qemu", "/usr/share/qboot", "/usr/share/qemu-firmware", "/usr/local/share/qemu"];

/// A prepared root directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QemuRoot {
    /// The directory.
    pub dir: PathBuf,
    /// QEMU's path in it.
    pub program: PathBuf,
    /// The firmware in it, for `-bios`.
    pub firmware: PathBuf,
    /// QEMU's own words on its version, for example `7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)`.
    pub version: String,
    /// Changes whenever any copied file does.
    pub digest: String,
}

/// Makes the root below `parent` unless it is there.
pub fn prepare(parent: &Path) -> Result<QemuRoot, Error> {
    let program = find_program()?;
    let version = version_of(&program)?;
    let files = files_of(&program)?;
    let firmware = files
        .iter()
        .find(|file| file.ends_with(FIRMWARE))
        .cloned()
        .ok_or(Error::Program { program: QEMU, problem: format!("comes without its firmware {FIRMWARE}") })?;
    let digest = digest_of(&version, &files)?;
    let dir = parent.join(format!("qemu-{}", &digest[..16]));
    if !dir.is_dir() {
        copy_all(&files, parent, &dir)?;
    }
    Ok(QemuRoot { dir, program, firmware, version, digest })
}

fn find_program() -> Result<PathBuf, Error> {
    std::env::var_os("PATH")
        .iter()
        .flat_map(std::env::split_paths)
        .chain([PathBuf::from("/usr/bin"), PathBuf::from("/usr/libexec")])
        .map(|dir| dir.join(QEMU))
        .find(|path| path.is_file())
        .and_then(|path| path.canonicalize().ok())
        .ok_or(Error::Program { program: QEMU, problem: "is not installed".into() })
}

fn version_of(program: &Path) -> Result<String, Error> {
    let output = Command::new(program).arg("--version").output().map_err(Error::io("running QEMU", program))?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .next()
        .and_then(|line| line.split_once("version "))
        .map(|(_, version)| version.trim().to_owned())
        .ok_or_else(|| Error::Program { program: QEMU, problem: "does not tell its version".into() })
}

/// Every file that goes into the root, by its absolute path.
fn files_of(program: &Path) -> Result<Vec<PathBuf>, Error> {
    let modules: Vec<PathBuf> = MODULE_DIRS
        .iter()
        .flat_map(|dir| ["accel-tcg-x86_64.so", "accel-kvm-x86_64.so"].map(|name| Path::new(dir).join(name)))
        .filter(|path| path.is_file())
        .collect();
    let mut files = vec![program.to_owned()];
    files.extend(FIRMWARE_DIRS.iter().map(|dir| Path::new(dir).join(FIRMWARE)).find(|path| path.is_file()));
    for object in std::iter::once(program).chain(modules.iter().map(PathBuf::as_path)) {
        files.extend(libraries_of(object)?);
    }
    files.extend(modules);
    files.sort();
    files.dedup();
    Ok(files)
}

/// What the dynamic loader would load, as `ldd` lists it.
fn libraries_of(object: &Path) -> Result<Vec<PathBuf>, Error> {
    let output = Command::new("ldd").arg(object).output().map_err(Error::io("running ldd on", object))?;
    if !output.status.success() {
        return Err(Error::Program { program: QEMU, problem: "is linked in a way that ldd cannot read".into() });
    }
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect())
}

fn digest_of(version: &str, files: &[PathBuf]) -> Result<String, Error> {
    let mut hash = Sha256::new();
    hash.update(version);
    for file in files {
        let meta = fs::metadata(file).map_err(Error::io("looking at", file))?;
        let modified = meta.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
        hash.update(format!("{}\0{}\0{:?}\n", file.display(), meta.len(), modified));
    }
    Ok(hex::encode(hash.finalize()))
}

/// Copies into a neighbour first, so that a half-made root is never taken for a whole one.
fn copy_all(files: &[PathBuf], parent: &Path, dir: &Path) -> Result<(), Error> {
    let half = parent.join(format!(".making-{}", std::process::id()));
    let make = || -> io::Result<()> {
        for file in files {
            let target = half.join(file.strip_prefix("/").unwrap_or(file));
            fs::create_dir_all(target.parent().unwrap_or(&half))?;
            fs::copy(file, &target)?;
            fs::set_permissions(&target, fs::Permissions::from_mode(0o555))?;
        }
        fs::create_dir_all(half.join(DESCRIPTORS_DIR.trim_start_matches('/')))?;
        fs::create_dir_all(half.join("dev"))?;
        fs::write(half.join("dev/kvm"), "")?;
        open_directories(&half)?;
        match fs::rename(&half, dir) {
            Err(_) if dir.is_dir() => Ok(heyvm_trees::remove(&half)?),
            other => other,
        }
    };
    fs::create_dir_all(parent).map_err(Error::io("making", parent))?;
    // What is left of it makes the next step fail.
    heyvm_trees::remove(&half).ok();
    make().map_err(|source| {
        heyvm_trees::remove(&half).ok();
        Error::Io { doing: "preparing QEMU's root directory", path: dir.to_owned(), source }
    })
}

/// The confined process has another identity: it must be able to pass through, whatever our umask is.
fn open_directories(dir: &Path) -> io::Result<()> {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            open_directories(&entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_runs_qemu_with_nothing_else_around() {
        let parent = tempfile::tempdir().unwrap();
        let root = prepare(parent.path()).unwrap();
        assert_eq!(root, prepare(parent.path()).unwrap(), "a second call finds the first one's work");
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1, "nothing half-made is left");
        assert!(root.dir.join("fd").is_dir());
        assert!(!root.dir.join("bin/sh").exists() && !root.dir.join("usr/bin/sh").exists());
        let output =
            Command::new("unshare").args(["-r", "chroot"]).arg(&root.dir).arg(&root.program).arg("--version").output();
        assert!(output.unwrap().status.success());
    }
}
