//! What an image says about running it: its command, user, directory, stop signal and exposed ports, as Docker honours
//! them. Whatever a request says goes first.

use heyvm_images::ImageConfig;
use nix::{libc, sys::signal::Signal};
use serde::{Deserialize, Serialize};

/// Shells end at once where there is neither a terminal nor input.
const SHELLS: [&str; 8] = ["sh", "bash", "dash", "ash", "zsh", "fish", "ksh", "busybox"];
/// First real-time signal as glibc counts.
const SIGRTMIN: i32 = 34;

/// What of an image's configuration a sandbox keeps, beside its environment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageRun {
    /// Runs where the request has no start command; empty for an image that is there for a shell.
    pub command: Vec<String>,
    /// Whose commands are; empty for root.
    pub user: String,
    /// Ends the command in order; 0 for SIGTERM.
    pub stop_signal: i32,
    /// TCP ports that it says it listens on.
    pub exposed_ports: Vec<u16>,
}

impl ImageRun {
    /// Reads the configuration of an image.
    pub fn of(config: &ImageConfig) -> Self {
        let command = Some(config.command()).filter(|command| !is_shell(command));
        Self {
            command: command.unwrap_or_default(),
            user: config.user.clone().unwrap_or_default(),
            stop_signal: config.stop_signal.as_deref().and_then(signal).unwrap_or_default(),
            exposed_ports: config.exposed_ports.clone(),
        }
    }
}

/// The image's own directory. Many builders write `/` for "none", and an app's files do not belong there.
pub fn working_directory(config: &ImageConfig) -> Option<String> {
    let directory = config.working_dir.as_deref()?.trim_end_matches('/');
    (!directory.is_empty()).then(|| format!("/{}", directory.trim_start_matches('/')))
}

/// Whether a command is a shell without a script: `bash`, `/bin/sh -l`.
fn is_shell(command: &[String]) -> bool {
    let Some((program, arguments)) = command.split_first() else { return false };
    let name = program.rsplit('/').next().unwrap_or(program);
    SHELLS.contains(&name)
        && arguments.iter().all(|argument| argument == "sh" || ["-l", "-i", "--login"].contains(&argument.as_str()))
}

/// `SIGQUIT`, `QUIT`, `3`, `SIGRTMIN+3`.
fn signal(name: &str) -> Option<i32> {
    let name = name.to_ascii_uppercase();
    let short = name.strip_prefix("SIG").unwrap_or(&name);
    let number = match short.strip_prefix("RTMIN") {
        Some("") => Some(SIGRTMIN),
        Some(more) => more.strip_prefix('+')?.parse().ok().and_then(|more: i32| SIGRTMIN.checked_add(more)),
        None => short.parse().ok().or_else(|| Some(format!("SIG{short}").parse::<Signal>().ok()? as i32)),
    };
    number.filter(|number| (1..=libc::SIGRTMAX()).contains(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(entrypoint: &[&str], cmd: &[&str]) -> ImageConfig {
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        ImageConfig { entrypoint: owned(entrypoint), cmd: owned(cmd), ..ImageConfig::default() }
    }

    #[test]
    fn a_shell_without_a_script_is_not_run() {
        let runs = |entrypoint: &[&str], cmd: &[&str]| ImageRun::of(&config(entrypoint, cmd)).command;
        for shell in [&["bash"][..], &["/bin/sh"], &["/bin/bash", "-l"], &["busybox", "sh"], &[]] {
            assert!(runs(&[], shell).is_empty(), "{shell:?}");
        }
        assert_eq!(runs(&["/entry"], &["bash"]), ["/entry", "bash"], "the entry point decides");
        assert_eq!(runs(&[], &["sh", "-c", "serve"]), ["sh", "-c", "serve"]);
        assert_eq!(runs(&["nginx"], &["-g", "daemon off;"]), ["nginx", "-g", "daemon off;"]);
    }

    #[test]
    fn signals_have_names_and_numbers() {
        for (name, number) in [("SIGQUIT", 3), ("quit", 3), ("15", 15), ("SIGRTMIN+3", 37), ("RTMIN", 34)] {
            assert_eq!(signal(name), Some(number), "{name}");
        }
        for bad in ["", "SIGNOTHING", "0", "-1", "65", "SIGRTMIN-3", "SIGRTMIN+2147483647"] {
            assert_eq!(signal(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_root_is_no_working_directory() {
        let directory =
            |text: &str| working_directory(&ImageConfig { working_dir: Some(text.into()), ..ImageConfig::default() });
        assert_eq!(directory("/"), None);
        assert_eq!(directory("/srv/app/").as_deref(), Some("/srv/app"));
        assert_eq!(directory("app").as_deref(), Some("/app"));
    }
}
