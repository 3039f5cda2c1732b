//! What a long call is doing, on a terminal, once it takes more than a second.

use std::{
    convert::Infallible,
    io::{IsTerminal, Write},
    sync::{
        Arc, Mutex,
        mpsc::{self, RecvTimeoutError, Sender},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use heyvm_api::system::ProgressEvent;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Shorter calls show nothing.
const PATIENCE: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_millis(120);

/// A line on standard error while this lives; nothing of it where that is no terminal.
pub struct Progress {
    line: Line,
    /// Draws the line in time, whether or not there is news by then; ends at once when the sender goes.
    waiting: Option<(Sender<Infallible>, JoinHandle<()>)>,
}

/// What stands on the line; may be written by whoever does the work.
#[derive(Clone)]
pub struct Line {
    bar: ProgressBar,
    /// Where what commands print goes, above the line; nowhere for programs, whose standard error is for errors.
    output: Option<Arc<Mutex<dyn Write + Send>>>,
}

impl Progress {
    /// Something begins. Nothing is shown yet.
    pub fn new(message: impl Into<String>) -> Self {
        Self::with_output(message.into(), None)
    }

    /// As [`Self::new`]; what commands in the sandbox print meanwhile goes to standard error as well.
    pub fn streaming(message: impl Into<String>) -> Self {
        Self::with_output(message.into(), Some(Arc::new(Mutex::new(std::io::stderr()))))
    }

    fn with_output(message: String, output: Option<Arc<Mutex<dyn Write + Send>>>) -> Self {
        let line = Line { bar: ProgressBar::hidden(), output };
        match std::io::stderr().is_terminal() {
            true => Self::after(PATIENCE, ProgressDrawTarget::stderr(), message, line),
            false => Self { line, waiting: None },
        }
    }

    fn after(patience: Duration, target: ProgressDrawTarget, message: String, line: Line) -> Self {
        line.tell(&ProgressEvent::new("", message));
        let (sender, receiver) = mpsc::channel::<Infallible>();
        let shown = line.bar.clone();
        let waiting = thread::spawn(move || {
            if receiver.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
                shown.set_draw_target(target);
                shown.enable_steady_tick(TICK);
            }
        });
        Self { line, waiting: Some((sender, waiting)) }
    }

    /// The line, for others to write on.
    pub fn line(&self) -> Line {
        self.line.clone()
    }

    /// Says what is being done.
    pub fn tell(&self, event: &ProgressEvent) {
        self.line.tell(event);
    }
}

impl Line {
    /// Says what is being done, or passes on what a command printed.
    pub fn tell(&self, event: &ProgressEvent) {
        if event.stream.is_some() {
            return self.print(&event.message);
        }
        let template = match (event.done, event.total) {
            (Some(_), Some(_)) => "{spinner} {elapsed} {msg} {bytes}/{total_bytes}",
            (Some(_), None) => "{spinner} {elapsed} {msg} {bytes}",
            (None, _) => "{spinner} {elapsed} {msg}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style);
        }
        if let Some(total) = event.total {
            self.bar.set_length(total);
        }
        if let Some(done) = event.done {
            self.bar.set_position(done);
        }
        self.bar.set_message(event.message.clone());
    }

    fn print(&self, text: &str) {
        let Some(output) = &self.output else { return };
        self.bar.suspend(|| {
            let mut output = output.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            // A standard error that is closed takes nothing from the command.
            writeln!(output, "{text}").ok();
        });
    }

    /// Says how many bytes have been moved, where nobody knows how many there are.
    pub fn moved(&self, message: &str, done: u64) {
        self.tell(&ProgressEvent { done: Some(done), ..ProgressEvent::new("", message) });
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        // Waited for, so that nothing is drawn behind what the command prints next.
        if let Some((sender, waiting)) = self.waiting.take() {
            drop(sender);
            waiting.join().ok();
        }
        self.line.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use std::{io, time::Instant};

    use indicatif::TermLike;

    use super::*;

    /// Keeps all that was ever drawn.
    #[derive(Debug, Clone, Default)]
    struct Screen(Arc<Mutex<String>>);

    impl Screen {
        fn drawn(&self) -> String {
            self.0.lock().unwrap().clone()
        }
    }

    impl TermLike for Screen {
        fn width(&self) -> u16 {
            80
        }
        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn write_line(&self, text: &str) -> io::Result<()> {
            self.write_str(text)
        }
        fn write_str(&self, text: &str) -> io::Result<()> {
            self.0.lock().unwrap().push_str(text);
            Ok(())
        }
        fn clear_line(&self) -> io::Result<()> {
            Ok(())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    fn progress(patience: Duration) -> (Progress, Screen) {
        let screen = Screen::default();
        let target = ProgressDrawTarget::term_like(Box::new(screen.clone()));
        let line = Line { bar: ProgressBar::hidden(), output: None };
        (Progress::after(patience, target, "packing".into(), line), screen)
    }

    fn event(message: &str) -> ProgressEvent {
        ProgressEvent::new("", message)
    }

    fn comes(screen: &Screen, text: &str) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !screen.drawn().contains(text) {
            assert!(Instant::now() < deadline, "no {text:?} in {:?}", screen.drawn());
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn what_was_told_early_shows_when_it_takes_long_without_more_news() {
        let (progress, screen) = progress(Duration::from_millis(300));
        progress.tell(&event("npm ci"));
        assert_eq!(screen.drawn(), "");
        comes(&screen, "npm ci");
        progress.line().moved("copying", 5 << 20);
        comes(&screen, "copying 5.00 MiB");
    }

    #[test]
    fn what_begins_shows_though_nothing_is_told_at_all() {
        let (_progress, screen) = progress(Duration::ZERO);
        comes(&screen, "packing");
    }

    #[test]
    fn output_is_passed_on_at_once_with_a_terminal_and_without() {
        let printed = Arc::new(Mutex::new(Vec::<u8>::new()));
        let line =
            Line { bar: ProgressBar::hidden(), output: Some(Arc::clone(&printed) as Arc<Mutex<dyn Write + Send>>) };
        let output = ProgressEvent { stream: Some("stdout".into()), ..event("added 3 packages") };
        let quiet = Progress { line: line.clone(), waiting: None };
        quiet.tell(&event("npm ci"));
        quiet.tell(&output);
        let screen = Screen::default();
        let target = ProgressDrawTarget::term_like(Box::new(screen.clone()));
        let drawn = Progress::after(Duration::ZERO, target, "npm ci".into(), line);
        comes(&screen, "npm ci");
        drawn.tell(&output);
        assert_eq!(String::from_utf8(printed.lock().unwrap().clone()).unwrap(), "added 3 packages\n".repeat(2));
    }

    #[test]
    fn what_is_short_shows_nothing_and_is_not_held_up() {
        let (progress, screen) = progress(Duration::from_secs(60));
        let line = progress.line();
        let since = Instant::now();
        drop(progress);
        line.tell(&event("late news"));
        assert!(since.elapsed() < Duration::from_secs(10));
        assert_eq!(screen.drawn(), "");
    }
}
