//! One module per command, its arguments beside it. Each asks the daemon and tells what it answered; none holds logic
//! of its own.

pub mod bind;
pub mod completions;
pub mod cp;
pub mod daemon;
pub mod deploy;
pub mod exec;
pub mod images;
pub mod lifecycle;
pub mod list;
pub mod logs;
pub mod wait_for;

use std::path::PathBuf;

use heyvm_api::{ApiError, ErrorCode, client::Client};

use crate::{
    background,
    cli::{Cli, Command},
    output,
    output::Format,
};

/// What every command has at hand.
pub struct Context {
    format: Format,
    home: PathBuf,
    debug: bool,
}

impl Context {
    /// A client of the daemon, which is started when there is none.
    async fn client(&self) -> Result<Client, ApiError> {
        background::ensure(&self.home, self.debug).await
    }
}

type Outcome = Result<i32, ApiError>;

/// Runs the command; the answer is the exit status.
pub fn run(cli: Cli) -> i32 {
    let format = cli.global.format;
    let is_daemon = matches!(&cli.command, Some(Command::Daemon(args)) if args.is_run());
    // The daemon works for many at once; a command asks one question, and starts faster on one thread.
    let runtime = if is_daemon || cli.serve.api {
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
    if cli.global.cloud_url.is_some() {
        return Err(ApiError::new(ErrorCode::Unsupported, "heyvm servers are not part of this version")
            .hint("leave --cloud-url out: sandboxes then run on this machine"));
    }
    if let Some(Command::Completions(args)) = &cli.command {
        return completions::completions(cli.global.format, args);
    }
    let context = Context { format: cli.global.format, home: background::home()?, debug: cli.global.debug };
    let Some(command) = cli.command else { return daemon::api(&context, &cli.serve).await };
    if cli.serve.api {
        return Err(ApiError::new(ErrorCode::InvalidArgument, "--api serves and runs no command")
            .hint("leave out --api, or the command"));
    }
    match command {
        Command::Deploy(args) => deploy::deploy(&context, args).await,
        Command::Create(args) => deploy::create(&context, args).await,
        Command::Exec(args) => exec::exec(&context, args).await,
        Command::List(args) => list::list(&context, &args).await,
        Command::Get(who) => list::get(&context, &who.sandbox).await,
        Command::WaitFor(args) => wait_for::wait_for(&context, args).await,
        Command::Bind(args) => bind::bind(&context, &args).await,
        Command::Unbind(args) => bind::unbind(&context, &args).await,
        Command::Logs(args) => logs::logs(&context, &args).await,
        Command::Stop(who) => lifecycle::stop(&context, &who.sandbox).await,
        Command::Start(who) => lifecycle::start(&context, &who.sandbox, "start").await,
        Command::Restart(who) => lifecycle::start(&context, &who.sandbox, "restart").await,
        Command::Rm(args) => lifecycle::rm(&context, &args).await,
        Command::Images(args) => images::images(&context, args).await,
        Command::Pull(args) => images::pull(&context, &args.image).await,
        Command::Cp(args) => cp::cp(&context, &args).await,
        Command::Doctor => daemon::doctor(&context).await,
        Command::Daemon(args) => daemon::daemon(&context, args.command).await,
        Command::Completions(_) => Ok(0),
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
