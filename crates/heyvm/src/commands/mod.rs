//! One module per command, its arguments beside it. Each asks the daemon and tells what it answered; none holds logic
//! of its own.

pub mod archives;
pub mod bind;
pub mod completions;
pub mod cp;
pub mod daemon;
pub mod deploy;
pub mod exec;
pub mod images;
pub mod lifecycle;
pub mod list;
pub mod login;
pub mod logs;
pub mod mount;
pub mod port_forward;
pub mod server;
pub mod set;
pub mod wait_for;

use std::path::PathBuf;

use heyvm_api::{ApiError, ErrorCode, client::Client};

use crate::{
    archive::Compression,
    background,
    cli::{Cli, Command},
    credentials::Cloud,
    output,
    output::Format,
};

/// What every command has at hand.
pub struct Context {
    format: Format,
    home: PathBuf,
    debug: bool,
    cloud: Option<Cloud>,
}

impl Context {
    /// A client of the server that there is a login for, else of this machine's daemon.
    async fn client(&self) -> Result<Client, ApiError> {
        match &self.cloud {
            Some(cloud) => cloud.client(&self.home).await,
            None => self.daemon().await,
        }
    }

    /// How archives are compressed: a daemon of the same version takes what is fastest.
    fn compression(&self) -> Compression {
        if self.cloud.is_some() { Compression::Gzip } else { Compression::Zstd }
    }

    /// A client of this machine's daemon, which is started when there is none.
    async fn daemon(&self) -> Result<Client, ApiError> {
        background::ensure(&self.home, self.debug).await
    }
}

type Outcome = Result<i32, ApiError>;

/// Runs the command; the answer is the exit status.
pub fn run(cli: Cli) -> i32 {
    let format = cli.global.format;
    let is_daemon = match &cli.command {
        Some(Command::Daemon(args)) => args.is_run(),
        Some(Command::Server(args)) => args.is_run(),
        _ => false,
    };
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
    if let Some(Command::Completions(args)) = &cli.command {
        return completions::completions(cli.global.format, args);
    }
    let home = background::home()?;
    let cloud = match cli.command {
        // Neither needs a server that can be understood, to end or to mend a login.
        Some(Command::Logout | Command::Daemon(_) | Command::Server(_) | Command::Doctor) | None => None,
        _ => Cloud::of(&cli.global, &home)?,
    };
    let context = Context { format: cli.global.format, home, debug: cli.global.debug, cloud };
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
        Command::PortForward(args) => port_forward::port_forward(&context, args).await,
        Command::Logs(args) => logs::logs(&context, &args).await,
        Command::Stop(several) => lifecycle::stop(&context, &several.sandboxes).await,
        Command::Start(several) => lifecycle::start(&context, &several.sandboxes).await,
        Command::Restart(several) => lifecycle::restart(&context, &several.sandboxes).await,
        Command::Resize(args) => lifecycle::resize(&context, args).await,
        Command::Checkpoint(who) => lifecycle::checkpoint(&context, &who.sandbox).await,
        Command::Restore(who) => lifecycle::restore(&context, &who.sandbox).await,
        Command::Set(args) => set::set(&context, args).await,
        Command::EditTtl(args) => set::edit_ttl(&context, args).await,
        Command::Recover(args) => lifecycle::recover(&context, args).await,
        Command::Rm(args) => lifecycle::rm(&context, &args).await,
        Command::Images(args) => images::images(&context, args).await,
        Command::Pull(args) => images::pull(&context, &args.image).await,
        Command::MountAdd(args) => mount::mount_add(&context, &args).await,
        Command::Cp(args) => cp::cp(&context, &args).await,
        Command::Archive(args) => archives::archive(&context, args).await,
        Command::ArchiveDir(args) => archives::archive_dir(&context, args).await,
        Command::ListArchives(args) => archives::list_archives(&context, &args).await,
        Command::PruneArchives => archives::prune_archives(&context).await,
        Command::DeleteArchive(args) => archives::delete_archive(&context, &args.archive).await,
        Command::Update(args) => archives::update(&context, &args).await,
        Command::Login(args) => login::login(&context, args).await,
        Command::Logout => login::logout(&context).await,
        Command::Whoami => login::whoami(&context).await,
        Command::Doctor => daemon::doctor(&context).await,
        Command::Daemon(args) => daemon::daemon(&context, args.command).await,
        Command::Server(args) => server::server(&context, args).await,
        Command::Version => {
            let version = env!("CARGO_PKG_VERSION");
            output::answer(context.format, &serde_json::json!({"version": version}), || format!("heyvm {version}"));
            Ok(0)
        }
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
