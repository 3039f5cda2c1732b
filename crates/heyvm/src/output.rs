//! Standard output carries the answer, standard error everything else.

use std::io::{self, Write};

use clap::ValueEnum;
use heyvm_api::{ApiError, ErrorCode};
use serde::Serialize;

/// For people or for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// For programs: exactly one JSON document.
    Json,
}

/// The one JSON document.
pub fn json(value: &impl Serialize) {
    let text = serde_json::to_string_pretty(value).unwrap_or_default();
    line(&text);
}

/// A line of text. A reader that has gone away ends the program quietly.
pub fn line(text: &str) {
    bytes(text.as_bytes());
    bytes(b"\n");
}

/// Bytes as they are.
pub fn bytes(bytes: &[u8]) {
    let mut out = io::stdout().lock();
    if let Err(failure) = out.write_all(bytes).and_then(|()| out.flush()) {
        std::process::exit(cannot_write(&failure).unwrap_or_else(|failed| {
            error(Format::Text, &failed);
            1
        }));
    }
}

/// Exit status of a program whose reader has gone away, as a shell gives it for SIGPIPE.
pub const PIPE_CLOSED: i32 = 141;

/// The exit status, or the error, when standard output takes no more.
pub fn cannot_write(failure: &io::Error) -> Result<i32, ApiError> {
    if failure.kind() == io::ErrorKind::BrokenPipe {
        return Ok(PIPE_CLOSED);
    }
    Err(ApiError::new(ErrorCode::OutOfResources, format!("standard output cannot be written to: {failure}"))
        .hint("make room where it goes"))
}

/// The JSON document, or the text.
pub fn answer(format: Format, value: &impl Serialize, text: impl FnOnce() -> String) {
    match format {
        Format::Json => json(value),
        Format::Text => {
            let text = text();
            if !text.is_empty() {
                line(printable(&text).trim_end());
            }
        }
    }
}

/// An error, on standard error.
pub fn error(format: Format, error: &ApiError) {
    let text = match format {
        Format::Json => serde_json::json!({"error": error}).to_string(),
        Format::Text => {
            let mut text = format!("error: {}", printable(&error.message));
            for line in &error.log_tail {
                text.push_str(&format!("\n  | {}", printable(line)));
            }
            if let Some(hint) = &error.hint {
                text.push_str(&format!("\nhint: {}", printable(hint)));
            }
            text
        }
    };
    writeln!(io::stderr().lock(), "{text}").ok();
}

/// A guest's words as they can be shown: without what would steer a terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && !"\n\t".contains(c) { '\u{fffd}' } else { c }).collect()
}

/// Something to know beside the answer.
pub fn note(text: &str) {
    writeln!(io::stderr().lock(), "note: {}", printable(text)).ok();
}

/// Columns as wide as their widest cell.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: Vec<&str>| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        padded.join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(head.to_vec())];
    lines.extend(rows.iter().map(|row| line(row.iter().map(String::as_str).collect())));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [vec!["a".into(), "long cell".into(), "x".into()], vec!["bbb".into(), "-".into(), String::new()]];
        assert_eq!(table(&["N", "WHAT", "C"], &rows), "N    WHAT       C\na    long cell  x\nbbb  -");
    }

    #[test]
    fn a_guest_cannot_steer_the_terminal() {
        assert_eq!(printable("\u{1b}[2Jgone\tok\n\u{9b}"), "\u{fffd}[2Jgone\tok\n\u{fffd}");
    }
}
