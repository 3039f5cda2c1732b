//! What programs find inside a guest: limits, kernel features, the clock, a disk that is full.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use heyvm_e2e::{Host, Vm, eventually};

#[test]
fn guest_has_the_limits_and_features_of_a_desktop() {
    let host = Host::new();
    let vm = host.create(&["--size-class", "micro"]);
    let value = |name: &str| vm.sh(&format!("cat /proc/sys/{name}")).out();
    for (name, least) in [
        ("fs/inotify/max_user_watches", 524_288),
        ("fs/inotify/max_user_instances", 8192),
        ("vm/max_map_count", 1_048_576),
    ] {
        assert!(value(name).parse::<u64>().expect("a number") >= least, "{name} is {}", value(name));
    }
    assert_eq!(value("net/ipv4/ip_unprivileged_port_start"), "0");
    assert_eq!(value("net/ipv4/ping_group_range"), "0\t2147483647");

    // Programs of every user: a VPN, a FUSE file system.
    vm.sh("test \"$(stat -c %a /dev/net/tun)\" = 666 && test \"$(stat -c %a /dev/fuse)\" = 666");
    let has = vm.sh("ls /sys/module; ls -d /dev/loop-control").out();
    for module in ["bridge", "veth", "nf_tables", "nft_compat", "xt_MASQUERADE", "tcp_diag", "udp_diag", "overlay"] {
        assert!(has.lines().any(|line| line == module), "{module} is not loaded: {has}");
    }

    // A process sandbox (bwrap, rootless podman, nix) mounts a /proc of its own.
    vm.sh("unshare --user --pid --fork --map-root-user --mount-proc true");
    // Every directory of the image can be renamed, as npm and dpkg do.
    vm.sh(
        "python3 -c 'import os; os.rename(\"/usr/share/doc\", \"/usr/share/docs\")' && ls -A /usr/share/docs | head -1",
    );
    assert_eq!(vm.sh("echo $LANG").out(), "C.UTF-8");
    assert_eq!(vm.exec_with(&["--env", "LANG=C"], &["sh", "-c", "echo $LANG"], b"").succeeded().out(), "C");
}

/// Asks the guest for its time between two looks at the host's; how far it is outside of them.
fn clock_error(vm: &Vm) -> Duration {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    let before = now();
    let told = vm.sh("date +%s.%N").out();
    let after = now();
    let guest = Duration::from_secs_f64(told.parse().expect("seconds"));
    before.saturating_sub(guest).max(guest.saturating_sub(after))
}

#[test]
fn guest_clock_follows_the_hosts() {
    let host = Host::new();
    let vm = host.create(&[]);
    assert!(clock_error(&vm) < Duration::from_millis(100), "{:?}", clock_error(&vm));
    let source = vm.sh("cat /sys/devices/system/clocksource/clocksource0/current_clocksource").out();
    assert!(["tsc", "kvm-clock"].contains(&source.as_str()), "{source}");
    // As after a sleep of the host, and as after its clock was set back.
    for shift in ["-1 hour", "+1 hour"] {
        vm.sh(&format!("date -s '{shift}'"));
        eventually("the clock is the host's again", || (clock_error(&vm) < Duration::from_millis(100)).then_some(()));
    }
}

#[test]
fn guest_writes_and_reads_more_than_its_memory() {
    let host = Host::new();
    let vm = host.create(&["--size-class", "micro"]);
    // Programs and their libraries are mapped meanwhile: nothing may be killed for the file's sake.
    vm.sh("sleep 600 & echo $! > /run/pid; dd if=/dev/zero of=/root/big bs=1M count=900 && sync && cat /root/big > /dev/null");
    vm.sh("kill -0 $(cat /run/pid) && rm /root/big");
    assert_eq!(vm.sh("awk '/^oom_kill / {print $2}' /proc/vmstat").out(), "0");
    assert_eq!(vm.status(), "running");
}

/// A full disk starts, gives its files, takes no others and says why, and can be emptied.
fn starts_and_can_be_emptied(host: &Host, vm: &Vm, empty: &str) {
    vm.does("stop");
    let started = vm.does("start");
    let note = started["warnings"][0].as_str().unwrap_or_default();
    assert!(note.contains("its disk") && note.contains("heyvm resize"), "{started}");
    assert_eq!(vm.sh("cat /root/kept").out(), "kept");
    let into = host.scratch().join("out");
    host.run(&["cp", &format!("{}:/root/kept", vm.id), &into.to_string_lossy()]).succeeded();
    assert_eq!(std::fs::read_to_string(&into).expect("copied"), "kept\n");

    let large = host.scratch().join("large");
    std::fs::write(&large, vec![7; 8 << 20]).expect("a file");
    let large = large.to_string_lossy().into_owned();
    let refusal = host.refused(&["cp", &large, &format!("{}:/root/large", vm.id)]);
    assert_eq!(refusal.code, "out_of_resources", "{refusal:?}");
    assert!(refusal.message.contains("disk is full"), "{refusal:?}");
    assert!(refusal.hint.contains("heyvm resize"), "{refusal:?}");

    vm.sh(empty);
    host.run(&["cp", &large, &format!("{}:/root/large", vm.id)]).succeeded();
    vm.does("stop");
    assert_eq!(vm.does("start")["warnings"], serde_json::Value::Null, "it has room again");
    assert_eq!(vm.sh("stat -c %s /root/large").out(), (8 << 20).to_string());
}

#[test]
fn full_disk_starts_and_can_be_emptied() {
    let host = Host::new();
    let vm = host.create(&["--size-class", "micro", "--disk-size-gb", "1"]);
    let fill = "import os
open('/root/kept', 'w').write('kept\\n')
fd = os.open('/fill', os.O_CREAT | os.O_RDWR)
n = 0
for step in (64 << 20, 1 << 20, 4096):
    try:
        while True:
            os.posix_fallocate(fd, n, step)
            n += step
    except OSError as e:
        pass
i = 0
try:
    while True:
        open(f'/root/{i}', 'w').write('x' * 4096)
        i += 1
except OSError as e:
    print(e)
";
    assert!(vm.exec(&["python3", "-c", fill]).succeeded().out().contains("No space left"));
    starts_and_can_be_emptied(&host, &vm, "rm /fill");
}

#[test]
fn disk_without_inodes_starts_and_can_be_emptied() {
    let host = Host::new();
    // 65 536 files: with a whole processor it takes less of the test's time.
    let vm = host.create(&["--size-class", "small", "--disk-size-gb", "1"]);
    let fill = "import os
open('/root/kept', 'w').write('kept\\n')
i = 0
try:
    while True:
        os.makedirs(f'/root/many/{i}')
        for k in range(1000):
            os.mknod(f'/root/many/{i}/{k}')
        i += 1
except OSError as e:
    print(e)
";
    assert!(vm.exec(&["python3", "-c", fill]).succeeded().out().contains("No space left"));
    starts_and_can_be_emptied(&host, &vm, "rm -r /root/many");
}
