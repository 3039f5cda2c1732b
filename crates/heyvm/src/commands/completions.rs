//! `completions`, and the values that a shell completes: names of sandboxes and images, size classes.

use std::{ffi::OsStr, time::Duration};

use clap_complete::{
    engine::{ArgValueCompleter, CompletionCandidate},
    env::{Bash, Elvish, EnvCompleter, Fish, Powershell, Zsh},
};
use heyvm_api::images::ImageInfo;
use heyvm_api::sandbox::{SandboxInfo, SizeClass};
use serde::de::DeserializeOwned;
use serde_json::json;

use super::Outcome;
use crate::{
    background::{self, Daemon},
    output::{self, Format},
};

/// The variable by which a script asks for candidates: its value names the shell.
pub const VARIABLE: &str = "HEYVM_COMPLETE";
/// A shell waits for candidates at a prompt.
const PATIENCE: Duration = Duration::from_secs(2);

/// `completions`.
#[derive(Debug, clap::Args)]
pub struct CompletionsArgs {
    /// The shell that is to complete heyvm's commands, flags and names
    pub shell: clap_complete::Shell,
}

/// Prints the script.
pub fn completions(format: Format, args: &CompletionsArgs) -> Outcome {
    use clap_complete::Shell;
    let shell: &dyn EnvCompleter = match args.shell {
        Shell::Elvish => &Elvish,
        Shell::Fish => &Fish,
        Shell::PowerShell => &Powershell,
        Shell::Zsh => &Zsh,
        _ => &Bash,
    };
    let mut script = Vec::new();
    if let Err(error) = shell.write_registration(VARIABLE, "heyvm", "heyvm", "heyvm", &mut script) {
        return output::cannot_write(&error);
    }
    match format {
        Format::Text => output::bytes(&script),
        Format::Json => {
            output::json(&json!({"shell": args.shell.to_string(), "script": String::from_utf8_lossy(&script)}));
        }
    }
    Ok(0)
}

/// Names of sandboxes.
pub fn sandboxes() -> ArgValueCompleter {
    ArgValueCompleter::new(|typed: &OsStr| {
        let all: Vec<SandboxInfo> = answer("/sandboxes").unwrap_or_default();
        candidates(typed, all.into_iter().map(|info| info.name))
    })
}

/// Names of images.
pub fn images() -> ArgValueCompleter {
    ArgValueCompleter::new(|typed: &OsStr| {
        let all: Vec<ImageInfo> = answer("/images").unwrap_or_default();
        candidates(typed, all.into_iter().map(|image| image.name))
    })
}

/// Size classes.
pub fn size_classes() -> ArgValueCompleter {
    ArgValueCompleter::new(|typed: &OsStr| {
        candidates(typed, SizeClass::ALL.iter().map(|class| class.as_str().to_owned()))
    })
}

fn candidates(typed: &OsStr, names: impl Iterator<Item = String>) -> Vec<CompletionCandidate> {
    let typed = typed.to_string_lossy();
    names.filter(|name| name.starts_with(&*typed)).map(CompletionCandidate::new).collect()
}

/// Asks the daemon if it runs: a key press starts none. A shell has no place for errors.
fn answer<T: DeserializeOwned>(path: &str) -> Option<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
    let home = background::home().ok()?;
    runtime.block_on(async {
        let asked = async {
            match background::daemon(&home).await {
                Daemon::Running { client, .. } => client.get(path).await.ok(),
                Daemon::Silent | Daemon::Absent => None,
            }
        };
        tokio::time::timeout(PATIENCE, asked).await.ok().flatten()
    })
}
