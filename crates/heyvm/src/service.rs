//! The daemon as a service of systemd: started at boot, so that sandboxes with `--restart always` come back.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use heyvm_api::{ApiError, ErrorCode};

/// Characters of a path that need no quoting in a unit.
const PLAIN: &str = "/-_.+@:,~";
const UNIT: &str = "heyvm.service";

/// Where the unit lies and how systemd is spoken to: for the whole host where root asks, else for the user.
#[derive(Debug, Clone)]
pub struct Service {
    directory: PathBuf,
    is_users: bool,
    /// Runs a command; whether it did its work.
    run: fn(&str, &[&str]) -> bool,
}

/// What was done, and what is left to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    /// The unit's file.
    pub unit: PathBuf,
    /// What to do by hand, in one line each.
    pub left: Vec<String>,
}

impl Service {
    /// The calling user's.
    pub fn of_caller() -> Result<Self, ApiError> {
        if nix::unistd::geteuid().is_root() {
            return Ok(Self { directory: "/etc/systemd/system".into(), is_users: false, run });
        }
        let config = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
        let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config"));
        let config = config.or(home).ok_or_else(|| {
            ApiError::new(ErrorCode::HostNotReady, "HOME is not set").hint("Set HOME to your home directory.")
        })?;
        Ok(Self { directory: config.join("systemd/user"), is_users: true, run })
    }

    /// Writes the unit and has systemd start it at boot. The running daemon is left alone.
    pub fn install(&self, program: &Path, home: &Path) -> Result<Done, ApiError> {
        let unit = self.directory.join(UNIT);
        let text = text(program, home, self.is_users)?;
        let written = fs::create_dir_all(&self.directory).and_then(|()| fs::write(&unit, text));
        written.map_err(|error| failed("write", &unit, &error))?;
        let mut left = Vec::new();
        for words in [&["daemon-reload"][..], &["enable", UNIT]] {
            left.extend(self.systemctl(words));
        }
        if self.is_users {
            left.extend(self.done_or_left("loginctl", &["enable-linger"]));
        }
        Ok(Done { unit, left })
    }

    /// Has systemd start it no more. The running daemon is left alone.
    pub fn uninstall(&self) -> Result<Done, ApiError> {
        let unit = self.directory.join(UNIT);
        let mut left: Vec<String> = self.systemctl(&["disable", UNIT]).into_iter().collect();
        match fs::remove_file(&unit) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &unit, &error)),
            _ => left.extend(self.systemctl(&["daemon-reload"])),
        }
        Ok(Done { unit, left })
    }

    fn systemctl(&self, words: &[&str]) -> Option<String> {
        let user: &[&str] = if self.is_users { &["--user"] } else { &[] };
        self.done_or_left("systemctl", &[user, words].concat())
    }

    /// The command, where it did not do its work: then it is left to the user.
    fn done_or_left(&self, program: &str, words: &[&str]) -> Option<String> {
        (!(self.run)(program, words)).then(|| format!("{program} {}", words.join(" ")))
    }
}

fn run(program: &str, words: &[&str]) -> bool {
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

fn failed(doing: &str, path: &Path, error: &io::Error) -> ApiError {
    ApiError::new(ErrorCode::HostNotReady, format!("could not {doing} {}: {error}", path.display()))
        .hint("Check who owns that directory.")
}

/// The unit. `KillMode=process`: VMs outlive the daemon, as they do without systemd.
fn text(program: &Path, home: &Path, is_users: bool) -> Result<String, ApiError> {
    let [program, home] = [program, home].map(|path| {
        let text = path.to_str().filter(|text| text.chars().all(|c| c.is_alphanumeric() || PLAIN.contains(c)));
        text.ok_or_else(|| {
            ApiError::new(ErrorCode::InvalidArgument, format!("{} cannot stand in a systemd unit", path.display()))
                .hint("Use a path of letters, digits and -_.+ alone.")
        })
    });
    let target = if is_users { "default.target" } else { "multi-user.target" };
    Ok(format!(
        "[Unit]\n\
         Description=heyvm daemon: sandboxes that are full VMs\n\
         After=network.target\n\
         \n\
         [Service]\n\
         ExecStart={} daemon run\n\
         Environment=HEYO_HOME={}\n\
         KillMode=process\n\
         Delegate=yes\n\
         LimitNOFILE=1048576\n\
         \n\
         [Install]\n\
         WantedBy={target}\n",
        program?, home?
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_runs_this_program_for_this_home_and_leaves_vms_alone() {
        let directory = tempfile::tempdir().unwrap();
        let no_systemd = |_: &str, _: &[&str]| false;
        let service = Service { directory: directory.path().join("systemd/user"), is_users: true, run: no_systemd };
        let done = service.install(Path::new("/opt/heyvm"), Path::new("/home/ada/.heyo")).unwrap();
        let left =
            ["systemctl --user daemon-reload", "systemctl --user enable heyvm.service", "loginctl enable-linger"];
        assert_eq!(done.left, left);
        let unit = fs::read_to_string(&done.unit).unwrap();
        for line in [
            "ExecStart=/opt/heyvm daemon run",
            "Environment=HEYO_HOME=/home/ada/.heyo",
            "KillMode=process",
            "WantedBy=default.target",
        ] {
            assert!(unit.lines().any(|one| one == line), "{line} is not in {unit}");
        }
        for _ in 0..2 {
            service.uninstall().unwrap();
            assert!(!done.unit.exists());
        }
    }

    #[test]
    fn a_path_cannot_add_lines_to_the_unit() {
        for bad in ["/opt/a b", "/opt/a\nExecStart=/bin/sh", "/opt/%h", "/opt/\"x"] {
            assert_eq!(
                text(Path::new(bad), Path::new("/h"), false).unwrap_err().code,
                ErrorCode::InvalidArgument,
                "{bad}"
            );
        }
    }
}
