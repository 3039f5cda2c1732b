//! What sandboxes may take, and what two of them never share.

use std::{collections::HashSet, time::Duration};

use heyvm_e2e::{Host, apps::WEB_FLAGS, eventually, leaks};

#[test]
fn size_classes_have_their_memory_and_their_share_of_the_processor() {
    let host = Host::new();
    let memory = |vm: &heyvm_e2e::Vm<'_>| {
        vm.sh("awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo").out().parse::<u64>().expect("MiB")
    };
    let micro = host.create(&["--size-class", "micro"]);
    let mini = host.create(&["--size-class", "mini"]);
    let small = host.create(&["--size-class", "small"]);
    for (vm, mib) in [(&micro, 512), (&mini, 1024), (&small, 2048)] {
        let seen = memory(vm);
        assert!(seen > mib * 85 / 100 && seen <= mib, "{mib} MiB promised, the guest has {seen}");
        assert_eq!(vm.sh("nproc").out(), "1");
    }
    assert_eq!(micro.info()["size_class"], "micro");
    // A quarter of a processor against a whole one: the guest counts rounds of a busy loop for two seconds.
    let rounds = "import time; end = time.monotonic() + 2; n = 0\nwhile time.monotonic() < end: n += 1\nprint(n)";
    let counted = |vm: &heyvm_e2e::Vm<'_>| {
        vm.exec(&["python3", "-c", rounds]).succeeded().out().parse::<f64>().expect("a number")
    };
    let (slow, fast) = (counted(&micro), counted(&small));
    if host_grants_limits() {
        assert!(slow < fast * 0.6, "micro counted {slow}, small {fast}");
    }
}

/// Whether this host lets us limit processor time at all; `doctor` says so where it does not.
fn host_grants_limits() -> bool {
    let host = Host::new();
    let report = host.json(&["doctor"]);
    let checks = report["checks"].as_array().expect("checks").clone();
    checks
        .iter()
        .any(|check| check["name"].as_str().is_some_and(|name| name.contains("cgroup")) && check["status"] == "ok")
}

#[test]
fn a_medium_sandbox_has_two_processors() {
    let host = Host::new();
    let vm = host.create(&["--size-class", "medium"]);
    assert_eq!(vm.sh("nproc").out(), "2");
}

#[test]
fn a_fork_bomb_and_a_memory_hog_leave_the_others_responsive() {
    let host = Host::new();
    let bomber = host.create(&["--name", "bomber"]);
    let hog = host.create(&["--name", "hog"]);
    let bystander = host.create(&["--name", "bystander"]);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            bomber.exec_with(&["--timeout", "25s"], &["bash", "-c", "bomb() { bomb | bomb & }; bomb; sleep 60"], b"")
        });
        let eat = "x = []\nwhile True: x.append(bytearray(1 << 20))";
        scope.spawn(|| hog.exec_with(&["--timeout", "25s"], &["python3", "-c", eat], b""));
        std::thread::sleep(Duration::from_secs(6));
        for _ in 0..3 {
            let ran = bystander.exec(&["echo", "still here"]).succeeded();
            assert_eq!(ran.out(), "still here");
            assert!(ran.took < Duration::from_secs(15), "{:?}", ran.took);
        }
        // The host, too: a new sandbox comes up meanwhile, and the attackers can be removed.
        assert_eq!(host.create(&["--name", "newcomer"]).sh("echo new").out(), "new");
        bomber.does("rm");
        hog.does("rm");
    });
    assert_eq!(bystander.sh("echo fine").out(), "fine");
    assert_eq!(leaks::machines_of(host.scratch()).len(), 2);
}

fn reserve_is_full(host: &Host) {
    eventually("there are two machines in reserve", || {
        let all = leaks::processes_of(host.scratch());
        (all.iter().filter(|process| process.is_qemu() && process.reserve).count() == 2).then_some(())
    });
}

#[test]
fn two_clones_of_one_template_share_no_secret_and_no_identity() {
    const CLONES: usize = 4;
    let host = Host::new();
    // Some come straight from the template, some from the reserve, where a command has run already.
    host.keep_reserve();
    host.create(&[]).does("rm");
    reserve_is_full(&host);
    let vms: Vec<_> = std::thread::scope(|scope| {
        let making: Vec<_> = (0..CLONES).map(|_| scope.spawn(|| host.create(&[]))).collect();
        making.into_iter().map(|made| made.join().expect("made")).collect()
    });
    let unique = |what: &str, script: &str| {
        let seen: HashSet<String> = vms.iter().map(|vm| vm.sh(script).out()).collect();
        assert_eq!(seen.len(), CLONES, "{what}: {seen:?}");
    };
    unique("urandom, first read", "head -c 32 /dev/urandom | sha256sum");
    unique("random", "head -c 32 /dev/random | sha256sum");
    unique("kernel's own UUIDs", "cat /proc/sys/kernel/random/uuid");
    unique("user space's random numbers", "python3 -c 'import secrets; print(secrets.token_hex(32))'");
    unique("machine id", "cat /etc/machine-id");
    unique("boot id", "cat /proc/sys/kernel/random/boot_id");
    unique("host name", "hostname");
    unique("network address", "hostname -I 2>/dev/null || cat /proc/net/fib_trie");
    let clock = vms[0].sh("date +%s").out().parse::<i64>().expect("seconds");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("clock").as_secs() as i64;
    assert!((clock - now).abs() <= 5, "the guest's clock is off by {} s", clock - now);
}

#[test]
fn machines_in_reserve_have_nothing_of_the_sandbox_before() {
    let host = Host::new();
    host.keep_reserve();
    host.create(&["--working-directory", "/srv/alice", "--env", "TOKEN=hunter2"]);
    reserve_is_full(&host);
    let next = host.create(&[]);
    let left = next.sh("ls -d /srv/alice; env; hostname; cat /proc/[0-9]*/environ | tr '\\0' '\\n'; true").out();
    assert!(!left.contains("alice") && !left.contains("hunter2"), "{left}");
}

/// What it translates is of the next one's use; what it ran is not there any more.
#[test]
fn a_rehearsal_leaves_nothing_behind() {
    let host = Host::new();
    host.keep_reserve();
    let app = host.web_app();
    host.deploy(&app, &WEB_FLAGS);
    reserve_is_full(&host);
    let reserved: Vec<i32> = leaks::processes_of(host.scratch()).iter().filter(|p| p.reserve).map(|p| p.pid).collect();
    let next = host.deploy(&app, &WEB_FLAGS);
    assert!(
        leaks::machines_of(host.scratch()).iter().any(|machine| reserved.contains(&machine.pid)),
        "it was in reserve"
    );
    let python = "cat /proc/[0-9]*/comm | grep -c python";
    assert_eq!(next.sh(python).out(), "1", "its own start command");
    let listening = "cat /proc/net/tcp /proc/net/tcp6 | awk '$4 == \"0A\"' | wc -l";
    assert_eq!(next.sh(listening).out(), "1", "its own port");
    let files = next.sh("ls -A /tmp /root /workspace").out();
    assert_eq!(files, "/root:\n.bashrc\n.profile\n\n/tmp:\n\n/workspace:\nweb.py");
}

#[test]
fn the_start_of_a_stopped_sandbox_is_fresh_too() {
    let host = Host::new();
    let vm = host.create(&[]);
    let before = vm.sh("head -c 32 /dev/urandom | sha256sum").out();
    vm.does("restart");
    assert_ne!(vm.sh("head -c 32 /dev/urandom | sha256sum").out(), before);
}

#[test]
fn qemu_runs_jailed() {
    let host = Host::new();
    host.create(&[]);
    let machine = leaks::machines_of(host.scratch()).pop().expect("a machine");
    let own = |kind: &str| std::fs::read_link(format!("/proc/self/ns/{kind}")).expect("namespace");
    let its = |kind: &str| std::fs::read_link(format!("/proc/{}/ns/{kind}", machine.pid)).expect("namespace");
    for kind in ["mnt", "pid", "net", "ipc", "uts"] {
        assert_ne!(own(kind), its(kind), "QEMU has a {kind} namespace of its own");
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", machine.pid)).expect("status");
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).expect("field").trim().to_owned();
    assert_ne!(field("Uid:").split_whitespace().next(), Some("0"), "an unprivileged uid");
    assert_eq!(field("CapEff:"), "0000000000000000");
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!(field("Seccomp:"), "2", "QEMU's seccomp sandbox is on");
    let root: Vec<String> = leaks::entries(std::path::Path::new(&format!("/proc/{}/root", machine.pid)))
        .filter_map(|path| path.file_name().map(|name| name.to_string_lossy().into_owned()))
        .collect();
    for outside in ["home", "root", "work", "var", "boot"] {
        assert!(!root.iter().any(|name| name == outside), "the jail's root has {outside}: {root:?}");
    }
}

#[test]
fn a_user_without_privileges_runs_sandboxes_too() {
    let host = Host::of_an_ordinary_user();
    let vm = host.deploy(&host.web_app(), &WEB_FLAGS);
    assert_eq!(vm.get("/health").status, 200);
    let machine = leaks::machines_of(host.scratch()).pop().expect("a machine");
    let status = std::fs::read_to_string(format!("/proc/{}/status", machine.pid)).expect("status");
    assert!(status.contains("CapEff:\t0000000000000000") && status.contains("Seccomp:\t2"), "{status}");
    assert_eq!(vm.does("stop")["status"], "stopped");
    assert_eq!(vm.does("start")["status"], "running");
}

#[test]
fn no_process_that_outlives_a_command_has_its_secrets() {
    const SECRETS: [&str; 5] =
        ["JWT_SECRET", "HEYO_ARCHIVE_TOKEN", "HEYVM_SERVER_SECRET", "AWS_SECRET_ACCESS_KEY", "SOME_TOKEN"];
    let host = Host::new();
    let mark = format!("secret-of-{}", uuid());
    let mut command = host.command();
    // The daemon, the egress with pasta, and a VM in its jail are all started by this one.
    command.args(["create", "--name", "box", "--size-class", "micro", "--format", "json"]);
    let made = command.envs(SECRETS.map(|name| (name, &mark))).output().expect("heyvm");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let (mut looked_at, mut programs) = (0, HashSet::new());
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        // Processes end, and some are others'.
        let Ok(environment) = std::fs::read(entry.path().join("environ")) else { continue };
        let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default().trim().to_owned();
        let found = environment.windows(mark.len()).any(|bytes| bytes == mark.as_bytes());
        assert!(!found, "{name} ({}) has the command's secrets", entry.path().display());
        looked_at += 1;
        programs.insert(name);
    }
    assert!(looked_at > 3, "{looked_at}");
    // The variant of pasta for newer processors has the name of passt.
    for expected in [&["heyvm"][..], &["pasta", "passt"], &["qemu"]] {
        let runs = |name: &String| expected.iter().any(|begin| name.starts_with(begin));
        assert!(programs.iter().any(runs), "{expected:?} is not among {programs:?}");
    }
}

fn uuid() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/uuid").expect("uuid").trim().to_owned()
}
