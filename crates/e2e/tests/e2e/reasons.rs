//! Why a sandbox ended is always readable.

use heyvm_e2e::{Host, Vm, leaks};
use nix::sys::signal::Signal;
use serde_json::Value;

/// The reason that `get` and `list --all` give, which must be the same.
fn reason(vm: &Vm<'_>, status: &str) -> Value {
    // Filling the memory takes ten seconds on an idle host, and its share of a busy one is small.
    let reason = vm.becomes(status);
    assert!(reason["message"].as_str().is_some_and(|text| !text.is_empty()), "{reason}");
    let listed = vm.host.list(&["--all"]).into_iter().find(|sandbox| sandbox["id"] == vm.made["id"]).expect("listed");
    assert_eq!(listed["reason"]["code"], reason["code"]);
    assert_eq!(listed["error_message"], reason["message"]);
    reason
}

fn tail(reason: &Value) -> String {
    reason["log_tail"].as_array().into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_start_command_exited_with_a_status() {
    let host = Host::new();
    let vm = host.create(&["--start-command", "echo last words; sleep 3; exit 23"]);
    let reason = reason(&vm, "failed");
    assert_eq!((&reason["code"], &reason["exit_code"]), (&"start_command_exited".into(), &23.into()), "{reason}");
    assert!(tail(&reason).contains("last words"), "{reason}");
    assert_eq!(leaks::machines_of(host.scratch()).len(), 0, "no machine without a purpose");
    assert_eq!(vm.does("start")["status"], "running", "the disk is kept: start goes on from it");
}

#[test]
fn out_of_memory() {
    let host = Host::new();
    let hog = "echo eating; sleep 2; exec python3 -c 'x = []\nwhile True: x.append(bytes([1]) * (1 << 20))'";
    let vm = host.create(&["--start-command", hog]);
    let reason = reason(&vm, "failed");
    assert_eq!(reason["code"], "out_of_memory", "{reason}");
    assert!(tail(&reason).contains("eating"), "{reason}");
}

#[test]
fn the_guest_kernel_panicked() {
    let host = Host::new();
    let vm = host.create(&[]);
    // The command dies with its machine; how its call ends does not matter.
    vm.exec(&["sh", "-c", "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger"]);
    let reason = reason(&vm, "failed");
    assert_eq!(reason["code"], "guest_panic", "{reason}");
    assert!(tail(&reason).to_lowercase().contains("panic"), "the console's last lines: {reason}");
}

/// QEMU counts such a guest as running.
#[test]
fn guest_that_halted_is_failed_and_its_calls_end() {
    let host = Host::new();
    let vm = host.create(&["--start-command", "exec sleep 600"]);
    let halt = "import ctypes; ctypes.CDLL(None).syscall(169, 0xfee1dead, 672274793, 0xcdef0123, 0)";
    let refusal = host.refused(&["exec", &vm.id, "--", "python3", "-c", halt]);
    assert_eq!(refusal.code, "sandbox_unreachable", "{refusal:?}");
    let reason = reason(&vm, "failed");
    assert_eq!(reason["code"], "guest_halted", "{reason}");
    assert!(tail(&reason).contains("System halted"), "the console's last lines: {reason}");
    assert_eq!(vm.does("start")["status"], "running");
}

/// `kernel.panic = 0`: the kernel prints its panic and loops.
#[test]
fn panic_without_a_reset_is_noticed() {
    let host = Host::new();
    let vm = host.create(&[]);
    vm.exec(&["sh", "-c", "echo 0 > /proc/sys/kernel/panic; echo c > /proc/sysrq-trigger"]);
    let reason = reason(&vm, "failed");
    assert_eq!(reason["code"], "guest_panic", "{reason}");
    assert!(tail(&reason).to_lowercase().contains("panic"), "the console's last lines: {reason}");
}

#[test]
fn the_guest_powered_itself_off() {
    let host = Host::new();
    let vm = host.create(&[]);
    let off = "echo 1 > /proc/sys/kernel/sysrq; echo o > /proc/sysrq-trigger; sleep 5";
    let refusal = host.refused(&["exec", &vm.id, "--", "sh", "-c", off]);
    assert_eq!(refusal.code, "sandbox_unreachable");
    assert!(refusal.message.contains("powered itself off"), "whose command it was is told why: {refusal:?}");
    assert_eq!(reason(&vm, "stopped")["code"], "guest_shutdown");
}

/// What a restart of the host leaves: no process, and records of a boot that is over.
#[test]
fn the_host_was_restarted() {
    let host = Host::new();
    let vm = host.create(&[]);
    host.end_daemon(Signal::SIGKILL);
    host.kill_machines();
    let path = host.home.join("sandboxes").join(&vm.id).join("vm.json");
    let mut record: Value = serde_json::from_slice(&std::fs::read(&path).expect("record")).expect("JSON");
    record["host_boot_id"] = "00000000-0000-0000-0000-000000000000".into();
    std::fs::write(&path, record.to_string()).expect("record");
    assert_eq!(reason(&vm, "stopped")["code"], "host_restarted");
    vm.does("start");
    assert_eq!(vm.sh("echo alive").out(), "alive");
}

#[test]
fn the_machine_was_killed_from_outside() {
    let host = Host::new();
    let vm = host.create(&[]);
    host.kill_machines();
    assert_eq!(reason(&vm, "failed")["code"], "vm_lost");
    assert_eq!(vm.does("start")["status"], "running");
}

#[test]
fn stopped_and_removed() {
    let host = Host::new();
    let vm = host.create(&["--start-command", "echo serving; exec sleep 600"]);
    vm.does("stop");
    assert_eq!(reason(&vm, "stopped")["code"], "stopped");
    vm.does("rm");
    assert_eq!(reason(&vm, "removed")["code"], "removed");
}
