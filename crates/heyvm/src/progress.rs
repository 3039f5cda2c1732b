//! What a long call is doing, on a terminal, once it takes more than a second.

use std::{io::IsTerminal, time::Duration};

use heyvm_api::system::ProgressEvent;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::time::Instant;

/// Shorter calls show nothing.
const PATIENCE: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_millis(120);

/// A line on standard error; nothing of it where that is no terminal.
pub struct Progress {
    bar: ProgressBar,
    since: Instant,
}

impl Progress {
    /// Nothing is shown yet.
    pub fn new() -> Self {
        Self { bar: ProgressBar::hidden(), since: Instant::now() }
    }

    /// Shows what is being done.
    pub fn tell(&mut self, event: &ProgressEvent) {
        if !std::io::stderr().is_terminal() {
            return;
        }
        if self.bar.is_hidden() && self.since.elapsed() > PATIENCE {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
            self.bar.enable_steady_tick(TICK);
        }
        if let (Some(done), Some(total)) = (event.done, event.total) {
            self.bar.set_length(total);
            self.bar.set_position(done);
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {bytes}/{total_bytes}") {
                self.bar.set_style(style);
            }
        } else {
            self.bar.set_style(ProgressStyle::default_spinner());
        }
        self.bar.set_message(event.message.clone());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
