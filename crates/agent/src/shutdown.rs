//! The sandbox's end: processes, disk, power.

use std::{fs, time::Duration};

use nix::{
    libc::{SIGHUP, SIGKILL, SIGTERM},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::reboot::{RebootMode, reboot},
    unistd::{Pid, getpgid, sync},
};
use tokio::time::{Instant, sleep};

use crate::{console, main_command::StopSignal, personalize::OldRoot, process::ended};

/// Processes that have been killed are gone after this, or hang in the kernel.
const KILL_DEADLINE: Duration = Duration::from_secs(5);
/// A disk or host that takes longer for what is left to be written does not take it.
const WRITE_BACK: Duration = Duration::from_secs(30);
/// How often it is looked whether all are gone.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// For the last answer to leave.
const FAREWELL: Duration = Duration::from_millis(20);

/// Ends every process but this one: with a grace first, when there is one. `main` gets its own signal then.
pub async fn end_processes(grace: Duration, main: Option<StopSignal>) {
    if !grace.is_zero() {
        match main {
            None => drop(ended::kill(-1, SIGTERM)),
            Some(main) => end_around(main),
        }
        // A shell at its prompt ignores SIGTERM, but not that its terminal is gone.
        for pid in leaders_of_terminals() {
            ended::kill(pid, SIGHUP).ok();
        }
        if all_gone(grace).await {
            return;
        }
    }
    ended::kill(-1, SIGKILL).ok();
    if !all_gone(KILL_DEADLINE).await {
        console::say(format_args!("some processes could not be ended"));
    }
}

/// Its own children are the main command's to end, as where there is nothing else: their group is left alone.
fn end_around(main: StopSignal) {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in processes.filter_map(|process| process.file_name().to_str()?.parse().ok()).filter(|pid| *pid != 1) {
        let is_its = getpgid(Some(Pid::from_raw(pid))) == Ok(Pid::from_raw(main.pid));
        if !is_its {
            ended::kill(pid, SIGTERM).ok();
        }
    }
    ended::kill(main.pid, main.signal).ok();
}

fn leaders_of_terminals() -> impl Iterator<Item = i32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.filter_map(|process| leads_a_terminal(&fs::read_to_string(process.path().join("stat")).ok()?))
}

/// The process that `/proc/PID/stat` is about, when it leads the session of a terminal. Format: proc(5).
fn leads_a_terminal(stat: &str) -> Option<i32> {
    let pid = stat.split(' ').next()?.parse().ok()?;
    // The name before may have spaces and brackets in it.
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace().skip(3);
    let (session, terminal): (i32, i32) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    (session == pid && terminal != 0).then_some(pid)
}

/// Every orphan becomes our child, so that no child left means no process left.
async fn all_gone(patience: Duration) -> bool {
    let give_up = Instant::now() + patience;
    while ended::any_left() {
        if Instant::now() >= give_up {
            return false;
        }
        sleep(LOOK_EVERY).await;
    }
    true
}

/// Has everything written that is still in memory, also to the host's directories, on a thread of its own: this one passes
/// those writes on. A host that does not take them is not waited for.
pub async fn write_back() {
    if tokio::time::timeout(WRITE_BACK, tokio::task::spawn_blocking(sync)).await.is_err() {
        console::say(format_args!("what was written to a mount may not all have reached the host"));
    }
}

/// Leaves the disk as a clean file system.
pub fn close_disk(old_root: &OldRoot) {
    sync();
    let root = umount2("/", MntFlags::MNT_DETACH);
    let closed = root.and_then(|()| old_root.enter()).and_then(|()| {
        mount(
            None::<&str>,
            crate::personalize::DISK_MOUNT,
            None::<&str>,
            MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY,
            None::<&str>,
        )
    });
    if let Err(errno) = closed {
        // The journal is played back at the next start; nothing that was synced is lost.
        console::say(format_args!("the disk was left mounted: {}", errno.desc()));
    }
    sync();
}

/// Switches the machine off once the last answer has had time to leave.
pub async fn power_off() {
    sleep(FAREWELL).await;
    // Without ACPI there is no power switch, and the kernel would halt for ever: a restart is what ends the machine,
    // for the host starts it with `reboot=t` and has QEMU take a restart as the end.
    let Err(errno) = reboot(RebootMode::RB_AUTOBOOT);
    console::say(format_args!("no way to switch off: {}", errno.desc()));
}

#[cfg(test)]
mod tests {
    use super::leads_a_terminal;

    #[test]
    fn leaders_of_terminals_are_told_from_what_runs_in_them() {
        assert_eq!(leads_a_terminal("412 (bash) S 1 412 412 34816 412 4194560 …"), Some(412));
        assert_eq!(leads_a_terminal("7 (a) 7 (b) S) S 1 7 7 34816 7 0"), Some(7));
        assert_eq!(leads_a_terminal("413 (vi) S 412 413 412 34816 413 0"), None);
        assert_eq!(leads_a_terminal("9 (sshd) S 1 9 9 0 -1 0"), None);
        assert_eq!(leads_a_terminal("9 (cut"), None);
    }
}
