//! Notices a guest that stands still. QEMU reports a guest that powers off, resets or panics into a reset; a guest that
//! halts its processors, or loops in its panic, looks to QEMU like one that is idle or busy.
//!
//! Being late is never a sign: a guest on a busy host may be as slow as it likes.

use std::time::Duration;

use heyvm_agent_protocol::v1::MetricsRequest;
use tonic::Code;

use super::{
    console,
    qmp::{Ended, Qmp},
};
use crate::AgentConnection;

/// Pause between two looks. Two of them must agree, within the ten seconds in which an end is promised to be noticed.
const PAUSE: Duration = Duration::from_secs(3);
/// A guest whose console shows a panic may only have printed the words: then its agent answers.
const ANSWER_DEADLINE: Duration = Duration::from_secs(4);

/// Resolves when the guest can do nothing any more.
pub async fn stands_still(qmp: &Qmp, agent: &AgentConnection) -> Ended {
    let mut halted_before = false;
    loop {
        tokio::time::sleep(PAUSE).await;
        // An event may have come while its meaning could not be asked for.
        if let Ok(Some(ended)) = qmp.ended().await {
            return ended;
        }
        let halted = qmp.is_halted_for_good().await.unwrap_or(false);
        if halted && halted_before {
            return Ended::Halted;
        }
        halted_before = halted;
        if qmp.console().await.is_ok_and(|text| console::shows_panic(&text)) && !answers(agent).await {
            return Ended::Panicked;
        }
    }
}

async fn answers(agent: &AgentConnection) -> bool {
    let asked = async { agent.client().await.ok()?.metrics(MetricsRequest {}).await.err().map(|status| status.code()) };
    matches!(tokio::time::timeout(ANSWER_DEADLINE, asked).await, Ok(None | Some(Code::FailedPrecondition)))
}
