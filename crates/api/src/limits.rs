//! Sizes and counts that a request may have. This is the whole table: the servers check by it, the OpenAPI documents and
//! docs/api.md show it.

use crate::{ApiError, ErrorCode, names, sandbox::CreateRequest, start_command::StartCommand};

/// One limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// What is limited, by its field where it has one.
    pub name: &'static str,
    /// The most there may be.
    pub most: usize,
    /// What is counted.
    pub unit: Unit,
    /// What to do instead, as an imperative.
    pub hint: &'static str,
}

/// What a limit counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Bytes of text.
    Bytes,
    /// Entries of a list or a map.
    Entries,
}

/// Entries of `env_vars`.
pub const ENV_VARS: Limit = entries("env_vars", 1024, "put more into a file and upload it");
/// Names and values of `env_vars` together, each with its `=` and its end.
pub const ENV_BYTES: Limit = bytes("env_vars together", 128 << 10, "put large values into a file and upload it");
/// Entries of `setup_hooks`.
pub const HOOKS: Limit = entries("setup_hooks", 32, "put the commands into a script of the archive");
/// All of `setup_hooks`.
pub const HOOK_BYTES: Limit = bytes("setup_hooks together", 128 << 10, "put the commands into a script of the archive");
/// `start_command`, and each of `setup_hooks`.
pub const COMMAND: Limit = bytes("a start_command or setup_hook", 64 << 10, "put it into a script of the archive");
/// Bound ports of a sandbox.
pub const PORTS: Limit = entries("ports of a sandbox", 32, "unbind a port, or proxy within the sandbox");
/// `mounts`.
pub const MOUNTS: Limit = entries("mounts", 16, "mount a directory that holds several");
/// `image`.
pub const IMAGE: Limit = bytes("image", 1024, "use NAME:TAG or NAME@DIGEST");
/// `working_directory`, `health_path`, `archive_root`.
pub const PATH: Limit = bytes("a path", 4096, "use a shorter path");
/// `name` and `slug`.
pub const NAME: Limit = bytes("name and slug", names::MAX_NAME, "use a shorter name");
/// The header `Idempotency-Key`.
pub const IDEMPOTENCY_KEY: Limit = bytes("Idempotency-Key", 255, "use a shorter key, a UUID for example");
/// One page of a list.
pub const PAGE: Limit = entries("limit of a list", 500, "ask for the next page with `cursor`");

/// Every limit.
pub const ALL: [Limit; 12] =
    [NAME, ENV_VARS, ENV_BYTES, HOOKS, HOOK_BYTES, COMMAND, PORTS, MOUNTS, IMAGE, PATH, IDEMPOTENCY_KEY, PAGE];

const fn bytes(name: &'static str, most: usize, hint: &'static str) -> Limit {
    Limit { name, most, unit: Unit::Bytes, hint }
}

const fn entries(name: &'static str, most: usize, hint: &'static str) -> Limit {
    Limit { name, most, unit: Unit::Entries, hint }
}

impl Limit {
    /// Refuses more than the limit with `limit_exceeded`.
    pub fn check(&self, found: usize) -> Result<(), ApiError> {
        if found <= self.most {
            return Ok(());
        }
        let unit = match self.unit {
            Unit::Bytes => " bytes",
            Unit::Entries => "",
        };
        let message = format!("{}: {found}{unit} are more than the limit of {}", self.name, self.shown());
        Err(ApiError::new(ErrorCode::LimitExceeded, message).hint(self.hint))
    }

    /// The most there may be, in words.
    pub fn shown(&self) -> String {
        match self.unit {
            Unit::Bytes if self.most.is_multiple_of(1 << 10) => format!("{} KiB", self.most >> 10),
            Unit::Bytes => format!("{} bytes", self.most),
            Unit::Entries => self.most.to_string(),
        }
    }
}

/// Checks everything in a create request whose size a client chooses.
pub fn check_create(request: &CreateRequest) -> Result<(), ApiError> {
    ENV_VARS.check(request.env_vars.len())?;
    ENV_BYTES.check(request.env_vars.iter().map(|(name, value)| name.len() + value.len() + 2).sum())?;
    HOOKS.check(request.setup_hooks.len())?;
    HOOK_BYTES.check(request.setup_hooks.iter().map(String::len).sum())?;
    for size in
        request.setup_hooks.iter().map(String::len).chain(request.start_command.as_ref().map(StartCommand::size))
    {
        COMMAND.check(size)?;
    }
    PORTS.check(request.open_ports.len())?;
    MOUNTS.check(request.mounts.len())?;
    IMAGE.check(request.image.as_ref().map_or(0, String::len))?;
    for path in [&request.working_directory, &request.health_path, &request.archive_root].into_iter().flatten() {
        PATH.check(path.len())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_of_a_create_has_its_limit() {
        let none = CreateRequest::default;
        let text = |size: usize| "x".repeat(size);
        let env = |count: usize, size: usize| (0..count).map(|n| (format!("A{n}"), text(size))).collect();
        let cases: [(CreateRequest, CreateRequest); 9] = [
            (CreateRequest { env_vars: env(1024, 1), ..none() }, CreateRequest { env_vars: env(1025, 1), ..none() }),
            (
                CreateRequest { env_vars: env(1, (128 << 10) - 4), ..none() },
                CreateRequest { env_vars: env(1, (128 << 10) - 3), ..none() },
            ),
            (
                CreateRequest { setup_hooks: vec![text(1); 32], ..none() },
                CreateRequest { setup_hooks: vec![text(1); 33], ..none() },
            ),
            (
                CreateRequest { setup_hooks: vec![text(64 << 10); 2], ..none() },
                CreateRequest { setup_hooks: vec![text(64 << 10), text(64 << 10), text(1)], ..none() },
            ),
            (
                CreateRequest { start_command: Some(text(64 << 10).into()), ..none() },
                CreateRequest { start_command: Some(text((64 << 10) + 1).into()), ..none() },
            ),
            (
                CreateRequest { open_ports: vec![80; 32], ..none() },
                CreateRequest { open_ports: vec![80; 33], ..none() },
            ),
            (CreateRequest { image: Some(text(1024)), ..none() }, CreateRequest { image: Some(text(1025)), ..none() }),
            (
                CreateRequest { health_path: Some(text(4096)), ..none() },
                CreateRequest { health_path: Some(text(4097)), ..none() },
            ),
            (
                CreateRequest { setup_hooks: vec![text(64 << 10)], ..none() },
                CreateRequest { setup_hooks: vec![text((64 << 10) + 1)], ..none() },
            ),
        ];
        for (fits, exceeds) in cases {
            check_create(&fits).unwrap();
            let error = check_create(&exceeds).unwrap_err();
            assert_eq!(error.code, ErrorCode::LimitExceeded);
            assert!(error.message.contains("limit of") && error.hint.is_some(), "{error:?}");
        }
    }
}
