//! From the host's `ExecStart` to a program with everything looked up.

use std::{
    collections::BTreeMap,
    ffi::{CString, NulError},
    fs::File,
    io::Write,
    os::fd::OwnedFd,
    path::Path,
};

use heyvm_agent_protocol::v1::{EnvVar, ExecStart, Pty};

use nix::{
    errno::Errno,
    libc,
    sys::memfd::{MFdFlags, memfd_create},
};

use super::{
    lookup::{DEFAULT_PATH, candidates},
    spawn::{Program, SCRIPT},
    user::{Identity, UserError},
};
use crate::{
    descriptor,
    exec::session::{self, Session},
    sandbox::Sandbox,
};

/// Without a language, programs take text for ASCII: `ls` and `less` show escapes, Python 3.6 and Ruby fail.
const DEFAULT_LANG: &str = "C.UTF-8";
/// What runs scripts.
pub const SHELL: &str = "/bin/sh";
/// The kernel takes no longer argument (MAX_ARG_STRLEN).
const MAX_ARGUMENT: usize = 128 << 10;
/// Characters of a program's name that an error repeats.
const MAX_NAME: usize = 100;

/// Something to start.
pub struct Command {
    /// The program.
    pub program: Program,
    /// Whether input will be sent.
    pub stdin: bool,
    /// Whether it gets a terminal, and of which size.
    pub terminal: Option<Pty>,
    /// Whether it reports on descriptor 3.
    pub report: bool,
    /// Its script, where that is too long for an argument.
    pub script: Option<OwnedFd>,
    /// Whether it has neither input nor output.
    pub detached: bool,
}

/// Why a command makes no sense.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CommandError {
    /// No arguments at all.
    #[error("there is no command")]
    Empty,
    /// A text with a zero byte in it.
    #[error("a command, its directory and its environment cannot hold a zero byte")]
    ZeroByte(#[from] NulError),
    /// A name that cannot be a variable's.
    #[error("{0:?} cannot be the name of an environment variable")]
    VariableName(String),
    /// The user does not exist.
    #[error(transparent)]
    User(#[from] UserError),
    /// The script could not be kept for the shell to read.
    #[error("the script could not be kept in memory: {0}")]
    Script(#[source] Errno),
    /// A detached command with something that needs the host's end.
    #[error("a detached command has neither terminal nor input nor session")]
    Detached,
}

impl Command {
    /// Looks everything up that `start` names; `session` is where it goes on from.
    pub fn new(start: &ExecStart, sandbox: &Sandbox, session: Option<&Session>) -> Result<Self, CommandError> {
        if start.argv.is_empty() {
            return Err(CommandError::Empty);
        }
        if start.detach && (start.pty.is_some() || start.stdin || !start.session.is_empty()) {
            return Err(CommandError::Detached);
        }
        let user = if start.user.is_empty() { &sandbox.user } else { &start.user };
        let identity = Identity::find(user, Path::new("/etc"))?;
        let environment = environment(start, sandbox, session, &identity)?;
        let long = start.shell && start.argv[0].len() >= MAX_ARGUMENT;
        let script = long.then(|| keep_script(&start.argv[0])).transpose()?;
        let argv = arguments(start, long);
        let path = environment.get("PATH").map_or(DEFAULT_PATH, String::as_str);
        let program = Program {
            root: None,
            candidates: candidates(&argv[0], path),
            argv: argv.into_iter().map(CString::new).collect::<Result<_, _>>()?,
            env: environment.iter().map(|(k, v)| CString::new(format!("{k}={v}"))).collect::<Result<_, _>>()?,
            cwd: CString::new(directory(start, sandbox, session))?,
            identity,
        };
        Ok(Self {
            program,
            stdin: start.stdin,
            terminal: start.pty.clone(),
            report: !start.session.is_empty(),
            script,
            detached: start.detach,
        })
    }
}

/// What an error calls the program: the shell where there is one, never a whole script.
pub fn name(start: &ExecStart) -> String {
    if start.shell || !start.session.is_empty() {
        return SHELL.into();
    }
    let name = start.argv.first().map(String::as_str).unwrap_or_default();
    let shown: String = name.chars().filter(|c| !c.is_control()).take(MAX_NAME).collect();
    if shown.len() < name.len() { format!("{shown}…") } else { shown }
}

/// A script's words, where it is nothing but words: a shell would run them as they are.
pub fn words(script: &str) -> Option<Vec<String>> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-+./:,@% =".contains(c);
    let words: Vec<String> = script.split_ascii_whitespace().map(str::to_owned).collect();
    let begins_with_program = words.first().is_some_and(|first| !first.contains('='));
    (begins_with_program && script.chars().all(is_plain)).then_some(words)
}

/// Keeps a script where a shell can read it: in memory, below a number that goes to no other descriptor of the child.
fn keep_script(script: &str) -> Result<OwnedFd, CommandError> {
    CString::new(script)?;
    let keep = || -> nix::Result<OwnedFd> {
        let mut file = File::from(memfd_create(c"script", MFdFlags::MFD_CLOEXEC)?);
        // Once it is open for reading, the command itself has no use for the descriptor.
        let text = format!("exec {SCRIPT}<&-; {script}\n");
        file.write_all(text.as_bytes()).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
        descriptor::above(&file, SCRIPT)
    };
    keep().map_err(CommandError::Script)
}

/// Reads the kept script.
const READ_SCRIPT: &str = ". /proc/self/fd/9";

fn arguments(start: &ExecStart, long: bool) -> Vec<String> {
    // The script's place stays taken: what follows are its arguments.
    let first = if long { READ_SCRIPT } else { start.argv[0].as_str() };
    let own = [first].into_iter().chain(start.argv.iter().skip(1).map(String::as_str));
    let head: &[&str] = match (start.session.is_empty(), start.shell) {
        (true, false) => &[],
        (true, true) => &[SHELL, "-c"],
        (false, shell) => &[SHELL, "-c", if shell { session::SCRIPT } else { session::ARGV }, "sh"],
    };
    let mut argv: Vec<String> = head.iter().copied().chain(own).map(String::from).collect();
    if start.shell && start.session.is_empty() {
        // `sh -c script name arguments…`: the name is what the shell calls itself.
        argv.insert(3, "sh".into());
    }
    argv
}

fn environment(
    start: &ExecStart,
    sandbox: &Sandbox,
    session: Option<&Session>,
    identity: &Identity,
) -> Result<BTreeMap<String, String>, CommandError> {
    let kept = session.map_or(&sandbox.env, |session| &session.env);
    let mut all: BTreeMap<String, String> = kept.iter().cloned().collect();
    for EnvVar { name, value } in &start.env {
        if name.is_empty() || name.contains('=') {
            return Err(CommandError::VariableName(name.clone()));
        }
        all.insert(name.clone(), value.clone());
    }
    let mut default = |name: &str, value: &str| {
        all.entry(name.into()).or_insert_with(|| value.into());
    };
    default("PATH", DEFAULT_PATH);
    default("HOME", &identity.home);
    default("HOSTNAME", &sandbox.hostname);
    default("LANG", DEFAULT_LANG);
    if let Some(pty) = &start.pty {
        default("TERM", if pty.term.is_empty() { "xterm-256color" } else { &pty.term });
    }
    Ok(all)
}

/// A relative directory is one below the directory that would be taken otherwise.
fn directory(start: &ExecStart, sandbox: &Sandbox, session: Option<&Session>) -> String {
    let usual = session.map_or(sandbox.working_dir.as_str(), |session| &session.cwd);
    let usual = if usual.is_empty() { "/" } else { usual };
    if start.cwd.is_empty() {
        return usual.to_owned();
    }
    Path::new(usual).join(&start.cwd).to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox() -> Sandbox {
        let env = [("A", "1"), ("PATH", "/x")].map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec();
        Sandbox { env, working_dir: "/workspace".into(), hostname: "box".into(), ..Sandbox::default() }
    }

    fn start(argv: &[&str]) -> ExecStart {
        ExecStart { argv: argv.iter().map(ToString::to_string).collect(), ..ExecStart::default() }
    }

    fn texts(strings: &[CString]) -> Vec<&str> {
        strings.iter().map(|s| s.to_str().unwrap()).collect()
    }

    #[test]
    fn a_program_gets_its_arguments_as_they_are() {
        let command = Command::new(&start(&["ls", "-l a"]), &sandbox(), None).unwrap();
        assert_eq!(texts(&command.program.candidates), ["/x/ls"]);
        assert_eq!(texts(&command.program.argv), ["ls", "-l a"]);
        assert_eq!(command.program.cwd.to_str(), Ok("/workspace"));
        assert_eq!(texts(&command.program.env), ["A=1", "HOME=/root", "HOSTNAME=box", "LANG=C.UTF-8", "PATH=/x"]);
    }

    #[test]
    fn a_script_gets_its_arguments_from_one_on() {
        let command = Command::new(&ExecStart { shell: true, ..start(&["echo $1", "x"]) }, &sandbox(), None).unwrap();
        assert_eq!(texts(&command.program.argv), ["/bin/sh", "-c", "echo $1", "sh", "x"]);
    }

    #[test]
    fn the_calls_environment_comes_on_top() {
        let env = vec![EnvVar { name: "A".into(), value: "2".into() }];
        let command = Command::new(&ExecStart { env, ..start(&["ls"]) }, &sandbox(), None).unwrap();
        assert!(texts(&command.program.env).contains(&"A=2"));
    }

    #[test]
    fn the_language_is_utf8_unless_named() {
        let env = vec![EnvVar { name: "LANG".into(), value: "de_DE.UTF-8".into() }];
        let command = Command::new(&ExecStart { env, ..start(&["ls"]) }, &sandbox(), None).unwrap();
        let languages = texts(&command.program.env).into_iter().filter(|entry| entry.starts_with("LANG=")).count();
        assert_eq!(languages, 1);
        assert!(texts(&command.program.env).contains(&"LANG=de_DE.UTF-8"));
    }

    #[test]
    fn a_directory_may_be_relative() {
        let within = |cwd: &str| ExecStart { cwd: cwd.into(), ..start(&["ls"]) };
        let cwd = |cwd: &str| Command::new(&within(cwd), &sandbox(), None).unwrap().program.cwd.into_string().unwrap();
        assert_eq!(cwd("src"), "/workspace/src");
        assert_eq!(cwd("/srv"), "/srv");
    }

    #[test]
    fn script_too_long_for_an_argument_is_read_from_memory() {
        let text = format!("echo {}", "z".repeat(200 << 10));
        let command = Command::new(&ExecStart { shell: true, ..start(&[&text, "x"]) }, &sandbox(), None).unwrap();
        assert_eq!(texts(&command.program.argv), ["/bin/sh", "-c", READ_SCRIPT, "sh", "x"]);
        assert!(command.script.is_some() && READ_SCRIPT.ends_with(&SCRIPT.to_string()));
    }

    #[test]
    fn an_error_names_the_program_and_never_repeats_a_script() {
        assert_eq!(name(&ExecStart { shell: true, ..start(&["echo\nzzz"]) }), "/bin/sh");
        assert_eq!(name(&start(&["./run\n.sh"])), "./run.sh…");
        assert!(name(&start(&[&"z".repeat(200 << 10)])).len() < 200);
    }

    #[test]
    fn only_plain_words_run_without_a_shell() {
        assert_eq!(words("/server -port 80").unwrap(), ["/server", "-port", "80"]);
        for script in ["", "A=1 b", "a; b", "a $b", "a 'b'", "a *", "a >b", "a\nb", "~/a", "a # b"] {
            assert_eq!(words(script), None, "{script:?}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let refused = |start: ExecStart| Command::new(&start, &sandbox(), None).err().unwrap();
        assert_eq!(refused(start(&[])), CommandError::Empty);
        assert!(matches!(refused(start(&["a\0b"])), CommandError::ZeroByte(_)));
        let env = vec![EnvVar { name: "A=B".into(), value: String::new() }];
        assert_eq!(refused(ExecStart { env, ..start(&["ls"]) }), CommandError::VariableName("A=B".into()));
    }
}
