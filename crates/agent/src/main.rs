//! heyvm-agent: process 1 of every guest.

use std::{process::ExitCode, sync::Arc};

use heyvm_agent::{Reaper, boot, connection, console, port, service::Service};

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!("heyvm-agent is process 1 of a sandbox; it does nothing anywhere else");
        return ExitCode::FAILURE;
    }
    console::report_panics();
    match boot::boot().and_then(|booted| runtime()?.block_on(run(booted))) {
        Ok(never) => match never {},
        Err(error) => {
            // The kernel panics now, and the host finds these words on the console.
            console::say(format_args!("cannot go on: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// One thread for everything; others come and go with calls that read and write files.
fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(32)
        .thread_keep_alive(std::time::Duration::from_secs(1))
        .build()
}

async fn run(booted: boot::Booted) -> std::io::Result<std::convert::Infallible> {
    let reaper = Reaper::new(true);
    tokio::spawn(Arc::clone(&reaper).run());
    let service = Arc::new(Service::new(reaper, booted.cgroup));
    console::say(format_args!("ready"));
    loop {
        let stream = port::wait_for_host(&booted.port).await?;
        // A connection that breaks is the host's business; it comes again.
        let _ = tokio::spawn(connection::serve(stream, Arc::clone(&service))).await;
    }
}
