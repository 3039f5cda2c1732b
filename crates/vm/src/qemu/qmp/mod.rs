//! QEMU's control protocol: the few commands the driver needs, and the news that a guest has ended.
//!
//! - [`client`]: the wire.

mod client;

use std::{
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde_json::json;
use tokio::sync::watch;

pub use self::client::LATE;
use self::client::{Client, Notice};
use super::machine::CONSOLE_BYTES;
use crate::Error;

/// Pause between two looks at a running migration.
const MIGRATION_POLL: Duration = Duration::from_millis(1);

/// The guest's state as QEMU's events tell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    /// It runs, or is about to.
    Alive,
    /// QEMU halted it without our asking.
    Halted,
    /// It ended.
    Ended(Ended),
    /// The connection has ended.
    Disconnected,
}

/// How a guest ended whose QEMU waits for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It powered off or reset itself; its console may name a panic as the reason.
    Shutdown,
    /// QEMU was notified of a panic.
    Panicked,
    /// QEMU could not run the guest's code any further: KVM gave up.
    Unrunnable,
    /// Its processors have halted and nothing can wake them.
    Halted,
}

/// A connection to one QEMU; there is room for one at a time.
pub struct Qmp {
    client: Client,
    heard: watch::Receiver<Heard>,
    /// Whether it is we who halt the guest.
    halting: Arc<AtomicBool>,
    /// QEMU hands out the console's output once; what it has handed out is kept here.
    console: Mutex<String>,
}

impl Qmp {
    /// Connects to the control socket.
    pub async fn connect(socket: &Path) -> Result<Self, Error> {
        let (say, heard) = watch::channel(Heard::Alive);
        let halting = Arc::new(AtomicBool::new(false));
        let by_us = Arc::clone(&halting);
        let notify = move |notice: Notice<'_>| {
            say.send_if_modified(|now| {
                let next = after(*now, notice, by_us.load(Ordering::Relaxed));
                std::mem::replace(now, next) != next
            });
        };
        Ok(Self { client: Client::connect(socket, notify).await?, heard, halting, console: Mutex::default() })
    }

    /// Resolves when the guest has ended, with `None` when QEMU has gone.
    pub async fn guest_ended(&self) -> Option<Ended> {
        let mut heard = self.heard.clone();
        loop {
            let now = heard.wait_for(|now| *now != Heard::Alive).await.map_or(Heard::Disconnected, |now| *now);
            match now {
                Heard::Ended(how) => return Some(how),
                Heard::Disconnected => return None,
                Heard::Halted | Heard::Alive => {
                    // Late or refused: asked again at the next event, or found by whoever connects next.
                    if let Ok(Some(how)) = self.ended().await {
                        return Some(how);
                    }
                    if heard.changed().await.is_err() {
                        return None;
                    }
                }
            }
        }
    }

    /// Whether the connection has ended: no command is answered any more.
    pub fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// How the guest has ended, if it has: also before we connected.
    pub async fn ended(&self) -> Result<Option<Ended>, Error> {
        let status = self.client.execute("query-status", json!({})).await?;
        Ok(match status["status"].as_str() {
            Some("shutdown") => Some(Ended::Shutdown),
            Some("guest-panicked") => Some(Ended::Panicked),
            Some("internal-error") => Some(Ended::Unrunnable),
            _ => None,
        })
    }

    /// Whether every processor has halted with its interrupts off: QEMU counts such a guest as running.
    pub async fn is_halted_for_good(&self) -> Result<bool, Error> {
        let registers = json!({"command-line": "info registers -a"});
        let text = self.client.execute("human-monitor-command", registers).await?;
        Ok(halted_for_good(text.as_str().unwrap_or_default()))
    }

    /// The last output of the guest's console.
    pub async fn console(&self) -> Result<String, Error> {
        let new = self.client.execute("ringbuf-read", json!({"device": "console", "size": CONSOLE_BYTES})).await?;
        let mut console = self.console.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        console.push_str(new.as_str().unwrap_or_default());
        keep_end(&mut console, CONSOLE_BYTES as usize);
        Ok(console.clone())
    }

    /// Halts the processors.
    pub async fn stop(&self) -> Result<(), Error> {
        self.halting.store(true, Ordering::Relaxed);
        self.client.execute("stop", json!({})).await.map(drop)
    }

    /// Lets the processors go on after [`Self::stop`].
    pub async fn cont(&self) -> Result<(), Error> {
        self.client.execute("cont", json!({})).await?;
        self.halting.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Sends the device state to where `uri` says and waits until it is there. Memory is left out: it is in its file.
    pub async fn save(&self, uri: String) -> Result<(), Error> {
        self.ignore_shared_memory().await?;
        self.client.execute("migrate", json!({"uri": uri})).await?;
        self.migrated().await
    }

    /// Takes the device state from where `uri` says and waits until the guest runs.
    pub async fn resume(&self, uri: String) -> Result<(), Error> {
        self.ignore_shared_memory().await?;
        self.client.execute("migrate-incoming", json!({"uri": uri})).await?;
        self.migrated().await?;
        // The template was halted when its state was saved, so the clone is.
        self.cont().await
    }

    async fn ignore_shared_memory(&self) -> Result<(), Error> {
        let ignore = json!({"capabilities": [{"capability": "x-ignore-shared", "state": true}]});
        self.client.execute("migrate-set-capabilities", ignore).await.map(drop)
    }

    async fn migrated(&self) -> Result<(), Error> {
        loop {
            let info = self.client.execute("query-migrate", json!({})).await?;
            match info["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    let why = info["error-desc"].as_str().unwrap_or("the machine's state did not come through");
                    return Err(Error::Qmp { command: "migrate", message: why.to_owned() });
                }
                _ => tokio::time::sleep(MIGRATION_POLL).await,
            }
        }
    }

    /// Makes the disk larger; the guest sees it at once.
    pub async fn grow_disk(&self, bytes: u64) -> Result<(), Error> {
        self.client.execute("block_resize", json!({"node-name": "disk", "size": bytes})).await.map(drop)
    }

    /// Ends QEMU.
    pub async fn quit(&self) -> Result<(), Error> {
        self.client.execute("quit", json!({})).await.map(drop)
    }
}

/// What is known after a notice. An end is final, and a lost connection adds nothing to it.
fn after(now: Heard, notice: Notice<'_>, halted_by_us: bool) -> Heard {
    match (now, notice) {
        (Heard::Ended(how), _) => Heard::Ended(how),
        (_, Notice::Closed) => Heard::Disconnected,
        (_, Notice::Event("SHUTDOWN")) => Heard::Ended(Ended::Shutdown),
        (_, Notice::Event("GUEST_PANICKED")) => Heard::Ended(Ended::Panicked),
        (_, Notice::Event("STOP")) if !halted_by_us => Heard::Halted,
        (_, Notice::Event("RESUME")) => Heard::Alive,
        (now, Notice::Event(_)) => now,
    }
}

/// Of `info registers`: a processor's flags and whether it has halted stand on one line.
fn halted_for_good(registers: &str) -> bool {
    const INTERRUPTS: u64 = 1 << 9;
    let words = |line: &'_ str, name| {
        line.split_ascii_whitespace().find_map(|word| u64::from_str_radix(word.strip_prefix(name)?, 16).ok())
    };
    let mut processors = registers.lines().filter_map(|line| {
        let flags = words(line, "RFL=").or_else(|| words(line, "EFL="))?;
        Some(words(line, "HLT=")? == 1 && flags & INTERRUPTS == 0)
    });
    processors.next().is_some_and(|first| first && processors.all(|halted| halted))
}

fn keep_end(text: &mut String, bytes: usize) {
    let mut cut = text.len().saturating_sub(bytes);
    while !text.is_char_boundary(cut) {
        cut += 1;
    }
    text.drain(..cut);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qemu(socket: &Path, arguments: &[&str]) -> tokio::process::Child {
        let mut qemu = tokio::process::Command::new("qemu-system-x86_64");
        qemu.args(["-nodefaults", "-nographic", "-qmp"]);
        qemu.arg(format!("unix:{},server=on,wait=off", socket.display())).args(arguments).kill_on_drop(true);
        qemu.spawn().unwrap()
    }

    async fn connected(socket: &Path) -> Qmp {
        loop {
            match Qmp::connect(socket).await {
                Ok(qmp) => return qmp,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    #[tokio::test]
    async fn dropped_connection_makes_room_for_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let mut qemu = qemu(&socket, &["-M", "none"]);
        let first = connected(&socket).await;
        assert_eq!(first.ended().await.unwrap(), None);
        drop(first);
        let second = Qmp::connect(&socket).await.unwrap();
        second.quit().await.unwrap();
        assert!(qemu.wait().await.unwrap().success());
    }

    /// A guest of four bytes: `cli`, `hlt`, and a jump back to the halt, where the processor starts.
    fn halting_firmware(dir: &Path) -> std::path::PathBuf {
        let path = dir.join("firmware");
        let mut image = vec![0x90; 64 << 10];
        let reset = image.len() - 16;
        image[reset..reset + 4].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]);
        std::fs::write(&path, image).unwrap();
        path
    }

    #[tokio::test]
    async fn guest_that_halts_its_processors_is_seen_to() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let firmware = halting_firmware(dir.path());
        let arguments = ["-M", "microvm,accel=tcg", "-smp", "1", "-m", "16M", "-bios", firmware.to_str().unwrap()];
        let _qemu = qemu(&socket, &arguments);
        let qmp = connected(&socket).await;
        let looks = async {
            while !qmp.is_halted_for_good().await.unwrap() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), looks).await.unwrap();
        assert_eq!(qmp.ended().await.unwrap(), None, "QEMU counts it as running");
    }

    #[test]
    fn idle_processor_is_not_halted_for_good() {
        let cpu =
            |flags: &str, halted: u8| format!("RIP=0 RFL={flags} [-------] CPL=0 II=0 A20=1 SMM=0 HLT={halted}\n");
        assert!(halted_for_good(&cpu("00000046", 1)));
        assert!(halted_for_good(&[cpu("00000046", 1), cpu("00000002", 1)].concat()));
        assert!(!halted_for_good(&cpu("00000246", 1)), "an interrupt wakes it");
        assert!(!halted_for_good(&[cpu("00000046", 1), cpu("00000046", 0)].concat()), "another one runs");
        assert!(!halted_for_good("") && !halted_for_good("HLT=x RFL=zz"));
    }

    #[test]
    fn end_is_final() {
        let ended = Heard::Ended(Ended::Shutdown);
        assert_eq!(after(Heard::Alive, Notice::Event("SHUTDOWN"), false), ended);
        assert_eq!(after(ended, Notice::Closed, false), ended);
        assert_eq!(after(Heard::Alive, Notice::Closed, false), Heard::Disconnected);
        assert_eq!(after(Heard::Alive, Notice::Event("STOP"), true), Heard::Alive, "we halted it");
        assert_eq!(after(Heard::Alive, Notice::Event("STOP"), false), Heard::Halted);
        assert_eq!(after(Heard::Halted, Notice::Event("RESUME"), false), Heard::Alive);
        assert_eq!(after(Heard::Halted, Notice::Event("GUEST_PANICKED"), false), Heard::Ended(Ended::Panicked));
    }

    #[test]
    fn console_keeps_its_end() {
        let mut text = "äöü".to_owned();
        keep_end(&mut text, 3);
        assert_eq!(text, "ü");
    }
}
