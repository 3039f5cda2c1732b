//! Guest kernels: taken from a distribution's kernel package, joined with the agent to an initramfs.
#![expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use flate2::{Compression, GzBuilder};
use sha2::{Digest, Sha256};

use crate::{Error, Kernel, cpio::Archive, modules};

/// Where the agent is looked for when it is not named.
const AGENT: &str = "heyvm-agent";

/// Takes kernel and modules of the newest version in `tree` (an unpacked package, or `/`) into `kernels`.
pub fn import(tree: &Path, kernels: &Path) -> Result<String, Error> {
    let version = newest(tree)?;
    let tree_modules = ["lib/modules", "usr/lib/modules"]
        .map(|dir| tree.join(dir).join(&version))
        .into_iter()
        .find(|dir| dir.join("modules.dep").exists() || dir.join("kernel").is_dir())
        .ok_or_else(|| Error::invalid(format!("no modules of kernel {version} in {}", tree.display())))?;
    let half = tempfile::tempdir_in(prepared(kernels)?).map_err(Error::io("making a directory in", kernels))?;
    let vmlinuz = tree.join("boot").join(format!("vmlinuz-{version}"));
    fs::copy(&vmlinuz, half.path().join("vmlinuz")).map_err(Error::io("copying the kernel", &vmlinuz))?;
    let wanted = modules::closure(&tree_modules)?;
    let mut order = String::new();
    for file in wanted {
        let name = modules::plain_name(&file);
        let bytes = modules::decompressed(&tree_modules.join(&file))?;
        fs::write(half.path().join(&name), bytes).map_err(Error::io("writing the module", half.path().join(&name)))?;
        order.push_str(&name);
        order.push('\n');
    }
    fs::write(half.path().join("order"), order).map_err(Error::io("writing the modules' order in", half.path()))?;
    let target = kernels.join(&version);
    // What is left of an older one makes the next step fail.
    heyvm_trees::remove(&target).ok();
    fs::rename(half.keep(), &target).map_err(Error::io("keeping the kernel", &target))?;
    Ok(version)
}

fn prepared(dir: &Path) -> Result<&Path, Error> {
    fs::create_dir_all(dir).map_err(Error::io("making", dir))?;
    Ok(dir)
}

fn newest(tree: &Path) -> Result<String, Error> {
    let boot = tree.join("boot");
    // It is not where the caller said.
    let entries = fs::read_dir(&boot).map_err(|error| Error::invalid(format!("{}: {error}", boot.display())))?;
    let mut versions: Vec<String> = entries
        .filter_map(|entry| Some(entry.ok()?.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_owned()))
        .filter(|version| !version.contains("rescue"))
        .collect();
    versions.sort_by_key(|version| numbers(version));
    versions.pop().ok_or_else(|| Error::invalid(format!("no vmlinuz-VERSION in {}", boot.display())))
}

fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

/// The newest kernel in `kernels` with the agent that belongs to this program.
pub fn newest_with_agent(kernels: &Path) -> Result<Kernel, Error> {
    let entries = fs::read_dir(kernels).map_err(Error::io("looking for a kernel in", kernels))?;
    let mut versions: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|version| kernels.join(version).join("order").exists())
        .collect();
    versions.sort_by_key(|version| numbers(version));
    let version = versions.pop().ok_or(Error::HostNotReady {
        what: "there is no guest kernel yet".into(),
        hint: "run ./quickstart, or: heyvm images import-kernel DIR (an unpacked kernel package, or /)".into(),
    })?;
    let dir = kernels.join(&version);
    let agent = fs::read(agent_path()?).map_err(Error::io("reading the agent", AGENT))?;
    let hash = hex::encode(Sha256::digest(&agent));
    let initramfs = dir.join(format!("initramfs-{}.gz", &hash[..16]));
    if !initramfs.exists() {
        write_initramfs(&dir, &agent, &initramfs)?;
    }
    let vmlinuz = dir.join("vmlinuz");
    let digest = digest_of(&[&vmlinuz, &initramfs])?;
    Ok(Kernel { version, vmlinuz, initramfs, digest })
}

/// Named by `HEYVM_AGENT`, beside this program, or where cargo puts it.
fn agent_path() -> Result<PathBuf, Error> {
    let named = std::env::var_os("HEYVM_AGENT").map(PathBuf::from);
    let exe = std::env::current_exe().ok().and_then(|exe| exe.canonicalize().ok());
    let beside = exe.iter().flat_map(|exe| {
        let dirs = exe.ancestors().skip(1).take(3).map(Path::to_owned);
        dirs.flat_map(|dir| [dir.join(AGENT), dir.join("x86_64-unknown-linux-gnu/release").join(AGENT)])
    });
    // A dynamically linked agent of the same build directory would not start in a guest: the static one comes first.
    let mut candidates: Vec<PathBuf> = named.into_iter().chain(beside).collect();
    candidates.sort_by_key(|path| !path.to_string_lossy().contains("x86_64-unknown-linux-gnu"));
    candidates.into_iter().find(|path| path.is_file()).ok_or(Error::HostNotReady {
        what: format!("{AGENT} is not beside heyvm"),
        hint: format!("install {AGENT} in the same directory as heyvm, or name it in HEYVM_AGENT"),
    })
}

fn write_initramfs(kernel: &Path, agent: &[u8], target: &Path) -> Result<(), Error> {
    let write = || -> io::Result<()> {
        let half = tempfile::NamedTempFile::new_in(kernel)?;
        // Without a time in the header: the same inputs give the same bytes, and templates stay valid.
        let mut archive = Archive::new(GzBuilder::new().mtime(0).write(half.as_file(), Compression::fast()));
        for dir in ["dev", "proc", "sys", "ro", "rw", "new", "run", "modules"] {
            archive.dir(dir)?;
        }
        archive.device("dev/console", 0o600, (5, 1))?;
        archive.file("init", 0o755, agent)?;
        let order = fs::read_to_string(kernel.join("order"))?;
        archive.file("modules/order", 0o644, order.as_bytes())?;
        for module in order.lines() {
            archive.file(&format!("modules/{module}"), 0o644, &fs::read(kernel.join(module))?)?;
        }
        archive.finish()?.finish()?.flush()?;
        half.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
        half.persist(target)?;
        Ok(())
    };
    write().map_err(Error::io("making the initramfs", target))
}

fn digest_of(files: &[&Path]) -> Result<String, Error> {
    let mut hash = Sha256::new();
    for path in files {
        let mut file = File::open(path).map_err(Error::io("reading", *path))?;
        io::copy(&mut file, &mut hash).map_err(Error::io("reading", *path))?;
    }
    Ok(hex::encode(hash.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_is_not_where_it_is_said_to_be() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let modules_missing = dir.path().join("half");
        fs::create_dir_all(modules_missing.join("boot")).unwrap();
        fs::write(modules_missing.join("boot/vmlinuz-6.1"), "").unwrap();
        for tree in ["nowhere", "file", "half"] {
            let kernels = dir.path().join("kernels");
            let refused = import(&dir.path().join(tree), &kernels);
            assert!(matches!(refused, Err(Error::Invalid(_))), "{tree}: {refused:?}");
            assert!(!kernels.exists(), "nothing is left behind");
        }
    }
}
