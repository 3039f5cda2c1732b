//! The files of one template, and the start of the guest that it is made of. Synchronous: its memory is large.
#![expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]

use std::{
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{OpenOptionsExt, PermissionsExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
};

use heyvm_jail::{egress::Egress, process::ProcessId};

use super::{MAKING, Recipe};
use crate::{
    Error,
    qemu::{
        launch::{Descriptors, Host, Launch, Launched, launch, listen, tap},
        machine::fd,
        memory,
        record::{Record, VmDir},
    },
};

/// The disk a template boots with is empty and as large as any clone's can be.
const DISK_GIB: u64 = 250;

/// A guest that boots to become a template.
pub struct Started {
    /// Its QEMU.
    pub launched: Launched,
    /// Its memory.
    pub guest_memory: File,
    /// Where QEMU will send its state.
    pub listener: UnixListener,
}

/// Makes the directory in which a template is made beside its home; gives its name.
pub fn prepare(home: &Path) -> Result<String, Error> {
    let me = ProcessId::of(std::process::id() as i32).map_err(Error::io("looking at", "this process"))?;
    let half = PathBuf::from(format!("{}{MAKING}{}-{}", home.display(), me.pid, me.started));
    let name = half.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let dir = VmDir::new(half.parent().unwrap_or(Path::new("/")), &name);
    dir.remove()?;
    dir.make(false)?;
    Ok(name)
}

/// Starts the guest in `dir`.
pub fn start(
    host: &Host,
    egress: Option<&Egress>,
    recipe: &Recipe,
    dir: &VmDir,
    name: &str,
    slot: u32,
) -> Result<Started, Error> {
    let guest_memory = recipe.empty_memory()?;
    let state = dir.path().join("state.sock");
    let listener = listen(&state)?;
    let mut descriptors = recipe.boot_descriptors(&guest_memory)?;
    descriptors.add(fd::STATE, reference(&state)?);
    descriptors.add(fd::DISK, empty_disk(dir)?);
    if let Some(tap) = tap(egress, slot)? {
        descriptors.add(fd::TAP, tap);
    }
    let record = Record::new(slot, name, &host.cgroups, 1000 * recipe.machine.processors)?;
    let launched = launch(host, Launch { dir, record, machine: recipe.boot_machine(), descriptors })?;
    Ok(Started { launched, guest_memory, listener })
}

/// Writes the state down.
pub fn save_state(path: &Path, state: &[u8]) -> io::Result<()> {
    let mut file = File::options().create_new(true).write(true).mode(0o400).open(path)?;
    file.write_all(state)?;
    file.sync_all()
}

/// Writes the memory down; with the state from `half` it is a template then.
pub fn save_memory(guest_memory: &File, half: &Path, dir: &Path) -> Result<(), Error> {
    let path = dir.join("memory");
    let saved = || {
        let file = File::options().create_new(true).write(true).mode(0o400).open(&path)?;
        memory::copy_sparse(guest_memory, &file)?;
        file.sync_all()
    };
    saved().map_err(Error::io("saving the template's memory", &path))?;
    fs::rename(half, dir.join("state")).map_err(Error::io("keeping", dir))
}

/// Ends the guest and puts what was built in its place; where it was not, nothing of it is left.
pub fn finish(built: Result<(), Error>, dir: &VmDir, home: &Path) -> Result<(), Error> {
    if let Err(error) = dir.put_down() {
        tracing::warn!(%error, "the guest that a template was made of could not be ended");
    }
    if built.is_err() {
        if let Err(error) = dir.remove() {
            tracing::warn!(%error, "a half-made template is left for the next daemon to remove");
        }
        return built;
    }
    let sockets = [dir.qmp_socket(), dir.agent_socket(), dir.ports_socket(), dir.path().join("state.sock")];
    for leftover in sockets.into_iter().chain([dir.disk(), dir.id_file()]) {
        // It costs nothing where it stays.
        fs::remove_file(leftover).ok();
    }
    fs::rename(dir.path(), home).map_err(Error::io("keeping the template", home))
}

/// Names a socket without opening it; whoever holds the descriptor can connect to it and to nothing else.
fn reference(socket: &Path) -> Result<OwnedFd, Error> {
    let referred = || {
        fs::set_permissions(socket, fs::Permissions::from_mode(0o666))?;
        File::options().read(true).custom_flags(nix::libc::O_PATH).open(socket)
    };
    referred().map(OwnedFd::from).map_err(Error::io("referring to", socket))
}

fn empty_disk(dir: &VmDir) -> Result<File, Error> {
    let path = dir.disk();
    let made = || {
        let file = File::options().create_new(true).read(true).write(true).mode(0o600).open(&path)?;
        file.set_len(DISK_GIB << 30)?;
        Ok(file)
    };
    made().map_err(Error::io("making the template's disk", &path))
}

/// Opens one to be read.
pub fn open(path: &Path) -> Result<File, Error> {
    File::open(path).map_err(Error::io("opening", path))
}

/// The descriptors that a template and its clones have alike.
pub fn image_descriptors(rootfs: &Path) -> Result<Descriptors, Error> {
    let mut descriptors = Descriptors::default();
    descriptors.add(fd::ROOT, open(rootfs)?);
    Ok(descriptors)
}
