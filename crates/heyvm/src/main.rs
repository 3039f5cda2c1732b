//! heyvm: the command line, the daemon, the jail launcher and the egress holder, chosen by the first argument.
//!
//! - [`cli`]: what can be asked for.  [`commands`]: one module per command.  [`output`]: text and JSON.
//! - [`daemon`]: finding or starting the daemon.  [`pack`]: a directory as an archive.  [`progress`]: on a terminal.
#![forbid(unsafe_code)]

mod cli;
mod commands;
mod daemon;
mod output;
mod pack;
mod progress;

fn main() {
    // Programs of their own, before anything else is set up: each confines itself.
    match std::env::args().nth(1).as_deref() {
        Some("jail") => heyvm_jail::main_jail(),
        Some("egress") => heyvm_jail::main_egress(),
        _ => {}
    }
    let arguments = match cli::parse(std::env::args_os().collect()) {
        Ok(arguments) => arguments,
        Err(refused) => refused.exit(),
    };
    std::process::exit(commands::run(arguments))
}
