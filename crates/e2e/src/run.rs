//! One call of the command line: standard output and error apart, the exit status, a deadline.

use std::{
    io::{Read, Write},
    process::{Child, Command, Stdio},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    pty::{Winsize, openpty},
};
use serde_json::Value;

/// No call may take longer: a hanging program fails its test instead of the whole run.
const DEADLINE: Duration = Duration::from_secs(240);

/// What came of a call.
#[derive(Debug)]
pub struct Ran {
    /// The command, for messages.
    pub what: String,
    /// Exit status; 128 + signal when a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// From start to end.
    pub took: Duration,
}

/// What the program said when it refused: the error of its JSON mode.
#[derive(Debug)]
pub struct Refusal {
    /// Stable code.
    pub code: String,
    /// The sentence.
    pub message: String,
    /// What to do next.
    pub hint: String,
    /// The step of a deploy that failed.
    pub step: String,
    /// The last lines of that step's output.
    pub log_tail: String,
    /// The whole `error` object.
    pub error: Value,
}

impl Ran {
    /// Runs a command to its end, `input` on its standard input.
    pub fn of(command: &mut Command, input: &[u8]) -> Self {
        let what = format!("{command:?}");
        let started = Instant::now();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        let mut stdin = child.stdin.take().expect("piped");
        let input = input.to_vec();
        let feeder = std::thread::spawn(move || {
            // The command may end without reading its input.
            stdin.write_all(&input).ok();
        });
        let stdout = collect(child.stdout.take().expect("piped"));
        let stderr = collect(child.stderr.take().expect("piped"));
        let code = wait(&mut child, &what);
        // A background process that inherited the pipes would keep them open: that is a bug worth a failing test.
        let finish = |pipe: JoinHandle<Vec<u8>>| {
            let patience = Instant::now() + Duration::from_secs(20);
            while !pipe.is_finished() {
                assert!(Instant::now() < patience, "{what} ended, but something holds its output open");
                std::thread::sleep(Duration::from_millis(2));
            }
            pipe.join().expect("reader")
        };
        let ran =
            Self { stdout: finish(stdout), stderr: finish(stderr), code, took: started.elapsed(), what: what.clone() };
        feeder.join().ok();
        ran
    }

    /// Runs a command whose standard error is a terminal of this many columns; gives its exit status and what it showed.
    pub fn on_terminal(command: &mut Command, columns: u16) -> (i32, String) {
        let what = format!("{command:?}");
        let size = Winsize { ws_row: 24, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let terminal = openpty(&size, None).expect("a terminal");
        for side in [&terminal.master, &terminal.slave] {
            fcntl(side, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).expect("close on exec");
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::from(terminal.slave));
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{what}: {error}"));
        // The command keeps the descriptor it was given until it gets another one.
        command.stderr(Stdio::null());
        // Reading fails once nobody has the other side open any more.
        let shown = collect(std::fs::File::from(terminal.master));
        (wait(&mut child, &what), lossy(&shown.join().expect("reader")))
    }

    /// Fails the test unless the exit status is 0.
    #[track_caller]
    pub fn succeeded(self) -> Self {
        assert_eq!(self.code, 0, "{}\nstdout: {}\nstderr: {}", self.what, lossy(&self.stdout), lossy(&self.stderr));
        self
    }

    /// Fails the test unless this is the exit status.
    #[track_caller]
    pub fn exited(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{}\nstdout: {}\nstderr: {}", self.what, lossy(&self.stdout), lossy(&self.stderr));
        self
    }

    /// Standard output as text, without the last newline.
    pub fn out(&self) -> String {
        lossy(&self.stdout).trim_end_matches('\n').to_owned()
    }

    /// Standard error as text, without the last newline.
    pub fn err(&self) -> String {
        lossy(&self.stderr).trim_end_matches('\n').to_owned()
    }

    /// Standard output as the one JSON document that JSON mode promises.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.stdout)
            .unwrap_or_else(|error| panic!("{}: not one JSON document: {error}\n{}", self.what, lossy(&self.stdout)))
    }

    /// The error of JSON mode: exit status 1, nothing on standard output, one document on standard error (after
    /// whatever progress was told there), with a hint.
    #[track_caller]
    pub fn refusal(&self) -> Refusal {
        let told = format!("{}\nstdout: {}\nstderr: {}", self.what, lossy(&self.stdout), lossy(&self.stderr));
        assert!(self.stdout.is_empty(), "standard output of a refusal must be empty: {told}");
        let text = lossy(&self.stderr);
        let start =
            text.find("{\"error\"").or_else(|| text.find("{\n")).unwrap_or_else(|| panic!("no JSON error: {told}"));
        let body: Value = serde_json::from_str(text[start..].trim()).unwrap_or_else(|error| panic!("{error}: {told}"));
        let error = body["error"].clone();
        let field = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
        let log_tail =
            error["log_tail"].as_array().into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>().join("\n");
        let refusal = Refusal {
            code: field("code"),
            message: field("message"),
            hint: field("hint"),
            step: field("step"),
            log_tail,
            error: error.clone(),
        };
        assert!(
            !refusal.code.is_empty() && !refusal.message.is_empty(),
            "an error needs a code and a sentence: {told}"
        );
        assert!(!refusal.hint.is_empty(), "an error needs a hint: {told}");
        // Words that mean nothing have an exit status of their own, as everywhere.
        let usage = refusal.code == "invalid_argument" && refusal.hint.contains("heyvm ");
        assert!(self.code == 1 || self.code == 2 && usage, "exit status {}: {told}", self.code);
        refusal
    }
}

fn collect(mut pipe: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).ok();
        bytes
    })
}

fn wait(child: &mut Child, what: &str) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(status) = child.try_wait().expect("wait") {
            return status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        }
        if Instant::now() > deadline {
            child.kill().ok();
            child.wait().ok();
            panic!("{what} did not end within {} s", DEADLINE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
