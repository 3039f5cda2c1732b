//! `--tty`: this terminal becomes the command's.

use std::{
    collections::BTreeMap,
    io::{self, IsTerminal},
};

use heyvm_api::{ApiError, ErrorCode, exec::PtySize};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// Where there is no terminal to ask.
const USUAL: PtySize = PtySize { cols: 80, rows: 24 };

/// While it lives, keys go to the command as they are: Ctrl-C is a byte.
pub struct Raw {
    before: Termios,
}

impl Raw {
    /// `None` where standard input is no terminal.
    pub fn enter() -> Result<Option<Self>, ApiError> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let failed = |errno: nix::Error| {
            ApiError::new(ErrorCode::InvalidArgument, format!("the terminal cannot be used: {errno}"))
                .hint("leave out --tty")
        };
        let before = tcgetattr(io::stdin()).map_err(failed)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw).map_err(failed)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.before).ok();
    }
}

/// This terminal's size.
pub fn size() -> PtySize {
    terminal_size::terminal_size().map_or(USUAL, |(columns, rows)| PtySize { cols: columns.0, rows: rows.0 })
}

/// The environment with this terminal's kind, unless another one was asked for.
pub fn with_kind(mut env: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let kind = std::env::var("TERM").unwrap_or_else(|_| "xterm".into());
    env.entry("TERM".into()).or_insert(kind);
    env
}
