//! The environment of helper processes: what they need, and nothing of what their parent was started with. A parent's
//! environment holds secrets (`JWT_SECRET`, keys of storage), and every process of the same user reads `/proc/PID/environ`.

use std::process::Command;

/// Gives a command `PATH`, `HOME` and the language, and nothing else of ours.
pub fn clean(command: &mut Command) -> &mut Command {
    const KEPT: [&str; 6] = ["PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "XDG_RUNTIME_DIR"];
    command.env_clear();
    keep(command, |name| KEPT.contains(&name))
}

/// Copies those of our own variables whose names are wanted. The command's environment is cleared before.
pub fn keep(command: &mut Command, is_wanted: impl Fn(&str) -> bool) -> &mut Command {
    command.envs(std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(&is_wanted)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_but_what_is_listed_is_passed_on() {
        let output = clean(Command::new("/usr/bin/env").env("JWT_SECRET", "secret")).output().unwrap();
        let names = String::from_utf8(output.stdout).unwrap();
        let names: Vec<_> = names.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name).collect();
        assert!(names.contains(&"PATH"), "{names:?}");
        assert!(
            names.iter().all(|name| ["PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "XDG_RUNTIME_DIR"].contains(name)),
            "{names:?}"
        );
    }
}
