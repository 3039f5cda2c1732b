//! A secret that is typed, or comes on standard input: never shown, never an argument.

use std::io::{self, BufRead, IsTerminal};

/// Reads one line. On a terminal the prompt is shown and what is typed is not.
pub fn read(prompt: &str) -> io::Result<String> {
    if io::stdin().is_terminal() {
        return rpassword::prompt_password(prompt);
    }
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}
