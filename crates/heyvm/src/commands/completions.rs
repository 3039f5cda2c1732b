//! `completions`.

use clap::CommandFactory;
use serde_json::json;

use super::Outcome;
use crate::{
    cli::Cli,
    output::{self, Format},
};

/// `completions`.
#[derive(Debug, clap::Args)]
pub struct CompletionsArgs {
    /// The shell that is to complete heyvm's commands and flags
    pub shell: clap_complete::Shell,
}

/// Prints the script.
pub fn completions(format: Format, args: &CompletionsArgs) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "heyvm", &mut script);
    match format {
        Format::Text => output::bytes(&script),
        Format::Json => {
            output::json(&json!({"shell": args.shell.to_string(), "script": String::from_utf8_lossy(&script)}));
        }
    }
    Ok(0)
}
