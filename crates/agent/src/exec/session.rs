//! Named sessions: commands that find the directory and the exported environment where the last one left them.
//!
//! A command of a session runs inside a shell, so that `cd` and `export` mean something, and that shell reports both
//! on descriptor 3 when it ends: its directory, a newline and a zero byte, then `NAME=value` with a zero byte each.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

macro_rules! report {
    () => {
        "trap 'heyvm_status=$?; { pwd; printf \"\\000\"; command -p env -0; } >&3 2>/dev/null; exit $heyvm_status' 0; "
    };
}

/// Runs `$1` as a script with the rest as its arguments.
pub const SCRIPT: &str = concat!(report!(), "heyvm_script=$1; shift; eval \"$heyvm_script\" 3>&-");
/// Runs the arguments as a command, which may be the shell's own.
pub const ARGV: &str = concat!(report!(), "\"$@\" 3>&-");

/// Larger reports are dropped: the session stays as it was.
pub const MAX_REPORT: usize = 1 << 20;
/// Sessions beyond these are forgotten, the longest unused first.
const MAX_SESSIONS: usize = 128;
/// Of the shell, not of the session.
const SHELLS_OWN: [&str; 4] = ["_", "SHLVL", "heyvm_script", "heyvm_status"];

/// Where a session stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Session {
    /// Its directory.
    pub cwd: String,
    /// Its exported environment.
    pub env: Vec<(String, String)>,
}

impl Session {
    /// Reads a shell's report; `None` when it is not whole.
    pub fn parse(report: &[u8]) -> Option<Self> {
        let mut parts = report.split(|&byte| byte == 0);
        let cwd = String::from_utf8(parts.next()?.strip_suffix(b"\n")?.to_vec()).ok()?;
        if !cwd.starts_with('/') || !report.ends_with(b"\0") {
            return None;
        }
        let variable = |part: &[u8]| {
            let (name, value) = std::str::from_utf8(part).ok()?.split_once('=')?;
            (!name.is_empty() && !SHELLS_OWN.contains(&name)).then(|| (name.to_owned(), value.to_owned()))
        };
        Some(Self { cwd, env: parts.filter_map(variable).collect() })
    }
}

/// All sessions of a sandbox.
#[derive(Default)]
pub struct Sessions {
    all: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    states: HashMap<String, Session>,
    /// Longest unused first.
    order: VecDeque<String>,
}

impl Sessions {
    /// Where a session stands; `None` for a new one.
    pub fn get(&self, name: &str) -> Option<Session> {
        self.lock().states.get(name).cloned()
    }

    /// Remembers where a session stands.
    pub fn put(&self, name: &str, state: Session) {
        let mut known = self.lock();
        known.order.retain(|other| other != name);
        known.order.push_back(name.to_owned());
        known.states.insert(name.to_owned(), state);
        if known.order.len() > MAX_SESSIONS
            && let Some(oldest) = known.order.pop_front()
        {
            known.states.remove(&oldest);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read() {
        let session = Session::parse(b"/tmp/a\nb\n\0A=1\0_=/bin/env\0B=x=y\n\0C=\0").unwrap();
        assert_eq!(session.cwd, "/tmp/a\nb");
        let env: Vec<_> = session.env.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(env, [("A", "1"), ("B", "x=y\n"), ("C", "")]);
    }

    #[test]
    fn a_report_that_is_not_whole_is_none() {
        for report in [&b""[..], b"/tmp", b"/tmp\n\0A=1", b"tmp\n\0A=1\0"] {
            assert_eq!(Session::parse(report), None, "{report:?}");
        }
    }

    #[test]
    fn the_longest_unused_session_is_forgotten() {
        let sessions = Sessions::default();
        for n in 0..=MAX_SESSIONS {
            sessions.put(&n.to_string(), Session::default());
            sessions.put("used", Session::default());
        }
        assert_eq!(sessions.get("0"), None);
        assert!(sessions.get("used").is_some() && sessions.get("128").is_some());
        assert_eq!(sessions.lock().states.len(), MAX_SESSIONS);
    }
}
