//! What becomes of the sessions when all that was on the device is lost.

use super::Registry;
use crate::session::{Lost, SessionId};
use std::sync::Arc;
use tokio::task::JoinSet;

impl Registry {
    /// Ends every live session: what it had on the device is gone, and nobody can say of what is under
    /// way how far it came. Its client finds it at its last snapshot. Under each session's lock, so that
    /// what moves or writes it has ended before. How many there were.
    pub async fn lose_device(self: &Arc<Self>) -> usize {
        let mut all = JoinSet::new();
        for id in self.slots.ids() {
            // Those without an actor are being made, and fail by themselves.
            if self.slots.actor(id).is_some() {
                let registry = self.clone();
                all.spawn(async move { registry.lose_one(id).await });
            }
        }
        all.join_all().await.len()
    }

    async fn lose_one(&self, id: SessionId) {
        let mut held = self.slots.lock(id).await;
        if let Some(live) = held.put(None) {
            // One that has died already is fine, too.
            let _ = live.actor.send(Lost).await;
            // What was being written of it has landed.
            drop(live.profile.writes.in_turn().await);
        }
    }
}
