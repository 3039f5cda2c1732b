//! `heyvm exec`: streams, standard input, exit status, time-outs, signals, volume.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    path::PathBuf,
    process::{Child, ChildStdout, Stdio},
    time::{Duration, Instant},
};

use heyvm_e2e::{Host, Ran, Vm, eventually};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use sha2::{Digest, Sha256};

/// No process may need more than this for any amount of output (KiB): a few buffers beside the program itself.
const MEMORY_KIB: u64 = 64 * 1024;

#[test]
fn keeps_the_streams_apart_and_passes_the_exit_status_on() {
    let host = Host::new();
    let vm = host.create(&[]);
    let ran = vm.exec(&["sh", "-c", "echo out; echo err >&2; exit 3"]).exited(3);
    assert_eq!((ran.out().as_str(), ran.err().as_str()), ("out", "err"));

    let json = host
        .run(&["exec", &vm.id, "--format", "json", "--", "sh", "-c", "echo out; echo err >&2; exit 3"])
        .exited(3)
        .json();
    assert_eq!((&json["exit_code"], &json["stdout"], &json["stderr"]), (&3.into(), &"out\n".into(), &"err\n".into()));

    // As in the documentation's Python script: the format after the command is heyvm's own …
    let trailing = host.run(&["exec", &vm.id, "--", "echo", "hello", "--format", "json"]).succeeded().json();
    assert_eq!(trailing["stdout"], "hello\n");
    // … unless a format stood before.
    let inner = host.run(&["exec", &vm.id, "--format", "text", "--", "echo", "hello", "--format", "json"]).succeeded();
    assert_eq!(inner.out(), "hello --format json");

    assert_eq!(vm.exec(&["no-such-program"]).code, 127);
    assert_eq!(vm.exec(&["/etc/passwd"]).code, 126);
    assert_eq!(vm.exec(&["sh", "-c", "kill -9 $$"]).code, 137);
    // Arguments arrive as they are.
    assert_eq!(vm.exec(&["printf", "%s|", "a b", "", "*", "$HOME", "\"'\\"]).out(), "a b||*|$HOME|\"'\\|");
}

#[test]
fn is_binary_safe_both_ways() {
    let host = Host::new();
    let vm = host.create(&[]);
    let mut bytes = Vec::new();
    for round in 0..5000u32 {
        bytes.extend((0..=255u8).map(|byte| byte.wrapping_add(round as u8)));
    }
    let back = vm.exec_with(&[], &["cat"], &bytes).succeeded();
    assert_eq!(back.stdout.len(), bytes.len());
    assert!(back.stdout == bytes, "the bytes differ");
    let sum = vm.exec_with(&[], &["sha256sum"], &bytes).succeeded().out();
    assert!(sum.starts_with(&hex::encode(Sha256::digest(&bytes))), "{sum}");
    // A command that never reads its input does not block.
    assert_eq!(vm.exec_with(&[], &["true"], &bytes).code, 0);

    let json = Ran::of(host.command().args(["exec", &vm.id, "--format", "json", "--", "printf", "\\377\\000x"]), b"")
        .succeeded()
        .json();
    assert_eq!(json["stdout_base64"], "/wB4", "{json}");
}

#[test]
fn output_arrives_as_it_comes() {
    let host = Host::new();
    let vm = host.create(&[]);
    let mut child = host
        .command()
        .args(["exec", &vm.id, "--", "sh", "-c", "echo early; sleep 5; echo late"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("heyvm");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    assert_eq!(lines.next().expect("line").expect("text"), "early");
    let early = Instant::now();
    assert_eq!(lines.next().expect("line").expect("text"), "late");
    assert!(early.elapsed() > Duration::from_secs(1), "held back: both came within {:?}", early.elapsed());
    assert!(child.wait().expect("wait").success());
}

#[test]
fn a_timeout_kills_the_whole_process_group_and_exits_124() {
    let host = Host::new();
    let vm = host.create(&[]);
    let script = "(trap '' TERM; echo child; sleep 1000) & echo parent; sleep 1000";
    let ran = vm.exec_with(&["--timeout", "2s"], &["sh", "-c", script], b"").exited(124);
    assert!(ran.took < Duration::from_secs(100), "{:?}", ran.took);
    assert!(
        ran.out().contains("parent") && ran.out().contains("child"),
        "what it printed before is kept: {}",
        ran.out()
    );
    eventually("no sleeper is left", || {
        (vm.sh("pgrep -c sleep || ps | grep -c '[s]leep' || ls /proc/*/comm | xargs grep -lx sleep | wc -l")
            .out()
            .starts_with('0'))
        .then_some(())
    });

    let json =
        host.run(&["exec", &vm.id, "--format", "json", "--timeout", "1s", "--", "sleep", "60"]).exited(124).json();
    assert_eq!(json["exit_code"], 124);
    // A command that is done in time is not touched.
    assert_eq!(vm.exec_with(&["--timeout", "60s"], &["true"], b"").code, 0);
}

/// Each leaves its process group, its session or its parent; `MARK` makes it known.
const RUNAWAYS: [&str; 5] = [
    "timeout 3000 sleep MARK1",
    "setsid sleep MARK2 & wait",
    "set -m; sleep MARK3 & sleep MARK3",
    "(setsid sh -c 'sleep MARK4 & sleep MARK4' &) ; sleep MARK4",
    "exec python3 -c 'import subprocess; subprocess.Popen([\"sleep\",\"MARK5\"], start_new_session=True).wait()'",
];

#[test]
fn nothing_outlives_its_timeout_or_its_client_but_what_is_detached() {
    let host = Host::new();
    let vm = host.create(&[]);
    let sleepers = |mark: &str| {
        let script = format!(
            "for p in /proc/[0-9]*; do tr '\\0' ' ' 2>/dev/null <$p/cmdline; echo; done | grep -c '^sleep {mark}' || true"
        );
        vm.sh(&script).succeeded().out().parse::<u32>().expect("a number")
    };
    let detached = host.run(&["exec", "-d", &vm.id, "--", "setsid sleep 7771 & sleep 7772"]).succeeded();
    assert!(detached.out().parse::<u32>().is_ok(), "its process id: {}", detached.out());
    for script in RUNAWAYS {
        vm.exec_with(&["--timeout", "2s"], &["bash", "-c", &script.replace("MARK", "888")], b"").exited(124);
    }
    let mut clients: Vec<Child> = RUNAWAYS
        .iter()
        .map(|script| {
            let script = format!("echo ready; {}", script.replace("MARK", "999"));
            let mut command = host.command();
            command.args(["exec", &vm.id, "--", "bash", "-c", &script]).stdin(Stdio::null()).stdout(Stdio::piped());
            let mut child = command.spawn().expect("heyvm");
            let mut line = String::new();
            BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("line");
            assert_eq!(line, "ready\n");
            child
        })
        .collect();
    eventually("all of them run", || (sleepers("999") >= 5).then_some(()));
    for client in &mut clients {
        client.kill().expect("kill");
        client.wait().expect("wait");
    }
    eventually("all of them are gone", || (sleepers("999") + sleepers("888") == 0).then_some(()));
    assert_eq!(sleepers("777"), 2, "what was detached goes on");
}

#[test]
fn loop_keeps_its_input_and_dashes_may_be_left_out() {
    let host = Host::new();
    let vm = host.create(&[]);
    let script = "printf 'a\\nb\\nc\\n' | while read x; do echo \"line $x\"; heyvm exec -n \"$0\" cat; done";
    let mut command = std::process::Command::new("bash");
    command.args(["-c", script, &vm.id]);
    host.environment(&mut command);
    assert_eq!(Ran::of(&mut command, b"").succeeded().out(), "line a\nline b\nline c");
    // A file keeps what a command does not read.
    let list = host.scratch().join("list");
    fs::write(&list, "a\nb\nc\n").expect("list");
    let script = "while read x; do echo \"line $x\"; heyvm exec \"$0\" true; done < \"$1\"";
    let mut command = std::process::Command::new("bash");
    command.args(["-c", script, &vm.id]).arg(&list);
    host.environment(&mut command);
    assert_eq!(Ran::of(&mut command, b"").succeeded().out(), "line a\nline b\nline c");
    let ran = Ran::of(
        host.command().args(["exec", "-i", "-w", "/tmp", "-e", "A=1", &vm.id, "sh", "-c", "cat; pwd; echo $A"]),
        b"in\n",
    );
    assert_eq!(ran.succeeded().out(), "in\n/tmp\n1");
}

#[test]
fn client_ends_after_sigterm_though_nobody_answers() {
    let host = Host::new();
    let vm = host.create(&[]);
    // Its command ignores the signal: the client waits a few seconds and leaves, with 128 + 15.
    let (mut child, _output) = started(&vm, "trap '' TERM; echo ready; while :; do sleep 1; done", Stdio::null());
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).expect("signal");
    assert_eq!(child.wait().expect("wait").code(), Some(143));

    let (mut child, _output) = started(&vm, "echo ready; sleep 4321", Stdio::null());
    let daemon = host.daemon().expect("daemon");
    kill(daemon, Signal::SIGSTOP).expect("stop");
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).expect("signal");
    let code = child.wait().expect("wait").code();
    let refused = host.run(&["list"]);
    kill(daemon, Signal::SIGCONT).expect("continue");
    assert_eq!(code, Some(143));
    assert!(refused.code == 1 && refused.err().contains("does not answer"), "{}", refused.err());
}

#[test]
fn image_without_a_shell_is_named_as_such() {
    let host = Host::new();
    let vm = host.create(&[]);
    // What an image without a shell is like.
    vm.exec(&["mv", "/bin/sh", "/bin/no-sh"]).succeeded();
    let refused = vm.exec(&["echo $HOME"]);
    assert_eq!(refused.code, 127);
    assert!(refused.err().contains("/bin/sh") && refused.err().lines().count() == 1, "{}", refused.err());
    assert_eq!(vm.exec(&["uname"]).succeeded().out(), "Linux", "plain words need none");
}

/// A command that says `ready` first, once it has said it.
fn started(vm: &Vm<'_>, script: &str, stdin: impl Into<Stdio>) -> (Child, BufReader<ChildStdout>) {
    let mut command = vm.host.command();
    command.args(["exec", &vm.id, "--", "sh", "-c", script]).stdin(stdin).stdout(Stdio::piped());
    let mut child = command.spawn().expect("heyvm");
    let mut output = BufReader::new(child.stdout.take().expect("piped"));
    let mut line = String::new();
    output.read_line(&mut line).expect("line");
    assert_eq!(line, "ready\n");
    (child, output)
}

/// Input that a command may leave unread: more than is ever under way.
fn unread(host: &Host) -> PathBuf {
    let path = host.scratch().join("input");
    fs::write(&path, vec![7; 20 << 20]).expect("input");
    path
}

const TRAPS_INT: &str = "trap 'echo got INT; exit 42' INT; echo ready; while true; do sleep 0.1; done";

/// Ctrl-C for a command that [`TRAPS_INT`].
fn interrupted((mut child, mut output): (Child, BufReader<ChildStdout>)) {
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).expect("signal");
    let mut rest = String::new();
    output.read_to_string(&mut rest).expect("rest");
    assert_eq!(rest, "got INT\n");
    assert_eq!(child.wait().expect("wait").code(), Some(42));
}

#[test]
fn ctrl_c_reaches_the_process() {
    let host = Host::new();
    interrupted(started(&host.create(&[]), TRAPS_INT, Stdio::inherit()));
}

#[test]
fn ctrl_c_overtakes_input_that_nobody_reads() {
    let host = Host::new();
    let started = started(&host.create(&[]), TRAPS_INT, File::open(unread(&host)).expect("input"));
    // By now as much input is under way as may be.
    std::thread::sleep(Duration::from_secs(1));
    interrupted(started);
}

#[test]
fn a_hundred_megabytes_of_input_arrive() {
    const BYTES: usize = 100 << 20;
    let host = Host::new();
    let vm = host.create(&[]);
    let ran = vm.exec_with(&[], &["sh", "-c", "cat | wc -c"], &vec![0; BYTES]);
    assert_eq!(ran.succeeded().out(), BYTES.to_string());
}

#[test]
fn a_client_that_goes_away_takes_its_command_along() {
    let host = Host::new();
    let vm = host.create(&[]);
    for input in ["/dev/null".into(), unread(&host)] {
        let (mut child, _output) = started(&vm, "echo ready; exec sleep 4321", File::open(input).expect("input"));
        std::thread::sleep(Duration::from_millis(500));
        child.kill().expect("kill");
        child.wait().expect("wait");
    }
    let alive = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -c 'sleep 43[2]1'";
    eventually("the command is gone", || (vm.exec(&["sh", "-c", alive]).out() == "0").then_some(()));
}

#[test]
fn a_hundred_megabytes_arrive_whole_in_constant_memory() {
    const BYTES: usize = 100 * 1024 * 1024;
    let host = Host::new();
    let vm = host.create(&["--size-class", "small"]);
    let daemon = host.daemon().expect("daemon");
    let before = peak_memory(daemon.as_raw());
    let mut child = host
        .command()
        .args(["exec", &vm.id, "--", "head", "-c", &BYTES.to_string(), "/dev/zero"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("heyvm");
    let mut output = child.stdout.take().expect("piped");
    let (mut total, mut buffer, mut peak) = (0, vec![0; 1 << 20], 0);
    loop {
        let read = output.read(&mut buffer).expect("read");
        if read == 0 {
            break;
        }
        assert!(buffer[..read].iter().all(|byte| *byte == 0));
        total += read;
        peak = peak.max(peak_memory(child.id() as i32));
    }
    assert!(child.wait().expect("wait").success());
    assert_eq!(total, BYTES);
    assert!(peak < MEMORY_KIB, "heyvm exec needed {peak} KiB");
    let grown = peak_memory(daemon.as_raw()).saturating_sub(before);
    assert!(grown < MEMORY_KIB, "the daemon grew by {grown} KiB");
}

/// Most memory the process ever had resident, in KiB.
fn peak_memory(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap_or("0");
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[test]
fn environment_directory_user_and_session() {
    let host = Host::new();
    let vm = host.create(&["--env", "BASE=1"]);
    let ran = vm
        .exec_with(&["--env", "EXTRA=two words", "--cwd", "/tmp"], &["sh", "-c", "echo $BASE $EXTRA; pwd"], b"")
        .succeeded();
    assert_eq!(ran.out(), "1 two words\n/tmp");
    assert_eq!(vm.sh("pwd; id -u").out(), "/workspace\n0");
    assert_eq!(vm.exec_with(&["--user", "nobody"], &["id", "-un"], b"").succeeded().out(), "nobody");
    assert_ne!(vm.exec_with(&["--user", "no-such-user"], &["true"], b"").code, 0);
    assert_ne!(vm.exec_with(&["--cwd", "/no/such/place"], &["true"], b"").code, 0);

    let session = |script: &str| vm.exec_with(&["--session", "work"], &["sh", "-c", script], b"").succeeded().out();
    vm.exec_with(&["--session", "work"], &["cd /etc && export KEPT=yes"], b"").succeeded();
    assert_eq!(session("pwd; echo $KEPT"), "/etc\nyes");
    assert_eq!(vm.sh("pwd; echo ${KEPT:-no}").out(), "/workspace\nno", "another call is not in the session");
}

#[test]
fn many_at_once_in_one_sandbox() {
    let host = Host::new();
    let vm = host.create(&["--size-class", "small"]);
    std::thread::scope(|scope| {
        let calls: Vec<_> = (0..12)
            .map(|number: i32| {
                let vm = &vm;
                scope.spawn(move || {
                    (number, vm.exec(&["sh", "-c", &format!("sleep 0.2; echo {number}")]).succeeded().out())
                })
            })
            .collect();
        for call in calls {
            let (number, out) = call.join().expect("call");
            assert_eq!(out, number.to_string());
        }
    });
}

/// As a person at a terminal, for whom script(1) stands in here.
#[test]
fn a_terminal_is_joined_to_this_one() {
    let host = Host::new();
    let vm = host.create(&[]);
    let inner = "tty; read line; echo got $line; exit 7";
    let typing = format!(
        "(sleep 6; printf 'typed\\r'; sleep 4) | script -qec \"heyvm exec --tty {} -- sh -c '{inner}'\" /dev/null",
        vm.id
    );
    let mut command = std::process::Command::new("bash");
    command.args(["-c", &typing.replace("$line", "\\$line")]);
    host.environment(&mut command);
    let ran = Ran::of(&mut command, b"").exited(7);
    assert!(ran.out().contains("/dev/pts/") && ran.out().contains("got typed"), "{}", ran.out());
}
