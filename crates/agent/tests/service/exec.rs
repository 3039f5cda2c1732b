//! Commands.

use std::time::Duration;

use heyvm_agent_protocol::v1::{exec_input, exec_output, *};
use tonic::Code;

use crate::harness::{Agent, Call, Client, TestCgroup, alive, eventually, program, run, script};

async fn client() -> (tempfile::TempDir, Client) {
    let dir = tempfile::tempdir().unwrap();
    let client = Agent::personalized(dir.path()).client().await;
    (dir, client)
}

#[tokio::test]
async fn nothing_runs_before_the_guest_is_a_sandbox() {
    let mut client = Agent::fresh().client().await;
    let refused = Call::start(&mut client, program(&["true"])).await.err().unwrap();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let refused = client.stat(StatRequest { path: "/".into() }).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let refused = client.shutdown(ShutdownRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let nothing = PersonalizeRequest::default();
    assert_eq!(client.personalize(nothing).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn output_error_and_exit_status_are_apart() {
    let (dir, mut client) = client().await;
    let ran = run(&mut client, script("echo \"$GREETING $HOME $HOSTNAME\"; pwd; echo no >&2; exit 7")).await;
    assert_eq!(ran.out(), format!("hello /root box\n{}", dir.path().display()));
    assert_eq!((ran.err(), ran.exit.code, ran.exit.signal), ("no", 7, 0));
}

#[tokio::test]
async fn a_program_gets_its_arguments_untouched_and_no_input() {
    let (_dir, mut client) = client().await;
    let ran = run(&mut client, program(&["printf", "[%s]", "a b", "", "$HOME"])).await;
    assert_eq!(ran.out(), "[a b][][$HOME]");
    assert_eq!(run(&mut client, program(&["cat"])).await.exit.code, 0);
}

#[tokio::test]
async fn what_cannot_be_started_says_why() {
    let (_dir, mut client) = client().await;
    let code = |ran: &crate::harness::Ran| (ran.exit.code, ran.exit.error.clone());
    let (missing, why) = code(&run(&mut client, program(&["no-such-program"])).await);
    assert!(missing == 127 && why.starts_with("no-such-program: "), "{why}");
    let (not_executable, why) = code(&run(&mut client, program(&["/etc/passwd"])).await);
    assert!(not_executable == 126 && why.contains("ermission"), "{why}");
    let nowhere = ExecStart { cwd: "/no/such/dir".into(), ..program(&["true"]) };
    let (no_directory, why) = code(&run(&mut client, nowhere).await);
    assert!(no_directory == 126 && why.contains("directory"), "{why}");
    let nobody = ExecStart { user: "no-such-user".into(), ..program(&["true"]) };
    let (no_user, why) = code(&run(&mut client, nobody).await);
    assert!(no_user == 126 && why.contains("no-such-user"), "{why}");
    let refused = Call::start(&mut client, program(&[])).await.err().unwrap();
    assert_eq!(refused.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_script_without_an_interpreter_line_runs() {
    let (dir, mut client) = client().await;
    let path = dir.path().join("plain");
    std::fs::write(&path, "echo \"$0 $1\"\n").unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let ran = run(&mut client, program(&["./plain", "one"])).await;
    assert_eq!(ran.out(), "./plain one");
}

#[tokio::test]
async fn input_arrives_whole_and_ends() {
    let (_dir, mut client) = client().await;
    let data: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    let call = Call::start(&mut client, ExecStart { stdin: true, ..program(&["cat"]) }).await.unwrap();
    let input = call.input.clone();
    let sent = data.clone();
    tokio::spawn(async move {
        for chunk in sent.chunks(60_000) {
            let kind = Some(exec_input::Kind::Stdin(chunk.to_vec()));
            input.send(ExecInput { kind }).await.unwrap();
        }
        input.send(ExecInput { kind: Some(exec_input::Kind::StdinClose(true)) }).await.unwrap();
    });
    let ran = call.finish().await;
    assert_eq!(ran.exit.code, 0);
    assert!(ran.stdout == data, "{} bytes came back", ran.stdout.len());
}

#[tokio::test]
async fn a_time_out_kills_the_whole_group() {
    let (_dir, mut client) = client().await;
    let start = ExecStart { timeout_ms: 1000, ..script("sleep 1000 & echo $!; sleep 1000") };
    let ran = run(&mut client, start).await;
    assert!(ran.exit.timed_out);
    assert_eq!(ran.exit.code, 124);
    eventually("the grandchild is dead", || !alive(ran.out())).await;
}

/// Each leaves its process group, its session or its parent.
const RUNAWAYS: [&str; 4] = [
    "timeout 1000 sleep 1000",
    "setsid sleep 1000 & wait",
    "(setsid sh -c 'sleep 1000 & sleep 1000' &) ; sleep 1000",
    "exec python3 -c 'import subprocess; subprocess.Popen([\"sleep\", \"1000\"], start_new_session=True).wait()'",
];

#[tokio::test]
async fn nothing_that_a_command_began_outlives_its_time_out_or_its_host() {
    let Some(cgroup) = TestCgroup::make() else {
        return eprintln!("SKIPPED: this host lets no cgroup be made; an end-to-end test has one in its guest");
    };
    let dir = tempfile::tempdir().unwrap();
    let mut client = Agent::in_cgroup(dir.path(), Some(cgroup.open())).client().await;
    for text in RUNAWAYS {
        let ran = run(&mut client, ExecStart { timeout_ms: 700, ..script(text) }).await;
        assert_eq!((ran.exit.code, ran.exit.timed_out), (124, true), "{text}");
        eventually(text, || !cgroup.is_populated()).await;

        let call = Call::start(&mut client, script(text)).await.unwrap();
        eventually("it runs", || cgroup.is_populated()).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        drop(call);
        eventually(text, || !cgroup.is_populated()).await;
    }
    // What a command that has ended left behind goes on.
    run(&mut client, script("setsid sleep 1000 &")).await;
    assert!(cgroup.is_populated());
}

#[tokio::test]
async fn detached_command_goes_on_without_its_host() {
    let (dir, mut client) = client().await;
    let detached = |start: ExecStart| ExecStart { detach: true, ..start };
    let text = "echo lost; echo no >&2; cat; sleep 1; echo done > left; sleep 1000";
    let mut call = Call::start(&mut client, detached(script(text))).await.unwrap();
    let Some(exec_output::Kind::Started(started)) = call.next().await else { panic!("it has not started") };
    assert!(call.next().await.is_none(), "the stream ends");
    drop(call);
    eventually("it goes on", || dir.path().join("left").exists()).await;
    assert!(alive(&started.pid.to_string()));
    kill(&started.pid.to_string());

    let mut call =
        Call::start(&mut client, ExecStart { timeout_ms: 300, ..detached(script("sleep 1000")) }).await.unwrap();
    let Some(exec_output::Kind::Started(started)) = call.next().await else { panic!("it has not started") };
    eventually("its time-out holds", || !alive(&started.pid.to_string())).await;

    let missing = run(&mut client, detached(program(&["no-such-program", "x"]))).await;
    assert_eq!(missing.exit.code, 127);
    for refused in [ExecStart { stdin: true, ..script("cat") }, ExecStart { session: "s".into(), ..script("true") }] {
        let refused = Call::start(&mut client, detached(refused)).await.err().unwrap();
        assert_eq!(refused.code(), Code::InvalidArgument);
    }
}

#[tokio::test]
async fn script_of_any_length_runs_and_an_argument_that_is_too_long_is_one_line() {
    let (_dir, mut client) = client().await;
    let long = "z".repeat(200 << 10);
    let text = format!("echo {long} | wc -c; echo \"$0 $1\"; cat; [ -e /proc/self/fd/9 ] || echo closed");
    let start = ExecStart { shell: true, stdin: true, ..program(&[&text, "one"]) };
    let call = Call::start(&mut client, start.clone()).await.unwrap();
    call.say(exec_input::Kind::Stdin(b"input\n".to_vec())).await;
    call.say(exec_input::Kind::StdinClose(true)).await;
    let ran = call.finish().await;
    assert_eq!((ran.out(), ran.err()), (format!("{}\nsh one\ninput\nclosed", long.len() + 1).as_str(), ""));
    let in_session = ExecStart { session: "s".into(), stdin: false, ..start };
    assert!(run(&mut client, in_session).await.out().ends_with("closed"));

    let ran = run(&mut client, program(&["echo", &long])).await;
    assert_eq!(ran.exit.code, 126);
    assert!(ran.exit.error.len() < 300 && ran.exit.error.contains("128 KiB"), "{}", ran.exit.error);
}

#[tokio::test]
async fn commands_start_with_default_signals() {
    let (_dir, mut client) = client().await;
    let ran = run(&mut client, program(&["grep", "-E", "^Sig(Ign|Blk)", "/proc/self/status"])).await;
    assert_eq!(ran.out().replace('\t', " "), "SigBlk: 0000000000000000\nSigIgn: 0000000000000000");
}

/// As a script starts `nohup ./test &`.
#[test]
fn ignored_signals_of_the_agent_are_not_its_commands() {
    let script = "trap '' INT QUIT HUP; exec \"$0\" --exact exec::commands_start_with_default_signals exec::signals_reach_the_group";
    let this = std::env::current_exe().unwrap();
    let output = std::process::Command::new("sh").args(["-c", script]).arg(this).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert!(String::from_utf8_lossy(&output.stdout).contains("2 passed"));
}

#[tokio::test]
async fn a_flood_of_output_does_not_hold_up_the_time_out() {
    let (_dir, mut client) = client().await;
    let ran = run(&mut client, ExecStart { timeout_ms: 300, ..program(&["yes"]) }).await;
    assert_eq!((ran.exit.code, ran.exit.timed_out), (124, true));
}

#[tokio::test]
async fn a_host_that_lets_go_kills_the_whole_group() {
    let (_dir, mut client) = client().await;
    let mut call = Call::start(&mut client, script("sleep 1000 & echo $! $$; sleep 1000")).await.unwrap();
    let pids = loop {
        if let Some(exec_output::Kind::Stdout(data)) = call.next().await {
            break String::from_utf8(data).unwrap();
        }
    };
    drop(call);
    for pid in pids.split_ascii_whitespace() {
        eventually("the process is dead", || !alive(pid)).await;
    }
}

#[tokio::test]
async fn a_hundred_megabytes_arrive() {
    let (_dir, mut client) = client().await;
    let mut call = Call::start(&mut client, script("head -c 100000000 /dev/zero")).await.unwrap();
    let mut bytes = 0;
    loop {
        match call.next().await.unwrap() {
            exec_output::Kind::Stdout(data) => bytes += data.len(),
            exec_output::Kind::Exit(exit) => break assert_eq!(exit.code, 0),
            _ => {}
        }
    }
    assert_eq!(bytes, 100_000_000);
}

#[tokio::test]
async fn output_waits_for_a_slow_host() {
    let (dir, mut client) = client().await;
    let text = "n=0; while [ $n -lt 100 ]; do head -c 1000000 /dev/zero; n=$((n+1)); echo $n > progress; done";
    let call = Call::start(&mut client, script(text)).await.unwrap();
    let progress = || std::fs::read_to_string(dir.path().join("progress")).ok()?.trim().parse::<u32>().ok();
    eventually("it writes", || progress().is_some()).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let megabytes = progress().unwrap_or_default();
    assert!(megabytes < 10, "{megabytes} MB are held somewhere");
    assert_eq!(call.finish().await.stdout.len(), 100_000_000);
}

#[tokio::test]
async fn a_background_process_does_not_hold_up_the_exit() {
    let (_dir, mut client) = client().await;
    let ran = run(&mut client, script("(sleep 2; echo late; sleep 1000) & echo $!")).await;
    assert!(!ran.out().contains("late"), "it was waited for");
    tokio::time::sleep(Duration::from_millis(2200)).await;
    assert!(alive(ran.out()), "it died of a broken pipe");
    kill(ran.out());
}

fn kill(pid: &str) {
    assert!(std::process::Command::new("kill").args(["-9", pid]).status().unwrap().success());
}

#[tokio::test]
async fn signals_reach_the_group() {
    let (_dir, mut client) = client().await;
    let text = "trap 'echo caught; exit 3' INT; echo ready; while :; do sleep 0.05; done";
    let mut call = Call::start(&mut client, script(text)).await.unwrap();
    while !matches!(call.next().await.unwrap(), exec_output::Kind::Stdout(_)) {}
    call.say(exec_input::Kind::Signal(2)).await;
    let ran = call.finish().await;
    assert_eq!((ran.out(), ran.exit.code), ("caught", 3));
    let killed = run(&mut client, script("kill -KILL $$")).await.exit;
    assert_eq!((killed.code, killed.signal), (137, 9));
    let nameless = run(&mut client, program(&["python3", "-c", "import os; os.kill(os.getpid(), 40)"])).await.exit;
    assert_eq!((nameless.code, nameless.signal), (168, 40));
}

#[tokio::test]
async fn a_signal_overtakes_input_that_nobody_reads() {
    let (_dir, mut client) = client().await;
    let mut call = Call::start(&mut client, ExecStart { stdin: true, ..program(&["sleep", "1000"]) }).await.unwrap();
    // As much as may be under way; a pipe's worth of it is taken, and makes room.
    for _ in 0..4 {
        call.say(exec_input::Kind::Stdin(vec![0; 64 << 10])).await;
    }
    while !matches!(call.next().await.unwrap(), exec_output::Kind::StdinTaken(65_536)) {}
    call.say(exec_input::Kind::Stdin(vec![0; 64 << 10])).await;
    call.say(exec_input::Kind::Signal(2)).await;
    assert_eq!(call.finish().await.exit.code, 130);
}

#[tokio::test]
async fn input_that_is_read_or_dropped_is_told() {
    let (_dir, mut client) = client().await;
    const BLOCK: usize = 64 << 10;
    const BLOCKS: usize = 32;
    for text in ["cat > /dev/null", "exec <&-; sleep 1"] {
        let call = Call::start(&mut client, ExecStart { stdin: true, ..script(text) }).await.unwrap();
        for _ in 0..BLOCKS {
            call.say(exec_input::Kind::Stdin(vec![0; BLOCK])).await;
        }
        call.say(exec_input::Kind::StdinClose(true)).await;
        let ran = call.finish().await;
        assert_eq!(ran.exit.code, 0, "{text}");
        assert!(ran.stdin_taken > ((BLOCKS - 1) * BLOCK) as u64, "{text}: {} were taken", ran.stdin_taken);
    }
}

#[tokio::test]
async fn end_tells_how_much_input_was_read() {
    let (_dir, mut client) = client().await;
    for (text, closes, read) in [
        ("true", false, 0),
        ("true", true, 0),
        ("head -c 10 >/dev/null", true, 10),
        ("head -c 10 >/dev/null", false, 10),
        ("cat >/dev/null", true, 1000),
        ("exec <&-; sleep 1", true, 0),
    ] {
        // A pipe's reader takes as much as it asks for.
        let call =
            Call::start(&mut client, ExecStart { stdin: true, ..script(&format!("sleep 0.5; {text}")) }).await.unwrap();
        call.say(exec_input::Kind::Stdin(vec![b'x'; 1000])).await;
        if closes {
            call.say(exec_input::Kind::StdinClose(true)).await;
        }
        let ran = call.finish().await;
        assert_eq!((ran.exit.code, ran.exit.stdin_read), (0, read), "{text}, closed: {closes}");
    }
}

#[tokio::test]
async fn a_session_goes_on_where_it_was() {
    let (dir, mut client) = client().await;
    let in_session = |start: ExecStart| ExecStart { session: "work".into(), ..start };
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    assert_eq!(run(&mut client, in_session(program(&["cd", "sub"]))).await.exit.code, 0);
    assert_eq!(run(&mut client, in_session(program(&["export", "COLOUR=light blue"]))).await.exit.code, 0);
    let ran = run(&mut client, in_session(script("LOCAL=1; unset GREETING; export MORE='a\nb'; exit 4"))).await;
    assert_eq!(ran.exit.code, 4);
    let ran = run(&mut client, in_session(script("pwd; echo \"$COLOUR,$LOCAL,$GREETING,$MORE\""))).await;
    assert_eq!(ran.out(), format!("{}/sub\nlight blue,,,a\nb", dir.path().display()));
    let ran = run(&mut client, in_session(program(&["sh", "-c", "exit 9"]))).await;
    assert_eq!((ran.exit.code, ran.err()), (9, ""));
    let ran = run(&mut client, program(&["pwd"])).await;
    assert_eq!(ran.out(), dir.path().to_str().unwrap(), "a call without the session is not in it");
}

#[tokio::test]
async fn a_terminal_has_a_size_and_can_be_resized() {
    let (_dir, mut client) = client().await;
    let pty = Some(Pty { cols: 100, rows: 30, term: "vt100".into() });
    let text = "stty size; echo $TERM; test -t 0 && test -t 2 && echo tty; read line; stty size";
    let mut call = Call::start(&mut client, ExecStart { pty, ..script(text) }).await.unwrap();
    let mut shown = String::new();
    while !shown.contains("tty") {
        if let Some(exec_output::Kind::Stdout(data)) = call.next().await {
            shown += std::str::from_utf8(&data).unwrap();
        }
    }
    assert_eq!(shown.replace('\r', ""), "30 100\nvt100\ntty\n");
    call.say(exec_input::Kind::Resize(Pty { cols: 50, rows: 10, term: String::new() })).await;
    call.say(exec_input::Kind::Stdin(b"go\n".to_vec())).await;
    assert_eq!(call.finish().await.out().replace('\r', ""), "go\n10 50");
}

#[tokio::test]
async fn a_closed_input_ends_a_terminals_input() {
    let (_dir, mut client) = client().await;
    let pty = Some(Pty { cols: 80, rows: 24, term: String::new() });
    let call = Call::start(&mut client, ExecStart { pty, ..program(&["cat"]) }).await.unwrap();
    call.say(exec_input::Kind::Stdin(b"word\n".to_vec())).await;
    call.say(exec_input::Kind::StdinClose(true)).await;
    let ran = call.finish().await;
    assert_eq!(ran.exit.code, 0);
    assert_eq!(ran.out().matches("word").count(), 2, "echo and copy");
}

#[tokio::test]
async fn a_broken_connection_ends_its_commands_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::personalized(dir.path());
    let (mut client, serving) = agent.connect().await;
    let mut call = Call::start(&mut client, script("echo $$; sleep 1000")).await.unwrap();
    let pid = loop {
        if let Some(exec_output::Kind::Stdout(data)) = call.next().await {
            break String::from_utf8(data).unwrap().trim().to_owned();
        }
    };
    serving.abort();
    eventually("the command is dead", || !alive(&pid)).await;
    let mut again = agent.client().await;
    assert_eq!(run(&mut again, program(&["echo", "back"])).await.out(), "back");
}
