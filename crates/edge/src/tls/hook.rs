//! Proofs by DNS, through a program of the operator's: `PROGRAM add|remove NAME VALUE` makes or removes a TXT record.
//!
//! It returns once the name servers answer with the record. Several values may stand under one name at a time.

use std::{path::Path, process::Stdio, time::Duration};

use tokio::process::Command;

use super::TlsError;

/// How long the program may take.
const LIMIT: Duration = Duration::from_secs(300);

/// Runs the program.
pub async fn run(program: &Path, verb: &'static str, name: &str, value: &str) -> Result<(), TlsError> {
    let failed = |why: String| TlsError::Hook { program: program.to_owned(), verb, name: name.to_owned(), why };
    let running = Command::new(program)
        .args([verb, name, value])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    let ended = tokio::time::timeout(LIMIT, running.wait_with_output())
        .await
        .map_err(|_| failed(format!("it took longer than {} s", LIMIT.as_secs())))?
        .map_err(|error| failed(error.to_string()))?;
    if ended.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&ended.stderr);
    let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
    Err(failed(format!("{}: {last}", ended.status)))
}
