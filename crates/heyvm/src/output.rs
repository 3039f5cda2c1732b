//! Standard output carries the answer, standard error everything else.

use std::io::{self, Write};

use clap::ValueEnum;
use heyvm_api::{ApiError, error::ErrorBody};
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
    let mut out = io::stdout().lock();
    if writeln!(out, "{text}").and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

/// The JSON document, or the text.
pub fn answer(format: Format, value: &impl Serialize, text: impl FnOnce() -> String) {
    match format {
        Format::Json => json(value),
        Format::Text => {
            let text = text();
            if !text.is_empty() {
                line(text.trim_end());
            }
        }
    }
}

/// An error, on standard error.
pub fn error(format: Format, error: &ApiError) {
    let text = match format {
        Format::Json => serde_json::to_string(&ErrorBody { error: error.clone() }).unwrap_or_default(),
        Format::Text => {
            let mut text = format!("error: {}", error.message);
            for line in &error.log_tail {
                text.push_str(&format!("\n  | {line}"));
            }
            if let Some(hint) = &error.hint {
                text.push_str(&format!("\nhint: {hint}"));
            }
            text
        }
    };
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Something to know beside the answer.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "note: {text}");
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
