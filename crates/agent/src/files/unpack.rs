//! Unpacking the host's tar streams: in place, or in place of what is there. The reading is `heyvm-bounded-tar`'s.

use std::{fs, io::Read, path::Path};

use heyvm_agent_protocol::v1::UnpackReply;
use heyvm_bounded_tar::{Error, Options};
use heyvm_trees::Replacement;
use tonic::Status;

use super::failed;
use crate::console;

/// Unpacks `archive` below `dir`, which is made when missing. With `clean` nothing else is left in it afterwards; an
/// archive or a step that fails then leaves the directory as it was, and so does a mount at, above or below it.
pub fn unpack(dir: &Path, clean: bool, options: &Options, archive: impl Read) -> Result<UnpackReply, Status> {
    fs::create_dir_all(dir).map_err(|error| failed("cannot prepare", dir, &error))?;
    if !clean {
        return unpack_into(dir, options, archive);
    }
    let refused = |error: heyvm_trees::Error| not_replaced(dir, error);
    let new = Replacement::begin(dir).map_err(refused)?;
    let reply = unpack_into(&new.staging(), options, archive)?;
    if let Some(left) = new.commit().map_err(refused)? {
        // The new content is in place; the next replacement tries again to remove it.
        console::say(format_args!("{} of what was replaced is left: {}", left.path.display(), left.why));
    }
    Ok(reply)
}

fn unpack_into(dir: &Path, options: &Options, archive: impl Read) -> Result<UnpackReply, Status> {
    let (done, _) = heyvm_bounded_tar::unpack(dir, options, archive).map_err(|error| refused(&error))?;
    Ok(UnpackReply { entries: done.entries, bytes: done.bytes })
}

/// An archive that is not unpacked as the host is told of it.
pub fn refused(error: &Error) -> Status {
    match error {
        Error::Broken(_) | Error::Refused { .. } => Status::invalid_argument(error.to_string()),
        Error::TooMuch(_) => Status::resource_exhausted(error.to_string()),
        Error::Io { path, source } => failed("cannot unpack", path, source),
    }
}

fn not_replaced(dir: &Path, error: heyvm_trees::Error) -> Status {
    use heyvm_trees::Error::*;
    match error {
        Mount(_) | Protected(_) => {
            Status::failed_precondition(format!("{} cannot be replaced: {error}", dir.display()))
        }
        Io { .. } | NotUndone { .. } => failed("cannot replace what is in", dir, &error.into()),
    }
}
