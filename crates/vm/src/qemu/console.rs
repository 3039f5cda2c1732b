//! The guest's console: its last lines, fit to be shown, and what they say about a guest's end.

use super::{machine::CONSOLE_BYTES, qmp::Qmp};
use crate::{Exit, ExitCause};

/// Lines that are kept.
const LINES: usize = 30;
/// Characters of a line that are kept.
const LINE_LENGTH: usize = 300;
/// What the kernel prints first when it panics.
const PANIC: &str = "Kernel panic";

/// The last lines; empty where QEMU does not answer.
pub async fn tail(qmp: &Qmp) -> Vec<String> {
    qmp.console(CONSOLE_BYTES).await.map(|text| lines(&text)).unwrap_or_default()
}

/// How a guest ended that QEMU says has ended.
pub async fn judge(qmp: &Qmp) -> Exit {
    let console_tail = tail(qmp).await;
    let panicked = console_tail.iter().any(|line| line.contains(PANIC));
    Exit { cause: if panicked { ExitCause::GuestPanic } else { ExitCause::GuestShutdown }, console_tail }
}

/// The guest writes it: control characters go, lengths are bounded.
pub fn lines(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = text
        .lines()
        .map(|line| line.chars().filter(|c| !c.is_control()).take(LINE_LENGTH).collect::<String>())
        .filter(|line| !line.trim().is_empty())
        .collect();
    lines.split_off(lines.len().saturating_sub(LINES))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_prints_is_tamed() {
        let text = format!("\x1b[31mred\r\n\n{}\n{}", "x".repeat(1000), "last\n".repeat(LINES - 1));
        let lines = lines(&text);
        assert_eq!(lines.len(), LINES);
        assert_eq!(lines[0].len(), LINE_LENGTH);
        assert!(!lines.iter().any(|line| line.contains('\x1b')));
    }
}
