//! `server`: what an operator of a heyvm server does.

pub mod admin;

use std::path::PathBuf;

use heyvm_server::cloud::{config::ServerConfig, run_server};

use super::{Context, Outcome, daemon};

/// `server`.
#[derive(Debug, clap::Args)]
pub struct ServerArgs {
    #[command(subcommand)]
    pub command: ServerCommand,
}

impl ServerArgs {
    /// Whether this process is to be the server.
    pub fn is_run(&self) -> bool {
        matches!(self.command, ServerCommand::Run(_))
    }
}

/// `server run`.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// The configuration; ~/.heyo/server.toml where it is there
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The store, where the configuration names none: the path of an SQLite database, or a postgres:// URL, which is
    /// better kept in HEYVM_STORE, since others can read command lines
    #[arg(long, env = "HEYVM_STORE", hide_env_values = true, value_name = "PATH or URL")]
    pub store: Option<String>,
}

/// What can be done with a server.
#[derive(Debug, clap::Subcommand)]
pub enum ServerCommand {
    /// Serve the cloud's API and the URLs of its sandboxes, in the foreground
    #[command(after_help = RUN_EXAMPLES)]
    Run(RunArgs),
    /// Manage accounts, users and API keys: works on the store itself, whether a server runs or not
    #[command(after_help = admin::EXAMPLES)]
    Admin(admin::AdminArgs),
}

const RUN_EXAMPLES: &str = "\
Without a configuration it serves this machine, at http://127.0.0.1:4445: one region, an SQLite store in ~/.heyo.
docs/server.md says what a configuration may hold. HEYVM_SERVER_SECRET seals the signing keys in the store.

Examples:
  heyvm server run
  HEYVM_STORE=postgres://heyvm:PASSWORD@db.example/heyvm heyvm server run --config /etc/heyvm/server.toml";

/// Whatever is to be done.
pub async fn server(context: &Context, args: ServerArgs) -> Outcome {
    match args.command {
        ServerCommand::Run(args) => run(context, args).await,
        ServerCommand::Admin(args) => admin::admin(context, args).await,
    }
}

async fn run(context: &Context, args: RunArgs) -> Outcome {
    let mut config = ServerConfig::read(&context.home, args.config.as_deref()).map_err(daemon::told)?;
    config.store = config.store.or(args.store.filter(|store| !store.is_empty()));
    if config.regions.is_empty() {
        context.daemon().await?;
    }
    run_server(context.home.clone(), config).await.map_err(daemon::told)?;
    Ok(0)
}
