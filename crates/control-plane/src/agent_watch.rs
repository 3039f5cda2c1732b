//! Whether the agent of an adopted VM answers. One that does not ends nothing: the sandbox counts as running with an
//! unresponsive agent, which is asked again until it answers or its VM ends.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use heyvm_agent_protocol::v1::MetricsRequest;
use heyvm_vm::{AgentConnection, Vm};

use crate::{ControlPlane, Sandbox};

/// An agent answers within milliseconds; on a busy host it takes longer.
const DEADLINE: Duration = Duration::from_secs(10);
/// First and longest pause before it is asked again.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

impl ControlPlane {
    /// Asks until the agent has answered once: from then on calls show by themselves whether it does.
    pub(crate) fn watch_agent(&self, sandbox: &Arc<Sandbox>, vm: &Arc<dyn Vm>) {
        let (book, sandbox, vm) = (Arc::clone(&self.book), Arc::clone(sandbox), Arc::clone(vm));
        tokio::spawn(async move {
            let mut pause = FIRST_PAUSE;
            loop {
                let answers = tokio::time::timeout(DEADLINE, answers(&vm.agent())).await.unwrap_or(false);
                sandbox.agent_is_silent.store(!answers, Ordering::Relaxed);
                book.changes.stamp(&sandbox.changed_at);
                sandbox.changed.send_replace(());
                if answers {
                    return;
                }
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    _ = vm.exited() => break,
                }
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            sandbox.agent_is_silent.store(false, Ordering::Relaxed);
        });
    }
}

async fn answers(agent: &AgentConnection) -> bool {
    match agent.client().await {
        Ok(mut client) => client.metrics(MetricsRequest {}).await.is_ok(),
        Err(_) => false,
    }
}
