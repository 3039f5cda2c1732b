//! What can be asked for, and in which words.

use std::{ffi::OsString, net::IpAddr, path::PathBuf};

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum, error::ErrorKind};
use heyvm_api::{ApiError, ErrorCode};

use crate::output::{self, Format};

/// Real computers for agents and scripts: every sandbox is a full VM.
#[derive(Debug, Parser)]
#[command(
    name = "heyvm",
    version,
    after_help = "Example:\n  heyvm deploy ./app --port 8080 --start-command \"python3 app.py\" --format json"
)]
pub struct Cli {
    /// Output for people (text) or programs (json)
    #[arg(long, global = true, value_enum, default_value = "text")]
    pub format: Format,
    /// Serve the REST API in the foreground
    #[arg(long)]
    pub api: bool,
    /// Port of the REST API
    #[arg(long, default_value_t = 3000, requires = "api")]
    pub port: u16,
    /// Address of the REST API; anything but loopback needs JWT_SECRET or --allow-remote
    #[arg(long, default_value = "127.0.0.1", requires = "api")]
    pub listen: IpAddr,
    /// Listen beyond loopback without a secret: whoever reaches the port owns every sandbox
    #[arg(long, requires = "api")]
    pub allow_remote: bool,
    /// A heyvm server to use instead of this machine (not in this version)
    #[arg(long, global = true, hide = true)]
    pub cloud_url: Option<String>,
    /// Where to log in (not in this version)
    #[arg(long, global = true, hide = true)]
    pub auth_url: Option<String>,
    /// Token for a heyvm server; without one it has no effect
    #[arg(long, global = true, env = "HEYO_ARCHIVE_TOKEN", hide_env_values = true, hide = true)]
    pub token: Option<String>,
    /// Tell on standard error what is done
    #[arg(long, global = true)]
    pub debug: bool,
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Turn a directory into a running VM with a URL
    #[command(
        after_help = "Example:\n  heyvm deploy ./app --name web --port 8080 --start-command \"python3 app.py\" --health-path /health --ttl-seconds 3600"
    )]
    Deploy(DeployArgs),
    /// Make a sandbox without an app
    #[command(after_help = "Example:\n  heyvm create --name box --ttl-seconds 600 --format json")]
    Create(CreateArgs),
    /// Run a command in a sandbox; its exit status is passed on
    #[command(
        after_help = "A --format json behind -- is heyvm's own, unless --format stands before --.\n\nExample:\n  heyvm exec web --timeout 30s -- python3 -c \"print('hello')\""
    )]
    Exec(ExecArgs),
    /// List sandboxes
    #[command(after_help = "Example:\n  heyvm list --all --format json")]
    List(ListArgs),
    /// Tell everything about one sandbox, also why it ended
    #[command(after_help = "Example:\n  heyvm get web --format json")]
    Get(Who),
    /// Wait until a port or a URL answers
    #[command(
        after_help = "Examples:\n  heyvm wait-for web 8080 --path /health --timeout 60s\n  heyvm wait-for --url http://abc123.localhost:8480/health --timeout 60s"
    )]
    WaitFor(WaitForArgs),
    /// Give a port a URL
    #[command(after_help = "Example:\n  heyvm bind web 3000 --format json")]
    Bind(BindArgs),
    /// Take a port's URL away
    #[command(after_help = "Example:\n  heyvm unbind web 3000")]
    Unbind(UnbindArgs),
    /// Show what the start command printed
    #[command(after_help = "Example:\n  heyvm logs -f web")]
    Logs(LogsArgs),
    /// End the VM, keep the disk
    #[command(after_help = "Example:\n  heyvm stop web")]
    Stop(Who),
    /// Go on from the disk of a stopped sandbox
    #[command(after_help = "Example:\n  heyvm start web")]
    Start(Who),
    /// Stop and start
    #[command(after_help = "Example:\n  heyvm restart web")]
    Restart(Who),
    /// Remove a sandbox with its disk and URLs
    #[command(after_help = "Example:\n  heyvm rm -y web")]
    Rm(RmArgs),
    /// List, import, remove images
    #[command(after_help = "Example:\n  heyvm images import app.tar --name app:1")]
    Images(ImagesArgs),
    /// Fetch an image from its registry
    #[command(after_help = "Example:\n  heyvm pull ubuntu:24.04")]
    Pull(PullArgs),
    /// Copy files into and out of a sandbox
    #[command(after_help = "Examples:\n  heyvm cp ./data web:/workspace/data\n  heyvm cp web:/workspace/out.txt .")]
    Cp(CpArgs),
    /// Say whether this machine can run sandboxes, and how well
    #[command(after_help = "Example:\n  heyvm doctor --format json")]
    Doctor,
    /// Look after the background daemon
    #[command(after_help = "Example:\n  heyvm daemon status")]
    Daemon(DaemonArgs),
    /// Print a completion script
    #[command(after_help = "Example:\n  heyvm completions bash > /etc/bash_completion.d/heyvm")]
    Completions {
        /// bash, zsh, fish, elvish or powershell
        shell: clap_complete::Shell,
    },
}

/// What deploy and create have alike.
#[derive(Debug, Args)]
pub struct MakeArgs {
    /// Name; unique among living sandboxes
    #[arg(long)]
    pub name: Option<String>,
    /// URL-safe name; made from the name when absent
    #[arg(long)]
    pub slug: Option<String>,
    /// Image, for example ubuntu:24.04
    #[arg(long)]
    pub image: Option<String>,
    /// shell, python or node: what the image must be able to run
    #[arg(long = "type")]
    pub kind: Option<String>,
    /// qemu, the one there is
    #[arg(long)]
    pub backend: Option<String>,
    /// Long-running process to keep the sandbox alive
    #[arg(long)]
    pub start_command: Option<String>,
    /// Directory of commands
    #[arg(long)]
    pub working_directory: Option<String>,
    /// HTTP path to poll for readiness
    #[arg(long)]
    pub health_path: Option<String>,
    /// How long to wait for readiness
    #[arg(long, default_value = "120s")]
    pub health_timeout: String,
    /// micro, mini, small, medium, large or xlarge
    #[arg(long)]
    pub size_class: Option<String>,
    /// Disk in GB, 1 to 250
    #[arg(long, allow_negative_numbers = true)]
    pub disk_size_gb: Option<i64>,
    /// US or EU
    #[arg(long)]
    pub region: Option<String>,
    /// Environment variable KEY=VALUE (repeatable)
    #[arg(long)]
    pub env: Vec<String>,
    /// Shell command to run before the start command (repeatable)
    #[arg(long)]
    pub setup_hook: Vec<String>,
    /// Destroy it after this many seconds
    #[arg(long, conflicts_with = "no_ttl", allow_negative_numbers = true)]
    pub ttl_seconds: Option<i64>,
    /// Keep it until it is removed (the default)
    #[arg(long)]
    pub no_ttl: bool,
    /// Require authentication on bound ports
    #[arg(long)]
    pub private: bool,
    /// Mount HOST:SANDBOX
    #[arg(long)]
    pub mount: Vec<String>,
    /// Mount a volume
    #[arg(long)]
    pub volume: Vec<String>,
    /// Keep the half-made sandbox when a step fails
    #[arg(long)]
    pub keep_on_failure: bool,
    /// Take over name and URLs of the living sandbox of this name, once this one is healthy
    #[arg(long)]
    pub replace: bool,
    /// The same key gives the same sandbox: safe to repeat
    #[arg(long)]
    pub idempotency_key: Option<String>,
    /// Print the id alone
    #[arg(long)]
    pub print_id: bool,
}

/// `deploy`.
#[derive(Debug, Args)]
pub struct DeployArgs {
    /// Directory with the app
    pub directory: PathBuf,
    /// Port to give a URL (repeatable)
    #[arg(long, allow_negative_numbers = true)]
    pub port: Vec<i64>,
    /// Take also what .gitignore, .heyvmignore and the default list leave out
    #[arg(long)]
    pub no_ignore: bool,
    #[command(flatten)]
    pub make: MakeArgs,
}

/// `create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Port to give a URL (repeatable)
    #[arg(long, allow_negative_numbers = true)]
    pub open_port: Vec<i64>,
    #[command(flatten)]
    pub make: MakeArgs,
}

/// `exec`.
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Id, name or slug
    pub sandbox: String,
    /// Environment variable KEY=VALUE (repeatable)
    #[arg(long)]
    pub env: Vec<String>,
    /// Directory to run it in
    #[arg(long)]
    pub cwd: Option<String>,
    /// User to run it as
    #[arg(long)]
    pub user: Option<String>,
    /// Named session, which keeps its directory and environment
    #[arg(long)]
    pub session: Option<String>,
    /// Kill it after this long and exit with 124
    #[arg(long)]
    pub timeout: Option<String>,
    /// The command
    #[arg(last = true, required = true)]
    pub command: Vec<String>,
}

/// `list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Also stopped ones, and those removed within a day
    #[arg(long, conflicts_with = "stopped")]
    pub all: bool,
    /// Only stopped and failed ones
    #[arg(long)]
    pub stopped: bool,
}

/// A sandbox.
#[derive(Debug, Args)]
pub struct Who {
    /// Id, name or slug
    pub sandbox: String,
}

/// `wait-for`.
#[derive(Debug, Args)]
pub struct WaitForArgs {
    /// Id, name or slug
    #[arg(required_unless_present = "url", conflicts_with = "url")]
    pub sandbox: Option<String>,
    /// Port in the sandbox
    #[arg(required_unless_present = "url", allow_negative_numbers = true)]
    pub wait_port: Option<i64>,
    /// Path that must answer 2xx or 3xx
    #[arg(long, conflicts_with = "url")]
    pub path: Option<String>,
    /// URL that must answer 2xx or 3xx, from here
    #[arg(long)]
    pub url: Option<String>,
    /// How long to wait
    #[arg(long, default_value = "60s")]
    pub timeout: String,
}

/// `bind`.
#[derive(Debug, Args)]
pub struct BindArgs {
    /// Id, name or slug
    pub sandbox: String,
    /// Port in the sandbox
    #[arg(allow_negative_numbers = true)]
    pub bind_port: i64,
    /// Require authentication
    #[arg(long)]
    pub private: bool,
}

/// `unbind`.
#[derive(Debug, Args)]
pub struct UnbindArgs {
    /// Id, name or slug
    pub sandbox: String,
    /// Port in the sandbox
    #[arg(allow_negative_numbers = true)]
    pub bind_port: i64,
}

/// `logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Id, name or slug
    pub sandbox: String,
    /// Go on until the sandbox ends
    #[arg(short, long)]
    pub follow: bool,
}

/// `rm`.
#[derive(Debug, Args)]
pub struct RmArgs {
    /// Id, name or slug (repeatable)
    #[arg(required = true)]
    pub sandboxes: Vec<String>,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
}

/// `pull`.
#[derive(Debug, Args)]
pub struct PullArgs {
    /// For example ubuntu:24.04
    pub image: String,
}

/// `cp`.
#[derive(Debug, Args)]
pub struct CpArgs {
    /// A path here, or SANDBOX:/path
    pub from: String,
    /// A path here, or SANDBOX:/path
    pub to: String,
}

/// `images`.
#[derive(Debug, Args)]
pub struct ImagesArgs {
    #[command(subcommand)]
    pub command: Option<ImagesCommand>,
}

/// What can be done with images.
#[derive(Debug, Subcommand)]
pub enum ImagesCommand {
    /// List images here
    #[command(after_help = "Example:\n  heyvm images list --format json")]
    List,
    /// Take an image from a docker save tar, an OCI layout or a root tar
    #[command(after_help = "Example:\n  heyvm images import app.tar --name app:1")]
    Import {
        /// The file or directory
        path: PathBuf,
        /// Name to know it by
        #[arg(long)]
        name: Option<String>,
    },
    /// Remove an image
    #[command(after_help = "Example:\n  heyvm images rm app:1")]
    Rm {
        /// Its name
        name: String,
    },
    /// Take the guests' kernel from an unpacked kernel package, or from /
    #[command(after_help = "Example:\n  heyvm images import-kernel /tmp/linux-image")]
    ImportKernel {
        /// Directory with boot/vmlinuz-VERSION and lib/modules/VERSION
        directory: PathBuf,
    },
    /// Make sure that the default image and its template are there
    #[command(after_help = "Example:\n  heyvm images prepare")]
    Prepare,
}

/// `daemon`.
#[derive(Debug, Args)]
pub struct DaemonArgs {
    #[command(subcommand)]
    pub command: DaemonCommand,
}

/// What can be done with the daemon.
#[derive(Debug, Subcommand)]
pub enum DaemonCommand {
    /// Be the daemon
    #[command(hide = true)]
    Run,
    /// Tell whether it runs
    Status,
    /// End it; sandboxes keep running unless --all
    Stop {
        /// Stop all sandboxes first
        #[arg(long)]
        all: bool,
    },
    /// End it and start it anew; sandboxes keep running
    Restart,
}

/// Arguments that were refused.
pub struct Refused {
    error: clap::Error,
    json: bool,
}

impl Refused {
    /// Tells why and ends the program.
    pub fn exit(self) -> ! {
        if self.json && !matches!(self.error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
            let text = self.error.render().to_string();
            let message = text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
            let error =
                ApiError::new(ErrorCode::InvalidArgument, message).hint("heyvm COMMAND --help tells what there is");
            output::error(Format::Json, &error);
            std::process::exit(2);
        }
        self.error.exit()
    }
}

/// Reads the arguments. A trailing `--format json` behind `--` is ours, unless `--format` stands before it.
pub fn parse(arguments: Vec<OsString>) -> Result<Cli, Refused> {
    let arguments = with_format_in_front(arguments);
    let json = wants_json(&arguments);
    let cli = Cli::try_parse_from(arguments).map_err(|error| Refused { error, json })?;
    if cli.command.is_none() && !cli.api {
        let error = Cli::command().error(ErrorKind::MissingSubcommand, "a command is needed: heyvm --help lists them");
        return Err(Refused { error, json });
    }
    Ok(cli)
}

fn with_format_in_front(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let Some(dashes) = arguments.iter().position(|argument| argument == "--") else { return arguments };
    let before = arguments[..dashes].iter().any(|a| a.to_string_lossy().starts_with("--format"));
    let length = arguments.len();
    // Something must be left of the command itself.
    let trailing = length > dashes + 3 && arguments[length - 2] == "--format" && is_format(&arguments[length - 1]);
    if trailing && !before {
        let ours = arguments.split_off(length - 2);
        arguments.splice(dashes..dashes, ours);
    }
    arguments
}

fn is_format(text: &OsString) -> bool {
    text.to_str().is_some_and(|text| Format::from_str(text, false).is_ok())
}

fn wants_json(arguments: &[OsString]) -> bool {
    let ours = arguments.split(|argument| argument == "--").next().unwrap_or_default();
    ours.windows(2).any(|two| two[0] == "--format" && two[1] == "json") || ours.iter().any(|a| a == "--format=json")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &[&str]) -> Cli {
        parse(line.iter().map(OsString::from).collect()).unwrap_or_else(|refused| panic!("{}", refused.error))
    }

    #[test]
    fn the_commands_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_trailing_format_is_ours() {
        let cli = parsed(&["heyvm", "exec", "a", "--", "python3", "-c", "x", "--format", "json"]);
        assert_eq!(cli.format, Format::Json);
        let Some(Command::Exec(exec)) = cli.command else { panic!() };
        assert_eq!(exec.command, ["python3", "-c", "x"]);
    }

    #[test]
    fn unless_one_stands_before_the_dashes() {
        let cli = parsed(&["heyvm", "exec", "--format", "text", "a", "--", "prog", "--format", "json"]);
        assert_eq!(cli.format, Format::Text);
        let Some(Command::Exec(exec)) = cli.command else { panic!() };
        assert_eq!(exec.command, ["prog", "--format", "json"]);
    }

    #[test]
    fn the_api_needs_no_command() {
        let cli = parsed(&["heyvm", "--api", "--port", "3000"]);
        assert!(cli.api && cli.port == 3000);
        assert!(parse(vec!["heyvm".into()]).is_err());
    }
}
