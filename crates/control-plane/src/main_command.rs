//! A start command in a running VM, followed to its end: what it prints goes into the log.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use heyvm_agent_protocol::v1::{EnvVar, ExecStart, Exit, MainEvent, StartMainRequest, WatchMainRequest, main_event};
use heyvm_api::ApiError;
use heyvm_vm::{AgentConnection, Vm};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    ControlPlane, ProgressSink, Sandbox, begin_step, errors,
    guest_command::Tail,
    supervised::{self, Panicked},
};

/// Pause before an agent that did not answer is asked again.
const RETRY: Duration = Duration::from_millis(500);
/// What the agent has of the past comes within this time; the pauses in it are shorter than the other.
const PAST: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(300);

/// How following a start command ended.
#[derive(Clone)]
pub(crate) enum Followed {
    /// With its end.
    Exited(Exit),
    /// With a panic of ours: its end will never be known.
    Lost(Panicked),
}

/// A start command that is followed for as long as this is kept.
pub(crate) struct Main {
    end: watch::Receiver<Option<Followed>>,
    _following: AbortOnDropHandle<()>,
}

impl Main {
    /// Resolves when the start command has ended and all it printed is in the log.
    pub async fn ended(&mut self) -> Followed {
        match self.end.wait_for(Option::is_some).await.map(|end| end.clone()) {
            Ok(Some(end)) => end,
            // Its VM is no longer the sandbox's: its end matters to no one.
            _ => std::future::pending().await,
        }
    }
}

impl ControlPlane {
    /// Starts the start command, or else what the image runs by itself, where there is either.
    pub(crate) async fn run_start_command(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        vm: &Arc<dyn Vm>,
        progress: &ProgressSink,
    ) -> Result<Option<Main>, ApiError> {
        let record = sandbox.snapshot();
        let (argv, shell, stop_signal) = match record.start_command.clone() {
            Some(command) => {
                begin_step(sandbox, progress, "start_command", &command.to_string());
                let shell = command.is_script();
                (command.into_words(), shell, 0)
            }
            None if record.runs_the_images_command() => {
                let image_run = record.image_run.clone();
                begin_step(sandbox, progress, "start_command", &image_run.command.join(" "));
                (image_run.command, false, image_run.stop_signal)
            }
            None => return Ok(None),
        };
        let port = record.open_ports.first().filter(|_| !record.env_vars.contains_key("PORT"));
        let env = port.map(|port| EnvVar { name: "PORT".into(), value: port.to_string() }).into_iter().collect();
        let start = ExecStart { argv, shell, env, ..ExecStart::default() };
        let mut client = vm.agent().client().await.map_err(errors::vm)?;
        self.begin_log(sandbox).await;
        let request = StartMainRequest { start: Some(start), stop_signal };
        client.start_main(request).await.map_err(|status| errors::agent(&status).step("start_command"))?;
        Ok(Some(self.follow(sandbox, vm)))
    }

    /// Follows the start command from where the log ends.
    pub(crate) fn follow(self: &Arc<Self>, sandbox: &Arc<Sandbox>, vm: &Arc<dyn Vm>) -> Main {
        let (ended, end) = watch::channel(None);
        let (plane, sandbox, vm) = (Arc::clone(self), Arc::clone(sandbox), Arc::clone(vm));
        let following = tokio::spawn(async move {
            let following = plane.follow_to_the_end(&sandbox, &vm);
            let followed = match supervised::run("following the start command", following).await {
                Ok(exit) => exit.map(Followed::Exited),
                Err(panicked) => Some(Followed::Lost(panicked)),
            };
            if followed.is_some() {
                ended.send_replace(followed);
            }
        });
        Main { end, _following: AbortOnDropHandle::new(following) }
    }

    /// An agent that does not answer is asked again, as long as its VM is the sandbox's: the next one would answer for
    /// another run. The VM's own end is seen elsewhere.
    async fn follow_to_the_end(&self, sandbox: &Sandbox, vm: &Arc<dyn Vm>) -> Option<Exit> {
        while sandbox.vm().is_some_and(|now| Arc::ptr_eq(&now, vm)) {
            let offset = sandbox.log_offset.load(Ordering::Relaxed);
            if let Ok(mut events) = watch_main(&vm.agent(), offset).await {
                while let Ok(Some(event)) = events.message().await {
                    match event.kind {
                        Some(main_event::Kind::Log(log)) => {
                            self.append_log(sandbox, log.stderr, log.offset, log.data).await;
                        }
                        Some(main_event::Kind::Exit(exit)) => return Some(exit),
                        None => {}
                    }
                }
            }
            tokio::time::sleep(RETRY).await;
        }
        None
    }
}

async fn watch_main(agent: &AgentConnection, from_offset: u64) -> Result<tonic::Streaming<MainEvent>, ApiError> {
    let mut client = agent.client().await.map_err(errors::vm)?;
    let events = client.watch_main(WatchMainRequest { from_offset }).await.map_err(|status| errors::agent(&status))?;
    Ok(events.into_inner())
}

/// The end of what this run of the start command has printed so far. A guest that prints without end, or does not answer
/// any more, costs neither time nor memory.
pub(crate) async fn tail_of_this_run(agent: &AgentConnection) -> Vec<String> {
    let mut output = Tail::default();
    let reading = async {
        let Ok(mut events) = watch_main(agent, 0).await else { return };
        // What is there comes at once; a running command's stream never ends.
        while let Ok(Ok(Some(event))) = tokio::time::timeout(PAUSE, events.message()).await {
            match event.kind {
                Some(main_event::Kind::Log(log)) => output.add(&log.data),
                _ => break,
            }
        }
    };
    tokio::time::timeout(PAST, reading).await.ok();
    output.lines()
}
