//! A directory as a read-only EROFS file, by the host's `mkfs.erofs`.
#![expect(clippy::disallowed_methods, reason = "runs on threads that may wait")]

use std::{
    io,
    path::Path,
    process::{Command, Stdio},
};

use crate::Error;

/// Later than any file's time: what would be younger gets this one.
const LATEST: &str = "4102444800";

/// Writes `dir` to `file`. As root, owners are kept; otherwise everything belongs to root in the guest. Files keep their
/// times (Python's compiled files are valid for their source's alone); the same directory gives the same bytes.
pub fn write(dir: &Path, file: &Path) -> Result<(), Error> {
    let mut command = Command::new("mkfs.erofs");
    command.env("SOURCE_DATE_EPOCH", LATEST);
    command.args(["-zlz4", "--preserve-mtime", "-U00000000-0000-0000-0000-000000000000", "-x1"]);
    if !nix::unistd::getuid().is_root() {
        command.arg("--all-root");
    }
    let output = command.arg(file).arg(dir).stdin(Stdio::null()).output().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::HostNotReady {
            what: "mkfs.erofs is not installed".into(),
            hint: "install the package erofs-utils".into(),
        },
        _ => Error::io("running mkfs.erofs on", dir)(error),
    })?;
    if output.status.success() {
        return Ok(());
    }
    let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Error::io("making the image's root", file)(io::Error::other(why)))
}
