//! heyvm: the command line, the daemon, the jail launcher and the egress holder, chosen by the first argument.
//!
//! - [`cli`]: what can be asked for.  [`arguments`]: from words to that.  [`commands`]: one module per command.
//! - [`background`]: finding or starting the daemon.  [`service`]: starting it at boot.
//! - [`credentials`], [`password`]: of a heyvm server.  [`archive`]: a directory as an archive.
//! - [`outgoing`]: bytes that are sent while they are made.
//! - [`output`]: text and JSON.  [`spool`]: output too large for memory.  [`progress`]: on a terminal.
#![forbid(unsafe_code)]

mod archive;
mod arguments;
mod background;
mod cli;
mod commands;
mod credentials;
mod outgoing;
mod output;
mod password;
mod progress;
mod service;
mod spool;

fn main() {
    heyvm_jail::signals::pass_none_on();
    // Programs of their own, before anything else is set up: each confines itself.
    match std::env::args_os().nth(1).as_deref().and_then(std::ffi::OsStr::to_str) {
        Some("jail") => heyvm_jail::main_jail(),
        Some("egress") => heyvm_jail::main_egress(),
        Some("daemon") => heyvm_jail::process::close_inherited(),
        _ => {}
    }
    clap_complete::CompleteEnv::with_factory(<cli::Cli as clap::CommandFactory>::command)
        .var(commands::completions::VARIABLE)
        .complete();
    let status = match arguments::parse(std::env::args_os().collect()) {
        Ok(cli) => commands::run(cli),
        Err(refused) => refused.tell(),
    };
    std::process::exit(status)
}
