//! One thing at a time with each VM: a `destroy` waits for a launch that is under way, even one whose caller has left.
//! The same for templates, by their keys.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, Weak},
};

use crate::VmId;

type Turn = tokio::sync::Mutex<()>;

/// Whose turn it is, for each VM that something is done with.
#[derive(Debug, Default)]
pub struct Turns {
    of: Mutex<HashMap<VmId, Weak<Turn>>>,
}

impl Turns {
    /// Waits until nothing else is done with this VM; others wait for as long as the answer is kept.
    pub async fn wait_for(&self, id: &VmId) -> tokio::sync::OwnedMutexGuard<()> {
        self.turn_of(id).lock_owned().await
    }

    fn turn_of(&self, id: &VmId) -> Arc<Turn> {
        let mut all = self.of.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        all.retain(|_, turn| turn.strong_count() > 0);
        if let Some(turn) = all.get(id).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::default();
        all.insert(id.clone(), Arc::downgrade(&turn));
        turn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn turns_of_one_vm_follow_one_another() {
        let turns = Turns::default();
        let (one, other) = ("one".to_owned(), "other".to_owned());
        let held = turns.wait_for(&one).await;
        let _not_held_up = turns.wait_for(&other).await;
        let mut waiting = Box::pin(turns.wait_for(&one));
        assert!(futures::poll!(&mut waiting).is_pending());
        drop(held);
        drop(waiting.await);
        assert_eq!(turns.of.lock().unwrap().len(), 2);
        let _ = turns.wait_for(&"third".to_owned()).await;
        assert!(!turns.of.lock().unwrap().contains_key(&one), "what nobody waits for is forgotten");
    }
}
