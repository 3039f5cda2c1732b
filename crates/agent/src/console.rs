//! The guest's console: the one place where the agent speaks without being asked.

use std::{fmt, fs::File, io::Write, sync::OnceLock};

static CONSOLE: OnceLock<File> = OnceLock::new();

/// Has later messages go to `file`; without it they go to standard error.
pub fn open(file: File) {
    CONSOLE.set(file).ok();
}

/// Writes one line; a console that cannot be written to is nobody's concern.
pub fn say(message: fmt::Arguments<'_>) {
    let line = format!("heyvm-agent: {message}\n");
    match CONSOLE.get() {
        Some(mut console) => console.write_all(line.as_bytes()),
        None => std::io::stderr().write_all(line.as_bytes()),
    }
    .ok();
}

/// A panic ends the task it happened in, never the agent; it is told here.
pub fn report_panics() {
    std::panic::set_hook(Box::new(|panic| say(format_args!("{panic}"))));
}
