//! KVM or translation: a verdict by trying, since a `/dev/kvm` that opens proves nothing.
//!
//! A stock kernel is started on KVM without a root file system. Where KVM works it prints its first line within a
//! fraction of a second; where it does not (nested set-ups that lack what a guest needs) it never does. A verdict with a
//! reason that QEMU named is kept for as long as the host runs. Silence may have been a busy host's: it is tried again
//! after a while, beside the creates, which use TCG meanwhile.
#![expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]

use std::{
    fs::File,
    os::fd::AsFd,
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use heyvm_images::Kernel;
use heyvm_jail::{
    launcher::{self, DESCRIPTORS_DIR, JailSpec},
    process::{ProcessId, host_boot_id},
    root::QemuRoot,
};
use serde::{Deserialize, Serialize};

use super::{
    kvm_device::{self, Closed},
    launch::TEST_GUEST_UID,
    memory, record,
};
use crate::Error;

/// How guest code is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Acceleration {
    /// By the processor.
    Kvm,
    /// By QEMU's translator.
    Tcg,
}

impl Acceleration {
    /// As QEMU and our own answers call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// What a verdict rests on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Ground {
    /// A test guest started.
    Started,
    /// The device cannot be opened, which every look tries again.
    CannotOpen(Closed),
    /// QEMU said why it does not run.
    Named,
    /// A test guest printed nothing in time; earlier versions did not record the ground.
    #[default]
    Silence,
}

/// What was found out, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// What VMs use.
    pub acceleration: Acceleration,
    /// A sentence.
    pub why: String,
    /// The host's boot it holds for.
    boot_id: String,
    /// Kernel and QEMU it was found with.
    tried_with: String,
    #[serde(default)]
    ground: Ground,
    /// When it was tried.
    #[serde(default = "SystemTime::now")]
    tried_at: SystemTime,
}

impl Verdict {
    /// Whether it may have changed since it was found.
    pub fn is_stale(&self) -> bool {
        match &self.ground {
            Ground::Started | Ground::Named => false,
            // Also where another reason has taken the first one's place: advice that was followed must not come again.
            Ground::CannotOpen(closed) => kvm_device::open().err().as_ref() != Some(closed),
            Ground::Silence => self.tried_at.elapsed().is_ok_and(|age| age > SILENCE_KEPT),
        }
    }

    /// What to do for KVM, where it is not used.
    pub fn hint(&self) -> Option<String> {
        Some(match &self.ground {
            Ground::Started => return None,
            Ground::CannotOpen(closed) => format!("sandboxes run with TCG, only slower; for KVM: {}", closed.hint()),
            Ground::Named => "sandboxes run with TCG, only slower; it is tried again after a restart of this machine, \
                              or with another QEMU or guest kernel"
                .into(),
            Ground::Silence => {
                let minutes = SILENCE_KEPT.as_secs() / 60;
                format!(
                    "sandboxes run with TCG, only slower, and KVM is tried again every {minutes} minutes; in a virtual \
                     machine the nested virtualisation around it may lack what guests need"
                )
            }
        })
    }
}

/// Where KVM works, a guest's first word takes a tenth of a second, on a busy host some seconds.
const DEADLINE: Duration = Duration::from_secs(20);
/// A silent guest is tried again after this.
const SILENCE_KEPT: Duration = Duration::from_secs(600);
const POLL: Duration = Duration::from_millis(10);
/// The first line of every Linux kernel.
const SIGN_OF_LIFE: &str = "Linux version";
const FIRST_DESCRIPTOR: i32 = 3;

/// The verdict kept in `file`, or a new one. Whether we may open the device every daemon looks at anew: that changes
/// when somebody follows `doctor`'s advice. Only what a trial has shown is kept; with `again`, not even that once it is
/// stale.
pub fn verdict(file: &Path, launcher: &Path, root: &QemuRoot, kernel: &Kernel, again: bool) -> Result<Verdict, Error> {
    let boot_id = host_boot_id().map_err(Error::io("reading", "/proc/sys/kernel/random/boot_id"))?;
    let tried_with = format!("{} {}", kernel.digest, root.digest);
    let tried_at = SystemTime::now();
    if let Err(closed) = kvm_device::open() {
        let (why, ground) = (closed.why(), Ground::CannotOpen(closed));
        return Ok(Verdict { acceleration: Acceleration::Tcg, why, boot_id, tried_with, ground, tried_at });
    }
    let kept = std::fs::read(file).ok().and_then(|bytes| serde_json::from_slice::<Verdict>(&bytes).ok());
    if let Some(kept) = kept.filter(|v| v.boot_id == boot_id && v.tried_with == tried_with && !(again && v.is_stale()))
    {
        return Ok(kept);
    }
    let trial = boots(Acceleration::Kvm, launcher, root, kernel, &file.with_extension("pid"), DEADLINE);
    let (ground, why) = match trial {
        Ok(Trial::Started) => (Ground::Started, "a test guest started on KVM".to_owned()),
        Ok(Trial::Silent) => {
            let waited = DEADLINE.as_secs();
            (Ground::Silence, format!("/dev/kvm opens, but a test guest did not start on it within {waited} s"))
        }
        Ok(Trial::Ended(why)) => (Ground::Named, format!("/dev/kvm opens, but QEMU ended on it: {why}")),
        Err(error) => (Ground::Silence, format!("/dev/kvm opens, but QEMU does not run on it: {error}")),
    };
    let acceleration = if ground == Ground::Started { Acceleration::Kvm } else { Acceleration::Tcg };
    let verdict = Verdict { acceleration, why, boot_id, tried_with, ground, tried_at };
    record::write(file, &verdict)?;
    Ok(verdict)
}

/// How a test guest fared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trial {
    /// Its kernel printed its first line.
    Started,
    /// Nothing came before the deadline.
    Silent,
    /// QEMU ended, with these words.
    Ended(String),
}

/// Whether a stock kernel prints its first line within `deadline`. Blocks that long at most; `id_file` is used meanwhile.
pub fn boots(
    acceleration: Acceleration,
    launcher: &Path,
    root: &QemuRoot,
    kernel: &Kernel,
    id_file: &Path,
    deadline: Duration,
) -> Result<Trial, Error> {
    let words_of_qemu = memory::create(0).map_err(Error::io("making a log for", "the test guest"))?;
    let console = memory::create(0).map_err(Error::io("making a console for", "the test guest"))?;
    let image = File::open(&kernel.vmlinuz).map_err(Error::io("opening the kernel", &kernel.vmlinuz))?;
    let (console_fd, kernel_fd) = (FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + 1);
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let mut argv = vec![root.program.display().to_string(), "-bios".into(), root.firmware.display().to_string()];
    argv.extend(words(
        "-M microvm,x-option-roms=off -cpu max -m 128M -nodefaults -no-user-config -nographic -no-reboot",
    ));
    argv.extend(words(&format!("-accel {}", acceleration.as_str())));
    argv.extend(words("-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"));
    argv.extend(words(&format!("-serial file:{DESCRIPTORS_DIR}/{console_fd}")));
    argv.extend(words(&format!("-kernel {DESCRIPTORS_DIR}/{kernel_fd} -append")));
    argv.push("console=ttyS0 earlyprintk=ttyS0 panic=-1 reboot=t".into());
    let spec = JailSpec {
        root: root.dir.clone(),
        argv,
        uid: TEST_GUEST_UID,
        descriptors: vec![console_fd, kernel_fd, 2],
        cgroups: Vec::new(),
        devices: if acceleration == Acceleration::Kvm { vec!["/dev/kvm".into()] } else { Vec::new() },
        id_file: id_file.to_owned(),
    };
    // One that a killed daemon left behind may hang on KVM for good.
    if let Some(stray) = std::fs::read_to_string(id_file).ok().and_then(|text| text.parse::<ProcessId>().ok()) {
        stray.kill().map_err(Error::io("ending", "an earlier test guest"))?;
    }
    let started = launcher::spawn(launcher, &spec, &[console.as_fd(), image.as_fd(), words_of_qemu.as_fd()]);
    let process = started?;
    let until = Instant::now() + deadline;
    let mut trial = Trial::Silent;
    while trial == Trial::Silent && Instant::now() < until {
        let running = process.is_alive();
        if memory::read_log(&console).contains(SIGN_OF_LIFE) {
            trial = Trial::Started;
        } else if !running {
            let words = memory::read_log(&words_of_qemu);
            trial = Trial::Ended(words.lines().last().unwrap_or("it said nothing").to_owned());
        } else {
            std::thread::sleep(POLL);
        }
    }
    process.kill().map_err(Error::io("ending", "the test guest"))?;
    std::fs::remove_file(id_file).ok();
    Ok(trial)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn silence_is_tried_again_and_a_named_reason_is_not() {
        let verdict = |ground, age: Duration| Verdict {
            acceleration: Acceleration::Tcg,
            why: String::new(),
            boot_id: String::new(),
            tried_with: String::new(),
            ground,
            tried_at: SystemTime::now() - age,
        };
        let (new, old) = (Duration::ZERO, 2 * SILENCE_KEPT);
        assert!(!verdict(Ground::Silence, new).is_stale());
        assert!(verdict(Ground::Silence, old).is_stale());
        assert!(!verdict(Ground::Named, old).is_stale() && !verdict(Ground::Started, old).is_stale());
        let no_reason = Closed::Otherwise("not what it is now".into());
        assert!(verdict(Ground::CannotOpen(no_reason), new).is_stale(), "another reason");
    }

    #[test]
    fn hint_says_what_is_done_instead_and_what_may_help() {
        let hint = |ground| {
            let kept = json!({"acceleration": "tcg", "why": "w", "boot_id": "b", "tried_with": "t", "ground": ground});
            serde_json::from_value::<Verdict>(kept).unwrap().hint()
        };
        assert_eq!(hint(Ground::Started), None);
        for (ground, part) in [
            (Ground::CannotOpen(Closed::Forbidden(Some("kvm".into()))), "usermod -aG kvm"),
            (Ground::Named, "another QEMU"),
            (Ground::Silence, "every 10 minutes"),
        ] {
            let hint = hint(ground).unwrap();
            assert!(hint.contains("TCG") && hint.contains(part), "{hint}");
        }
    }

    #[test]
    fn verdict_of_an_earlier_version_can_be_read() {
        let kept = r#"{"acceleration":"tcg","why":"w","boot_id":"b","tried_with":"t"}"#;
        assert_eq!(serde_json::from_str::<Verdict>(kept).unwrap().ground, Ground::Silence);
    }
}
