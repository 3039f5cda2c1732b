//! `cp`: files and directories into a sandbox and out of it, as a tar stream.
//!
//! - [`into`]: what is here becomes a stream.  [`out_of`]: what a sandbox streams is unpacked, and trusted in nothing.

mod into;
mod out_of;

use std::io;

use bytes::Bytes;
use futures::{Stream, TryStreamExt};
use heyvm_api::{ApiError, ErrorCode, client::Client, files::ListFilesResponse};
use serde::Serialize;

use super::{Context, Outcome, encoded, path};
use crate::{
    output,
    progress::{Line, Progress},
};

/// `cp`.
#[derive(Debug, clap::Args)]
pub struct CpArgs {
    /// A path here (- for the standard input), or SANDBOX:PATH there; a relative one is below /workspace
    pub from: String,
    /// A path here (- for the standard output), or SANDBOX:PATH there
    pub to: String,
}

/// Standard input or output as a path.
const STANDARD: &str = "-";

/// What a copy has moved.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct Copied {
    /// Bytes of files.
    bytes: u64,
    /// Files, directories and links.
    entries: u64,
    /// What was left out, and why: a line for each kind.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    notes: Vec<String>,
}

#[derive(Serialize)]
struct Answer<'a> {
    copied: bool,
    from: &'a str,
    to: &'a str,
    #[serde(flatten)]
    what: Copied,
}

/// Copies; one of the two paths is in a sandbox.
pub async fn cp(context: &Context, args: &CpArgs) -> Outcome {
    let progress = Progress::new("copying");
    let what = match (remote(&args.from), remote(&args.to)) {
        (None, Some(target)) => {
            into::into(&context.client().await?, args.from.as_ref(), target, progress.line()).await?
        }
        (Some(source), None) => {
            out_of::out_of(&context.client().await?, source, args.to.as_ref(), progress.line()).await?
        }
        (Some(_), Some(_)) => {
            return Err(invalid("both paths are in a sandbox".into()).hint("copy to a directory here first, then on"));
        }
        (None, None) => {
            return Err(invalid("neither path is in a sandbox".into()).hint("write the other one SANDBOX:/path"));
        }
    };
    drop(progress);
    what.notes.iter().for_each(|note| output::note(note));
    // The file itself is the answer there.
    if args.to == STANDARD {
        return Ok(0);
    }
    output::answer(context.format, &Answer { copied: true, from: &args.from, to: &args.to, what }, String::new);
    Ok(0)
}

/// Pieces on their way, counted on the line.
fn watched(pieces: impl Stream<Item = io::Result<Bytes>>, line: Line) -> impl Stream<Item = io::Result<Bytes>> {
    let mut moved = 0;
    pieces.inspect_ok(move |piece| {
        moved += piece.len() as u64;
        line.moved("copying", moved);
    })
}

fn invalid(message: String) -> ApiError {
    ApiError::new(ErrorCode::InvalidArgument, message)
}

/// A path in a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Remote<'a> {
    who: &'a str,
    path: &'a str,
}

/// `SANDBOX:PATH`. What has a `/` before its first `:` is a path here, such as `./a:b`.
fn remote(text: &str) -> Option<Remote<'_>> {
    let (who, path) = text.split_once(':')?;
    (!who.is_empty() && !who.contains('/') && !path.is_empty()).then_some(Remote { who, path })
}

impl Remote<'_> {
    /// Whether it is a directory there; `false` for what is not there at all.
    async fn is_directory(self, client: &Client) -> Result<bool, ApiError> {
        let query = format!("/files?mount_path=%2F&file_path={}", encoded(&self.absolute()));
        match client.get::<ListFilesResponse>(&path(self.who, &query)).await {
            Ok(_) => Ok(true),
            Err(error) if matches!(error.code, ErrorCode::FileNotFound | ErrorCode::InvalidArgument) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn absolute(self) -> String {
        if self.path.starts_with('/') { self.path.to_owned() } else { format!("/workspace/{}", self.path) }
    }

    /// Where its tar goes in or comes out.
    fn tar(self, directory: &str) -> String {
        path(self.who, &format!("/files/tar?path={}", encoded(directory)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_sandboxes_are_told_from_paths_here() {
        for (text, who, path) in [("web:/srv", "web", "/srv"), ("web:out.txt", "web", "out.txt"), ("w:a:b", "w", "a:b")]
        {
            assert_eq!(remote(text), Some(Remote { who, path }), "{text}");
        }
        for text in ["file", "./a:b", "/tmp/a:/b", ":/srv", "web:", ""] {
            assert_eq!(remote(text), None, "{text}");
        }
        assert_eq!(remote("web:a").unwrap().absolute(), "/workspace/a");
    }
}
