//! A new version takes the place of the living sandbox of its name: name and URLs change hands in one step of the store.

use std::{sync::Arc, time::Duration};

use heyvm_api::{
    ApiError,
    sandbox::{ReasonCode, Status},
};

use crate::{Account, ControlPlane, Sandbox, errors, orphans, record};

/// Answers of the old one that are on their way get this long.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

impl ControlPlane {
    pub(crate) fn living_named(&self, name: &str, account: &Account) -> Option<Arc<Sandbox>> {
        self.all().into_iter().find(|sandbox| {
            let record = sandbox.record();
            record.name == name && record.account == *account && record.holds_its_name()
        })
    }

    /// Whether there was one to be replaced.
    pub(crate) async fn take_the_place_of_its_namesake(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
    ) -> Result<bool, ApiError> {
        let record = sandbox.snapshot();
        while let Some(old) = self.living_named(&record.name, &record.account).filter(|_| record.waiting_to_replace) {
            let _no_transition_of_the_old = old.transition.lock().await;
            // It may have ended while it was waited for.
            if old.record().holds_its_name() {
                self.take_the_place_of(&old, sandbox).await?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// In one step of the store the new one has the name and the old one's URLs; then the old one goes.
    async fn take_the_place_of(self: &Arc<Self>, old: &Arc<Sandbox>, new: &Arc<Sandbox>) -> Result<(), ApiError> {
        // Both are held until store and memory say the same again, whatever else changes their records.
        let saving = (Arc::clone(&old.saving).lock_owned().await, Arc::clone(&new.saving).lock_owned().await);
        let (mut old_record, mut new_record) = (old.snapshot(), new.snapshot());
        let reason = record::reason(ReasonCode::Replaced, format!("replaced by {}", new_record.id));
        old_record.removing = true;
        old_record.enter(Status::Stopping, Some(reason.clone()));
        new_record.waiting_to_replace = false;
        new_record.run();
        let _no_port_is_bound_meanwhile = self.binding.lock().await;
        let mut moved = self.rows_of(&old_record.id);
        moved.retain(|row| new_record.open_ports.contains(&row.port));
        // A private one is not opened by leaving it out.
        moved.iter_mut().for_each(|row| row.is_public = new_record.ports_are_public.unwrap_or(row.is_public));
        (old_record.revision, new_record.revision) = (old_record.revision + 1, new_record.revision + 1);
        self.store.replace(&old_record.row(), &new_record.row(), &moved).await.map_err(errors::store)?;
        self.move_endpoints(&old_record.id, &new_record.id, moved);
        self.book.publish(old, old_record.clone());
        self.book.publish(new, new_record.clone());
        self.update_local_ports().await;
        for record in [&old_record, &new_record] {
            orphans::keep_note(self.driver.as_ref(), &self.store_id, record).await;
        }
        drop(saving);
        let (plane, old) = (Arc::clone(self), Arc::clone(old));
        tokio::spawn(async move {
            tokio::time::sleep(LAST_ANSWERS).await;
            let _one_transition = old.transition.lock().await;
            if let Err(error) = plane.destroy(&old, reason).await {
                tracing::error!(%error, "a replaced sandbox could not be removed");
            }
        });
        Ok(())
    }
}
