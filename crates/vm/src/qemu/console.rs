//! The guest's console: its last lines, fit to be shown, and what they say about a guest's end.

use super::qmp::{Ended, Qmp};
use crate::{Exit, ExitCause};

/// Lines that are kept.
const LINES: usize = 30;
/// Characters of a line that are kept.
const LINE_LENGTH: usize = 300;
/// What the kernel prints first when it panics.
const PANIC: &str = "Kernel panic";

/// The last lines; empty where QEMU does not answer.
pub async fn tail(qmp: &Qmp) -> Vec<String> {
    lines(&whole(qmp).await)
}

async fn whole(qmp: &Qmp) -> String {
    qmp.console().await.unwrap_or_else(|error| {
        tracing::warn!(%error, "a guest's console could not be read");
        String::new()
    })
}

/// Judges the end of a guest whose QEMU reports it as ended.
pub async fn judge(qmp: &Qmp, ended: Ended) -> Exit {
    judged(&whole(qmp).await, ended)
}

/// Whether a panic stands in it, or its words.
pub fn shows_panic(console: &str) -> bool {
    console.contains(PANIC)
}

/// A panic is shown from its first line on: registers and the like that follow would push it out of the last lines.
fn judged(console: &str, ended: Ended) -> Exit {
    let Some(at) = console.find(PANIC) else {
        let cause = match ended {
            Ended::Shutdown => ExitCause::GuestShutdown,
            Ended::Panicked => ExitCause::GuestPanic,
            Ended::Unrunnable => ExitCause::Unrunnable,
            Ended::Halted => ExitCause::GuestHalted,
        };
        return Exit { cause, console_tail: lines(console) };
    };
    let begin = console[..at].rfind('\n').map_or(0, |end| end + 1);
    let mut console_tail = tamed(&console[begin..]);
    console_tail.truncate(LINES);
    Exit { cause: ExitCause::GuestPanic, console_tail }
}

/// The last lines.
pub fn lines(text: &str) -> Vec<String> {
    let mut lines = tamed(text);
    lines.split_off(lines.len().saturating_sub(LINES))
}

/// The guest writes it: control characters go, lengths are bounded.
fn tamed(text: &str) -> Vec<String> {
    text.lines()
        .map(|line| line.chars().filter(|c| !c.is_control()).take(LINE_LENGTH).collect::<String>())
        .filter(|line| !line.trim().is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_known_however_much_follows_it() {
        let console = format!("booting\n[ 1.0] Kernel panic - not syncing: no\n{}", "R15: 0\n".repeat(100));
        let exit = judged(&console, Ended::Shutdown);
        assert_eq!((exit.cause, exit.console_tail.len()), (ExitCause::GuestPanic, LINES));
        assert!(exit.console_tail[0].starts_with("[ 1.0] Kernel panic"));
        assert_eq!(judged("reboot: Power down\n", Ended::Shutdown).cause, ExitCause::GuestShutdown);
        assert_eq!(judged("running\n", Ended::Unrunnable).cause, ExitCause::Unrunnable);
    }

    #[test]
    fn what_a_guest_prints_is_tamed() {
        let text = format!("\x1b[31mred\r\n\n{}\n{}", "x".repeat(1000), "last\n".repeat(LINES - 1));
        let lines = lines(&text);
        assert_eq!(lines.len(), LINES);
        assert_eq!(lines[0].len(), LINE_LENGTH);
        assert!(!lines.iter().any(|line| line.contains('\x1b')));
    }
}
