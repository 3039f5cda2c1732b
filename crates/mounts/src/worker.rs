//! Who does the work: threads of the mount's own. Where the daemon is root they have the rights of the directory's owner
//! and no more, so that no guest reads or writes as root what its owner could not.

use std::{
    sync::{Arc, Mutex, PoisonError, mpsc as std_mpsc},
    thread,
};

use bytes::Bytes;
use nix::{
    sched::{CloneFlags, unshare},
    sys::stat::{Mode, umask},
    unistd::{Gid, Uid, setfsgid, setfsuid},
};
use tokio::sync::mpsc;

use crate::{Error, Server};

/// One that waits for a slow disk does not keep the others from answering.
const THREADS: usize = 4;
const STACK: usize = 256 << 10;

/// Whose rights a thread has.
#[derive(Debug, Clone, Copy)]
struct Owner {
    uid: Uid,
    gid: Gid,
}

type Requests = Arc<Mutex<mpsc::Receiver<Bytes>>>;

impl Server {
    /// Answers what comes in, until nothing comes any more or nobody takes the answers. Returns when all is set up.
    pub fn serve(self: &Arc<Self>, requests: mpsc::Receiver<Bytes>, answers: mpsc::Sender<Bytes>) -> Result<(), Error> {
        let stat = rustix::fs::fstat(self.tree.root()).map_err(|errno| Error::Worker(errno.into()))?;
        // Only root can be someone else.
        let owner = Uid::effective().is_root().then(|| Owner { uid: stat.st_uid.into(), gid: stat.st_gid.into() });
        let requests: Requests = Arc::new(Mutex::new(requests));
        for _ in 0..THREADS {
            let (server, requests, answers) = (Arc::clone(self), Arc::clone(&requests), answers.clone());
            let (ready, is_ready) = std_mpsc::channel();
            let work = move || {
                let prepared = prepare(owner);
                let good = prepared.is_ok();
                ready.send(prepared).ok();
                if good {
                    work(&server, &requests, &answers);
                }
            };
            thread::Builder::new().name("heyvm-mount".into()).stack_size(STACK).spawn(work).map_err(Error::Worker)?;
            is_ready.recv().map_err(|error| Error::Worker(std::io::Error::other(error)))?.map_err(Error::Worker)?;
        }
        Ok(())
    }
}

fn work(server: &Server, requests: &Requests, answers: &mpsc::Sender<Bytes>) {
    loop {
        let next = requests.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
        let Some(request) = next else { return };
        if let Some(answer) = server.answer(&request)
            && answers.blocking_send(answer.into()).is_err()
        {
            return;
        }
    }
}

/// Gives this thread alone a file mode mask of its own (the guest's kernel has applied the guest's) and the owner's
/// rights. File system ids, not the real ones: with those the owner could send the daemon signals.
fn prepare(owner: Option<Owner>) -> std::io::Result<()> {
    unshare(CloneFlags::CLONE_FS)?;
    umask(Mode::empty());
    let Some(Owner { uid, gid }) = owner else { return Ok(()) };
    rustix::thread::set_thread_groups(&[])?;
    setfsgid(gid);
    setfsuid(uid);
    // They tell what was, and only that way whether it has been done.
    if setfsgid(gid) != gid || setfsuid(uid) != uid {
        return Err(std::io::Error::other("the rights of the directory's owner cannot be had"));
    }
    Ok(())
}
