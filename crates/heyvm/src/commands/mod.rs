//! One module per command. Each asks the daemon and tells what it answered; none holds logic of its own.

mod cp;
mod daemon;
mod exec;
mod images;
mod inspect;
mod lifecycle;
mod make;
mod ports;
mod wait_for;

use std::path::PathBuf;

use clap::CommandFactory;
use heyvm_api::{ApiError, ErrorCode, client::Client};

use crate::{
    cli::{Cli, Command},
    daemon as background, output,
    output::Format,
};

/// What every command has at hand.
pub struct Context {
    format: Format,
    home: PathBuf,
}

impl Context {
    /// A client of the daemon, which is started when there is none.
    async fn client(&self) -> Result<Client, ApiError> {
        background::ensure(&self.home).await
    }
}

type Outcome = Result<i32, ApiError>;

/// Runs the command; the answer is the exit status.
pub fn run(cli: Cli) -> i32 {
    let format = cli.format;
    let is_daemon =
        matches!(&cli.command, Some(Command::Daemon(args)) if matches!(args.command, crate::cli::DaemonCommand::Run));
    // The daemon works for many at once; a command asks one question, and starts faster on one thread.
    let runtime = if is_daemon {
        tokio::runtime::Builder::new_multi_thread().enable_all().build()
    } else {
        tokio::runtime::Builder::new_current_thread().enable_all().build()
    };
    let outcome = match runtime {
        Ok(runtime) => {
            let outcome = runtime.block_on(dispatch(cli));
            // Reading standard input may block for good; nobody waits for it any more.
            runtime.shutdown_background();
            outcome
        }
        Err(error) => Err(ApiError::new(ErrorCode::Internal, format!("no runtime: {error}"))),
    };
    outcome.unwrap_or_else(|error| {
        output::error(format, &error);
        1
    })
}

async fn dispatch(cli: Cli) -> Outcome {
    if cli.cloud_url.is_some() {
        return Err(ApiError::new(ErrorCode::Unsupported, "heyvm servers are not part of this version")
            .hint("leave --cloud-url out: sandboxes then run on this machine"));
    }
    if let Some(Command::Completions { shell }) = &cli.command {
        clap_complete::generate(*shell, &mut Cli::command(), "heyvm", &mut std::io::stdout());
        return Ok(0);
    }
    let context = Context { format: cli.format, home: background::home()? };
    if cli.api {
        return daemon::api(&context, (cli.listen, cli.port).into(), cli.allow_remote).await;
    }
    let Some(command) = cli.command else { return Ok(0) };
    match command {
        Command::Deploy(args) => make::deploy(&context, args).await,
        Command::Create(args) => make::create(&context, args).await,
        Command::Exec(args) => exec::exec(&context, args).await,
        Command::List(args) => inspect::list(&context, &args).await,
        Command::Get(who) => inspect::get(&context, &who.sandbox).await,
        Command::Logs(args) => inspect::logs(&context, &args).await,
        Command::WaitFor(args) => wait_for::wait_for(&context, args).await,
        Command::Bind(args) => ports::bind(&context, &args).await,
        Command::Unbind(args) => ports::unbind(&context, &args).await,
        Command::Stop(who) => lifecycle::stop(&context, &who.sandbox).await,
        Command::Start(who) => lifecycle::start(&context, &who.sandbox, "start").await,
        Command::Restart(who) => lifecycle::start(&context, &who.sandbox, "restart").await,
        Command::Rm(args) => lifecycle::rm(&context, &args).await,
        Command::Images(args) => images::images(&context, args).await,
        Command::Pull(args) => images::pull(&context, &args.image).await,
        Command::Cp(args) => cp::cp(&context, &args).await,
        Command::Doctor => daemon::doctor(&context).await,
        Command::Daemon(args) => daemon::daemon(&context, args.command).await,
        Command::Completions { .. } => Ok(0),
    }
}

/// A path of the API with a name or id in it, whatever its letters are.
fn path(who: &str, rest: &str) -> String {
    format!("/sandboxes/{}{rest}", encoded(who))
}

/// As it stands in a path or a query.
fn encoded(text: &str) -> String {
    url::form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>().replace('+', "%20")
}
