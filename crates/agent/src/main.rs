//! heyvm-agent: process 1 of every guest.

use std::{path::Path, process::ExitCode, sync::Arc, time::Duration};

use heyvm_agent::{Reaper, boot, connection, console, memory_guard, net, port, service::Service};

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!("heyvm-agent is process 1 of a sandbox; it does nothing anywhere else");
        return ExitCode::FAILURE;
    }
    console::report_panics();
    match boot::boot().and_then(|booted| Ok((booted, runtime()?))) {
        Ok((booted, runtime)) => runtime.block_on(run(booted)),
        Err(error) => {
            // The kernel panics now, and the host finds these words on the console.
            console::say(format_args!("cannot boot: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// A port that cannot be opened is tried again after this.
const PORT_RETRY: Duration = Duration::from_secs(1);

/// One thread for everything; others come and go with calls that read and write files.
fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(32)
        .thread_keep_alive(Duration::from_secs(1))
        .build()
}

async fn run(booted: boot::Booted) -> ! {
    let reaper = Reaper::new(true);
    tokio::spawn(Arc::clone(&reaper).run());
    tokio::spawn(memory_guard::watch());
    let service = Arc::new(Service::new(reaper, booted.cgroup));
    console::say(format_args!("ready"));
    let streams = {
        let service = Arc::clone(&service);
        move |stream| {
            let service = Arc::clone(&service);
            async move { net::streams::serve(stream, || service.is_sandbox()).await }
        }
    };
    let calls = move |stream| connection::serve(stream, Arc::clone(&service));
    tokio::join!(serve(&booted.streams, streams), serve(&booted.calls, calls)).1
}

/// Serves one host after the other at a port, without end.
async fn serve<F, R>(path: &Path, conversation: F) -> !
where
    F: Fn(port::Port) -> R,
    R: Future<Output = std::io::Result<()>> + Send + 'static,
{
    loop {
        match port::wait_for_host(path).await {
            // A connection that breaks is the host's business; it comes again.
            Ok(stream) => drop(tokio::spawn(conversation(stream)).await),
            // Not while the guest is on its way out, and nothing to die of at any other time.
            Err(error) => {
                console::say(format_args!("{}: {error}", path.display()));
                tokio::time::sleep(PORT_RETRY).await;
            }
        }
    }
}
