//! Signals that whoever started this program has it ignore: SIGINT and SIGQUIT where a shell starts it in the background,
//! SIGHUP under `nohup`. What is ignored is inherited by every program that is started from here, a guest's QEMU among
//! them, and most programs never look.

use nix::{
    libc,
    sys::signal::{SigSet, SigmaskHow, sigprocmask},
};

/// Those that a program without a terminal never meets, and one with a terminal would restart its calls on without end.
const STOPS: [libc::c_int; 3] = [libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];

/// Handles what is ignored by doing nothing, and blocks no signal: this program is disturbed as little as before, and what
/// it starts has the defaults, since a handler does not outlive `exec`. To be called before there are other threads.
pub fn pass_none_on() {
    for signal in (1..=libc::SIGRTMAX()).filter(|signal| *signal != libc::SIGPIPE && !STOPS.contains(signal)) {
        // SAFETY: an all-zero sigaction is valid, and the kernel fills it in.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: both pointers are valid or null. Numbers that glibc keeps for itself are refused, and left as they are.
        let known = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) } == 0;
        if known && action.sa_sigaction == libc::SIG_IGN {
            let handler: extern "C" fn(libc::c_int) = nothing;
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_RESTART;
            // SAFETY: the handler touches nothing.
            unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
        }
    }
    // Rust's own `Command` has its children block none; what becomes another program by itself is covered here.
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).ok();
}

extern "C" fn nothing(_: libc::c_int) {}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Set in the process that a shell has ignore signals.
    const INNER: &str = "HEYVM_TEST_IGNORES_SIGNALS";

    #[test]
    fn children_have_default_signals_where_a_shell_has_us_ignore_some() {
        if std::env::var_os(INNER).is_some() {
            let ignored = || {
                let status = Command::new("grep").args(["SigIgn", "/proc/self/status"]).output().unwrap();
                let line = String::from_utf8(status.stdout).unwrap();
                let mask = u64::from_str_radix(line.trim_start_matches("SigIgn:").trim(), 16).unwrap();
                // glibc lets nobody change the two it keeps for itself, 32 and 33.
                mask & !(0b11 << 31)
            };
            assert_ne!(ignored(), 0, "nothing was ignored to begin with");
            pass_none_on();
            assert_eq!(ignored(), 0, "{:x}", ignored());
            return;
        }
        let name = "signals::tests::children_have_default_signals_where_a_shell_has_us_ignore_some";
        let script = format!("trap '' INT QUIT HUP USR1; exec \"$0\" --exact {name}");
        let this = std::env::current_exe().unwrap();
        let output = Command::new("sh").args(["-c", &script]).arg(this).env(INNER, "1").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"));
    }
}
