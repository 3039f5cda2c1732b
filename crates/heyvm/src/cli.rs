//! What can be asked for, and in which words. The arguments of a command stand beside it, in [`crate::commands`].

use std::net::IpAddr;

use clap::{Parser, Subcommand};

use crate::{
    commands::{
        archives::{ArchiveArgs, ArchiveDirArgs, DeleteArchiveArgs, ListArchivesArgs, UpdateArgs},
        bind::{BindArgs, UnbindArgs},
        completions::{self, CompletionsArgs},
        cp::CpArgs,
        daemon::DaemonArgs,
        deploy::{CreateArgs, DeployArgs},
        exec::ExecArgs,
        images::{ImagesArgs, PullArgs},
        lifecycle::{RecoverArgs, ResizeArgs, RmArgs},
        list::ListArgs,
        login::LoginArgs,
        logs::LogsArgs,
        mount::MountAddArgs,
        port_forward::PortForwardArgs,
        server::ServerArgs,
        set::{EditTtlArgs, SetArgs},
        wait_for::WaitForArgs,
    },
    output::Format,
};

/// Deploys an app directory into a virtual machine of its own and gives it a URL
#[derive(Debug, Parser)]
#[command(name = "heyvm", version, max_term_width = 110, after_help = TOP_EXAMPLES)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(flatten)]
    pub serve: Serve,
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What every command takes.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "For every command")]
pub struct Global {
    /// For people (text) or for programs (json): one JSON document on standard output, errors as JSON on standard error
    #[arg(long, global = true, value_enum, default_value = "text")]
    pub format: Format,
    /// The heyvm server to use, as HEYO_CLOUD_URL names it, too; else that of `heyvm login`, else this machine
    #[arg(long, global = true, value_name = "URL", hide_short_help = true)]
    pub cloud_url: Option<String>,
    /// Where to log in, if not at the server itself
    #[arg(long, global = true, value_name = "URL", hide_short_help = true)]
    pub auth_url: Option<String>,
    /// Token or API key for a heyvm server, like HEYO_API_KEY; without a server it has no effect
    #[arg(long, global = true, env = "HEYO_ARCHIVE_TOKEN", hide_env_values = true, hide_short_help = true)]
    pub token: Option<String>,
    /// Use this machine, whatever server there is a login for
    #[arg(long, global = true, conflicts_with = "cloud_url", hide_short_help = true)]
    pub local: bool,
    /// Say on standard error what is being done; a daemon that is started meanwhile does so in its log
    #[arg(long, global = true)]
    pub debug: bool,
}

/// `heyvm --api`.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "REST API")]
pub struct Serve {
    /// Serve the REST API in the foreground
    #[arg(long)]
    pub api: bool,
    /// Port of the REST API
    #[arg(long, default_value_t = 3000, requires = "api")]
    pub port: u16,
    /// Address of the REST API; one that others can reach needs JWT_SECRET in the environment, or --allow-remote
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1", requires = "api")]
    pub listen: IpAddr,
    /// Let whoever reaches the REST API use every sandbox, without credentials
    #[arg(long, requires = "api")]
    pub allow_remote: bool,
}

/// Every command. A SANDBOX is an id, a name or a slug: the living one of that name, else the newest.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Turn a directory into a running VM with a URL
    #[command(after_help = DEPLOY_EXAMPLES)]
    Deploy(DeployArgs),
    /// Make a sandbox without an app
    #[command(after_help = CREATE_EXAMPLES)]
    Create(CreateArgs),
    /// Run a command in a sandbox; its exit status becomes heyvm's own
    #[command(after_help = EXEC_EXAMPLES)]
    Exec(ExecArgs),
    /// List sandboxes and their URLs
    #[command(visible_aliases = ["ls", "ps"], after_help = LIST_EXAMPLES)]
    List(ListArgs),
    /// Show everything about one sandbox, also why it ended
    #[command(visible_alias = "inspect", after_help = GET_EXAMPLES)]
    Get(Who),
    /// Wait until a port in a sandbox, or a URL, answers
    #[command(after_help = WAIT_FOR_EXAMPLES)]
    WaitFor(WaitForArgs),
    /// Give a port a URL
    #[command(after_help = BIND_EXAMPLES)]
    Bind(BindArgs),
    /// Take a port's URL away
    #[command(after_help = UNBIND_EXAMPLES)]
    Unbind(UnbindArgs),
    /// Lead ports of this machine to ports of a sandbox, for databases, debuggers and the like
    #[command(after_help = PORT_FORWARD_EXAMPLES)]
    PortForward(PortForwardArgs),
    /// Show what the start command has printed
    #[command(after_help = LOGS_EXAMPLES)]
    Logs(LogsArgs),
    /// Stop sandboxes (their disks are kept)
    #[command(after_help = STOP_EXAMPLES)]
    Stop(Several),
    /// Start stopped sandboxes (their disks are kept)
    #[command(after_help = START_EXAMPLES)]
    Start(Several),
    /// Stop sandboxes and start them again
    #[command(after_help = RESTART_EXAMPLES)]
    Restart(Several),
    /// Give a sandbox another size class, or a larger disk
    #[command(after_help = RESIZE_EXAMPLES)]
    Resize(ResizeArgs),
    /// Change what a create took: the time-to-live, whether it is started again
    #[command(after_help = SET_EXAMPLES)]
    Set(SetArgs),
    /// Change a sandbox's time-to-live
    #[command(after_help = EDIT_TTL_EXAMPLES)]
    EditTtl(EditTtlArgs),
    /// Keep a copy of a sandbox's disk as it is now, to go back to
    #[command(after_help = CHECKPOINT_EXAMPLES)]
    Checkpoint(Who),
    /// Go back to the checkpoint: stop, put the disk back, start
    #[command(after_help = RESTORE_EXAMPLES)]
    Restore(Who),
    /// Make a disk that no record names a sandbox again
    #[command(after_help = RECOVER_EXAMPLES)]
    Recover(RecoverArgs),
    /// Remove a sandbox with its disk and URLs
    #[command(after_help = RM_EXAMPLES)]
    Rm(RmArgs),
    /// List, remove, import and prepare images
    #[command(after_help = IMAGES_EXAMPLES)]
    Images(ImagesArgs),
    /// Fetch an image from its registry
    #[command(after_help = PULL_EXAMPLES)]
    Pull(PullArgs),
    /// Copy files and directories into a sandbox or out of it
    #[command(after_help = CP_EXAMPLES)]
    Cp(CpArgs),
    /// Let a sandbox use a directory of this machine, live
    #[command(after_help = MOUNT_ADD_EXAMPLES)]
    MountAdd(MountAddArgs),
    /// Keep a directory of a sandbox as an archive
    #[command(after_help = ARCHIVE_EXAMPLES)]
    Archive(ArchiveArgs),
    /// Keep a directory of this machine as an archive, to be deployed or to update sandboxes
    #[command(after_help = ARCHIVE_DIR_EXAMPLES)]
    ArchiveDir(ArchiveDirArgs),
    /// List archives
    #[command(after_help = LIST_ARCHIVES_EXAMPLES)]
    ListArchives(ListArchivesArgs),
    /// Remove archives that have no name and that no sandbox uses
    #[command(after_help = PRUNE_ARCHIVES_EXAMPLES)]
    PruneArchives,
    /// Remove an archive; sandboxes that were made from it go on
    #[command(after_help = DELETE_ARCHIVE_EXAMPLES)]
    DeleteArchive(DeleteArchiveArgs),
    /// Replace a sandbox's app with an archive and restart it
    #[command(after_help = UPDATE_EXAMPLES)]
    Update(UpdateArgs),
    /// Log in to a heyvm server: commands then use it instead of this machine
    #[command(after_help = LOGIN_EXAMPLES)]
    Login(LoginArgs),
    /// Forget the login, here and at the server
    #[command(after_help = LOGOUT_EXAMPLES)]
    Logout,
    /// Show the identity used for the server
    #[command(after_help = WHOAMI_EXAMPLES)]
    Whoami,
    /// Check whether this machine can run sandboxes, and say what to do
    #[command(after_help = DOCTOR_EXAMPLES)]
    Doctor,
    /// Manage the background daemon (starts automatically)
    #[command(after_help = DAEMON_EXAMPLES)]
    Daemon(DaemonArgs),
    /// Run a heyvm server and manage its accounts
    #[command(after_help = SERVER_EXAMPLES)]
    Server(ServerArgs),
    /// Print a completion script for a shell
    #[command(after_help = COMPLETIONS_EXAMPLES)]
    Completions(CompletionsArgs),
    /// Print the version
    #[command(after_help = VERSION_EXAMPLES)]
    Version,
}

/// A sandbox.
#[derive(Debug, clap::Args)]
pub struct Who {
    /// Id, name or slug
    #[arg(add = completions::sandboxes())]
    pub sandbox: String,
}

/// One sandbox or several.
#[derive(Debug, clap::Args)]
pub struct Several {
    /// Id, name or slug (repeatable)
    #[arg(required = true, add = completions::sandboxes())]
    pub sandboxes: Vec<String>,
}

const TOP_EXAMPLES: &str = "\
Examples:
  heyvm deploy ./my-app --port 8080 --start-command \"python3 server.py\" --health-path /health
  heyvm exec my-app -- uname -a
  heyvm --api --port 3000";
const DEPLOY_EXAMPLES: &str = "\
Left behind: what .gitignore and .heyvmignore name, and .git, node_modules, target, .venv and the like.
A line `!target/` in .heyvmignore takes one along, --no-ignore takes everything.

Examples:
  heyvm deploy ./my-app --name web --port 8080 --start-command \"python3 server.py\" --health-path /health
  heyvm deploy . --port 3000 --setup-hook \"npm ci\" --start-command \"npm start\" --format json
  heyvm deploy . --name web --replace --port 8080 --start-command \"python3 server.py\" --health-path /health";
const CREATE_EXAMPLES: &str = "\
Examples:
  heyvm create --name box --size-class micro --ttl-seconds 600
  heyvm exec \"$(heyvm create --print-id)\" -- python3 --version";
const EXEC_EXAMPLES: &str = "\
A command of one word is a script for sh; several words are a program and its arguments, as they are.
Flags for heyvm stand before the command. A --format json at the very end is heyvm's own as well, unless
--format stands before the command.
Standard input goes to the command, as with ssh: use -n in a loop that reads a pipe itself, or the command
takes the loop's input. Of a file only what the command reads is taken.
Exit status: the command's own; 124 after --timeout, 126 or 127 if it cannot be started, 128 + N for signal N.
What the command leaves in the background goes on when it ends by itself; --timeout, and heyvm's own end,
kill all of it, also what went to a session of its own. --detach starts what is meant to stay.

Examples:
  heyvm exec web ls -l /workspace
  heyvm exec -it web bash
  heyvm exec web --format json --timeout 30s -- ./run-tests.sh
  heyvm exec web --session work -- 'cd /etc && export COLOUR=blue'
  tar c . | heyvm exec web -- tar x -C /srv
  while read -r host; do heyvm exec -n web -- ping -c 1 \"$host\"; done < hosts
  heyvm exec --detach web -- sh -c 'exec ./worker > worker.log 2>&1'";
const LIST_EXAMPLES: &str = "\
Examples:
  heyvm list
  heyvm list --all --format json";
const GET_EXAMPLES: &str = "\
Example:
  heyvm get web --format json";
const WAIT_FOR_EXAMPLES: &str = "\
Exit status 1 and {\"ready\": false} at the deadline; why a URL is not ready is told on standard error.

Examples:
  heyvm wait-for web 8080 --path /health --timeout 60s
  heyvm wait-for --url http://abc123.localhost:8480/health --timeout 60s --format json";
const BIND_EXAMPLES: &str = "\
Example:
  heyvm bind web 3000 --format json";
const UNBIND_EXAMPLES: &str = "\
Example:
  heyvm unbind web 3000";
const PORT_FORWARD_EXAMPLES: &str = "\
Examples:
  heyvm port-forward web 5432
  heyvm port-forward web 15432:5432 0:6379 --format json
It goes on until SIGINT or SIGTERM. The port needs no URL, and its program may listen on 127.0.0.1.";
const LOGS_EXAMPLES: &str = "\
Examples:
  heyvm logs web
  heyvm logs -f web
  heyvm logs -t -n 20 web";
const STOP_EXAMPLES: &str = "\
Examples:
  heyvm stop web --format json
  heyvm stop worker-1 worker-2";
const START_EXAMPLES: &str = "\
Example:
  heyvm start web";
const RESTART_EXAMPLES: &str = "\
Example:
  heyvm restart web";
const RESIZE_EXAMPLES: &str = "\
Examples:
  heyvm resize my-app --size-class medium
  heyvm resize my-app --disk-size-gb 50";
const SET_EXAMPLES: &str = "\
Examples:
  heyvm set web --ttl-seconds 3600
  heyvm set web --ttl-seconds none --restart always";
const EDIT_TTL_EXAMPLES: &str = "\
Example:
  heyvm edit-ttl web --ttl-seconds 3600";
const CHECKPOINT_EXAMPLES: &str = "\
Example:
  heyvm checkpoint my-app      # and later, to go back: heyvm restore my-app";
const RESTORE_EXAMPLES: &str = "\
Example:
  heyvm restore my-app";
const RECOVER_EXAMPLES: &str = "\
A disk is orphaned when the daemon's database was lost, or restored from a backup. `heyvm list --all`
lists orphans. One whose VM runs is a running sandbox again, any other a stopped one.
`heyvm rm ID` removes an orphan.

Example:
  heyvm recover cbbe1029 --name web";
const RM_EXAMPLES: &str = "\
Examples:
  heyvm rm web
  heyvm rm -f web worker-1 worker-2";
const IMAGES_EXAMPLES: &str = "\
Examples:
  heyvm images list
  heyvm images import app.tar --name app:1
  heyvm images prepare";
const PULL_EXAMPLES: &str = "\
Example:
  heyvm pull ubuntu:24.04";
const CP_EXAMPLES: &str = "\
A target that is a directory gets a copy in it; any other target becomes the copy. Links are copied as links,
sockets and FIFOs left out; modes, times, hard links and holes are kept. - is the standard input or output.

Examples:
  heyvm cp ./data web:/workspace/data
  heyvm cp web:/var/log/app.log .
  pg_dump shop | heyvm cp - web:/srv/shop.sql
  heyvm cp web:/srv/report.csv - | head";
const MOUNT_ADD_EXAMPLES: &str = "\
What the sandbox writes belongs to the directory's owner. A stopped sandbox has it when it starts.

Example:
  heyvm mount-add --id web --host-path ./data --sandbox-path /data --read-only";
const ARCHIVE_EXAMPLES: &str = "\
Example:
  heyvm archive web --path /workspace --name web-2026-11";
const ARCHIVE_DIR_EXAMPLES: &str = "\
Left behind is what deploy leaves behind.

Example:
  heyvm archive-dir ./my-app --name my-app";
const LIST_ARCHIVES_EXAMPLES: &str = "\
Example:
  heyvm list-archives --all
  heyvm list-archives --format json";
const PRUNE_ARCHIVES_EXAMPLES: &str = "\
Each deploy keeps its archive for as long as its sandbox is there, and for a day.
This removes the others at once.

Example:
  heyvm prune-archives";
const DELETE_ARCHIVE_EXAMPLES: &str = "\
Example:
  heyvm delete-archive ar-0123456789abcdef0123456789abcdef";
const UPDATE_EXAMPLES: &str = "\
All of the archive is there afterwards and nothing else, or nothing has changed. URLs stay. Refused where
a mount lies at, above or below the directory: files of this machine are never removed.

Example:
  heyvm update web --archive ar-0123456789abcdef0123456789abcdef";
const LOGIN_EXAMPLES: &str = "\
The credentials are kept in ~/.heyo/token.json, for you alone to read.
`--local` uses this machine all the same.

Examples:
  heyvm login --cloud-url https://api.example.org
  heyvm login --cloud-url https://api.example.org --email me@example.org < password-file
  heyvm login --cloud-url https://api.example.org --api-key - < key-file";
const LOGOUT_EXAMPLES: &str = "\
Example:
  heyvm logout";
const WHOAMI_EXAMPLES: &str = "\
Example:
  heyvm whoami --format json";
const DOCTOR_EXAMPLES: &str = "\
Example:
  heyvm doctor --format json";
const DAEMON_EXAMPLES: &str = "\
Examples:
  heyvm daemon status
  heyvm daemon stop --all
  heyvm daemon install      # sandboxes with --restart always come back after a reboot";
const SERVER_EXAMPLES: &str = "\
Example:
  heyvm server admin user add ada@example.com --store ~/.heyo/server.db";
const COMPLETIONS_EXAMPLES: &str = "\
Example:
  heyvm completions bash > ~/.local/share/bash-completion/completions/heyvm";
const VERSION_EXAMPLES: &str = "\
Example:
  heyvm version --format json";

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn commands_are_consistent() {
        Cli::command().debug_assert();
    }

    /// What every command says of itself, as Markdown. Flags for every command stand at the top alone.
    fn reference() -> String {
        let mut text = String::from(
            "# Command line\n\nMade from the help texts: `HEYVM_UPDATE_DOCS=1 cargo test -p heyvm` writes it anew.\n\n\
             With `--format json` standard output carries exactly one JSON document; progress and errors go to standard\n\
             error, an error as `{\"error\":{\"code\",\"message\",\"hint\"}}` (codes: [api.md](api.md#errors)). Exit status: 0, 1 for\n\
             what failed, 2 for a command line that cannot be understood; `exec` passes on that of its command.\n",
        );
        describe(&Cli::command(), "heyvm", &mut text);
        text
    }

    fn describe(command: &clap::Command, name: &str, text: &mut String) {
        let mut shown = command.clone().term_width(110).bin_name(name);
        let help = shown.render_long_help().to_string();
        let help: Vec<_> = help.lines().map(str::trim_end).collect();
        text.push_str(&format!("\n## {name}\n\n```\n{}\n```\n", help.join("\n").trim()));
        for inner in command.get_subcommands().filter(|inner| inner.get_name() != "help" && !inner.is_hide_set()) {
            describe(inner, &format!("{name} {}", inner.get_name()), text);
        }
    }

    #[test]
    fn the_reference_is_the_one_that_is_checked_in() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/cli.md");
        if std::env::var_os("HEYVM_UPDATE_DOCS").is_some() {
            std::fs::write(&path, reference()).unwrap();
        }
        let kept = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(kept == reference(), "docs/cli.md is not up to date: HEYVM_UPDATE_DOCS=1 cargo test -p heyvm");
    }

    #[test]
    fn lines_below_a_help_text_stand_as_they_are_written() {
        for command in std::iter::once(Cli::command()).chain(Cli::command().get_subcommands().cloned()) {
            let below = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let help = command.term_width(110).render_long_help().to_string();
            let wrapped: Vec<_> = below.lines().filter(|line| !help.lines().any(|shown| shown == *line)).collect();
            assert!(wrapped.is_empty(), "to be shortened: {wrapped:#?}");
        }
    }

    #[test]
    fn every_command_has_an_example() {
        for command in Cli::command().get_subcommands() {
            let help = command.clone().render_long_help().to_string();
            let example = format!("heyvm {}", command.get_name());
            assert!(help.contains("Example") && help.contains(&example), "{}: {help}", command.get_name());
        }
    }
}
