//! Disks that grow, sandboxes of another size, and disks to go back to.

use heyvm_e2e::{Host, Vm};

/// GiB of the file system that the sandbox's root is written to.
fn disk_gib(vm: &Vm) -> f64 {
    let kib: f64 = vm.sh("df -k --output=size / | tail -1").out().trim().parse().expect("a number");
    kib / f64::from(1 << 20)
}

#[test]
fn a_disk_grows_while_the_sandbox_runs_and_while_it_is_stopped() {
    let host = Host::new();
    let vm = host.create(&["--size-class", "micro", "--disk-size-gb", "1"]);
    vm.sh("echo precious > /workspace/kept; sleep 600 & echo $! > /run/pid");
    assert!(disk_gib(&vm) < 1.0);
    let told = host.json(&["resize", &vm.id, "--disk-size-gb", "3"]);
    assert_eq!(told["disk_size_gb"], 3);
    assert!((2.7..3.0).contains(&disk_gib(&vm)), "{}", disk_gib(&vm));
    // More than there was before, and what ran runs on.
    vm.sh("kill -0 $(cat /run/pid) && fallocate -l 1500000000 /workspace/large && sync");
    assert_eq!(host.refused(&["resize", &vm.id, "--disk-size-gb", "2"]).code, "invalid_state");
    assert_eq!(host.refused(&["resize", &vm.id, "--disk-size-gb", "251"]).code, "invalid_argument");

    vm.does("stop");
    host.json(&["resize", &vm.id, "--disk-size-gb", "5"]);
    vm.does("start");
    assert!((4.6..5.0).contains(&disk_gib(&vm)), "{}", disk_gib(&vm));
    assert_eq!(vm.sh("cat /workspace/kept; stat -c %s /workspace/large").out(), "precious\n1500000000");
}

#[test]
fn a_disk_of_the_usual_size_grows_to_the_largest_there_is() {
    let host = Host::new();
    let vm = host.create(&[]);
    assert_eq!(vm.made["disk_size_gb"], 10);
    for gib in [11, 250] {
        host.json(&["resize", &vm.id, "--disk-size-gb", &gib.to_string()]);
        let share = disk_gib(&vm) / f64::from(gib);
        assert!((0.95..1.0).contains(&share), "{share} of {gib} GB");
    }
    vm.sh("echo kept > /workspace/kept");
    vm.does("stop");
    vm.does("start");
    assert_eq!(vm.sh("cat /workspace/kept").out(), "kept");
    assert!(disk_gib(&vm) > 240.0, "{}", disk_gib(&vm));
}

#[test]
fn another_size_class_keeps_the_disk_and_runs_the_start_command_again() {
    let host = Host::new();
    let start = "date +%s.%N >> /workspace/starts; exec sleep 600";
    let vm = host.create(&["--size-class", "micro", "--start-command", start]);
    let memory = |vm: &Vm| vm.sh("awk '/MemTotal/ {print $2}' /proc/meminfo").out().trim().parse::<u64>().unwrap();
    let before = memory(&vm);
    let told = host.json(&["resize", &vm.id, "--size-class", "mini"]);
    assert_eq!((&told["status"], &told["size_class"]), (&"running".into(), &"mini".into()));
    assert!(memory(&vm) > before * 3 / 2, "{} after {before}", memory(&vm));
    assert_eq!(vm.sh("wc -l < /workspace/starts").out().trim(), "2");
}

#[test]
fn a_disk_comes_back_as_it_was_at_the_checkpoint() {
    let host = Host::new();
    let vm = host.create(&["--size-class", "micro", "--disk-size-gb", "1"]);
    assert_eq!(host.refused(&["restore", &vm.id]).code, "invalid_state");
    // Nothing is synced: the checkpoint is to see to it. And something writes all the while.
    vm.sh("head -c 30000000 /dev/urandom > /workspace/data; sha256sum /workspace/data > /workspace/sum");
    vm.sh("(while :; do date +%N >> /workspace/log; done) >/dev/null 2>&1 & echo $! > /run/pid");
    let kept = host.json(&["checkpoint", &vm.id]);
    assert!(kept["checkpoint_at"].is_string() && kept["status"] == "running", "{kept}");
    let copy = host.home.join("sandboxes").join(vm.made["id"].as_str().unwrap()).join("checkpoint.ext4");
    let check = std::process::Command::new("e2fsck").args(["-fn"]).arg(&copy).output().unwrap();
    assert!(check.status.success(), "a frozen disk is clean: {}", String::from_utf8_lossy(&check.stdout));
    // The guest writes on.
    vm.sh("kill -0 $(cat /run/pid); before=$(stat -c %s /workspace/log); sleep 1; test $(stat -c %s /workspace/log) -gt $before");

    vm.sh("kill $(cat /run/pid); rm -r /workspace/data; echo later > /workspace/later");
    let restored = host.json(&["restore", &vm.id]);
    assert_eq!(restored["status"], "running");
    vm.sh("cd /workspace && sha256sum -c sum && test ! -e later");
    // It can be gone back to again, also from a stopped sandbox, and to a larger disk.
    host.json(&["resize", &vm.id, "--disk-size-gb", "2"]);
    vm.does("stop");
    assert_eq!(host.json(&["restore", &vm.id])["status"], "running");
    vm.sh("cd /workspace && sha256sum -c sum");
    assert!(disk_gib(&vm) > 1.7, "{}", disk_gib(&vm));
}
