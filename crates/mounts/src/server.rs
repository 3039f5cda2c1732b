//! One mount: takes requests, gives answers.

use std::{
    fs::File,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::{
    fs::{OFlags, Stat, fstat},
    io::Errno,
};

use crate::{
    directory::Directory,
    handles::{HandleBudget, Handles},
    nodes::Nodes,
    tree::{self, Tree},
    wire::{self, Head, Input, Operation, Output, ROOT},
};

/// Where it is written down what the guest knows.
#[derive(Debug, Clone)]
pub enum History {
    /// The guest knows nothing yet; from now on it is written to this file.
    Fresh(PathBuf),
    /// The guest may know what an earlier daemon has written to this file.
    Kept(PathBuf),
}

/// Serves one directory to one guest. Requests may come from several threads at once.
#[derive(Debug)]
pub struct Server {
    pub(crate) tree: Tree,
    pub(crate) handles: Handles,
    pub(crate) read_only: bool,
    nodes: Mutex<Nodes>,
}

impl Server {
    /// Serves an open directory within a sandbox's budget of descriptors. When the directory itself is removed, the guest
    /// gets errors.
    pub fn open(directory: Directory, read_only: bool, history: &History, budget: &Arc<HandleBudget>) -> Self {
        let nodes = match history {
            History::Fresh(journal) => Nodes::with_journal(journal),
            History::Kept(journal) => Nodes::from_journal(journal),
        };
        let nodes = nodes.unwrap_or_else(|error| {
            tracing::warn!(%error, "the next daemon will not know the files that a guest has open in a mount");
            Nodes::new()
        });
        Self { tree: directory.tree, handles: Handles::new(Arc::clone(budget)), read_only, nodes: Mutex::new(nodes) }
    }

    /// The answer to one request; none to one that wants none, and to what is no request.
    pub fn answer(&self, request: &[u8]) -> Option<Vec<u8>> {
        let (head, input) = wire::request(request)?;
        let outcome = self.perform(head, input);
        head.operation.is_answered().then(|| wire::answer(head.unique, outcome))
    }

    fn perform(&self, head: Head, input: Input<'_>) -> Result<Output, Errno> {
        let node = head.node;
        match head.operation {
            Operation::Init => wire::initialized(input),
            Operation::Lookup => self.look_up(node, input),
            Operation::Forget => self.forget(node, input),
            Operation::BatchForget => self.forget_many(input),
            Operation::GetAttr => self.attributes(node, input),
            Operation::SetAttr => self.change(node, input),
            Operation::ReadLink => self.read_link(node),
            Operation::SymLink => self.make_link(node, input),
            Operation::MakeNode => self.make_file(node, input),
            Operation::MakeDir => self.make_directory(node, input),
            Operation::Unlink => self.remove(node, input, false),
            Operation::RemoveDir => self.remove(node, input, true),
            Operation::Rename => self.rename(node, input, false),
            Operation::Rename2 => self.rename(node, input, true),
            Operation::Link => self.make_name(node, input),
            Operation::Create => self.create(node, input),
            Operation::Open => self.open_file(node, input),
            Operation::Read => self.read(node, input),
            Operation::Write => self.write(node, input),
            Operation::Sync | Operation::SyncDir => self.sync(node, input),
            Operation::Allocate => self.allocate(node, input),
            Operation::Seek => self.seek(node, input),
            Operation::CopyRange => self.copy_range(node, input),
            Operation::OpenDir => self.open_directory(node),
            Operation::ReadDir => self.read_directory(node, input, false),
            Operation::ReadDirPlus => self.read_directory(node, input, true),
            Operation::Release | Operation::ReleaseDir => self.close(input),
            Operation::StatFs => self.file_system(),
            Operation::Destroy => Ok(Output::default()),
            Operation::Other => Err(Errno::NOSYS),
        }
    }

    pub(crate) fn nodes(&self) -> MutexGuard<'_, Nodes> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whatever changes something begins here.
    pub(crate) fn may_change(&self) -> Result<(), Errno> {
        if self.read_only { Err(Errno::ROFS) } else { Ok(()) }
    }

    /// The directory of that number, to work below.
    pub(crate) fn directory(&self, node: u64) -> Result<OwnedFd, Errno> {
        let path = self.nodes().path(node)?;
        let found = self.tree.find(&path)?;
        match fstat(&found)?.st_mode & wire::KIND {
            0o040_000 => Ok(found),
            _ => Err(Errno::NOTDIR),
        }
    }

    /// The file of that number, if the name still means it.
    pub(crate) fn find(&self, node: u64) -> Result<(OwnedFd, Stat), Errno> {
        let (path, identity) = {
            let nodes = self.nodes();
            (nodes.path(node)?, nodes.identity(node)?)
        };
        let found = self.tree.find(&path).map_err(|errno| match errno {
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP if node != ROOT => Errno::STALE,
            other => other,
        })?;
        let stat = fstat(&found)?;
        match identity {
            Some(identity) if identity != tree::identity(&stat) => Err(Errno::STALE),
            _ => Ok((found, stat)),
        }
    }

    /// The open file behind a handle. A handle of an earlier daemon means the file of that number, opened once more.
    pub(crate) fn with_file<T>(
        &self,
        (handle, node): (u64, u64),
        flags: OFlags,
        work: impl FnOnce(&File) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        match self.handles.get(handle) {
            Some(open) if open.node == node => work(&open.file),
            Some(_) => Err(Errno::BADF),
            None => work(&tree::open(&self.find(node)?.0, flags)?),
        }
    }
}
