//! What becomes of the sessions of a tenant who was taken out of the tenants file: they are saved
//! and parked, and stay in the store, for when he comes back.

use super::Registry;
use crate::error::Error;
use crate::session::{Reason, SessionId};
use std::sync::{Arc, Weak};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Looks after each change of the tenants, as long as the registry is there.
pub(super) async fn park_removed(registry: Weak<Registry>, mut changes: watch::Receiver<u64>) {
    while changes.changed().await.is_ok() {
        let Some(registry) = registry.upgrade() else { return };
        registry.park_without_tenant().await;
    }
}

impl Registry {
    /// Says at the start how many sessions nobody can reach.
    pub(super) fn count_unreachable(&self) {
        let n = self.owners.count_others(|tenant| self.access.tenant(tenant).is_some());
        if n > 0 {
            tracing::warn!(
                sessions = n,
                "sessions in the store belong to nobody in the tenants file, and nobody sees them; they \
                 come back with their tenant's name, or, if they were made without a tenants file, \
                 without one"
            );
        }
    }

    async fn park_without_tenant(self: &Arc<Self>) {
        let mut all = JoinSet::new();
        for id in self.slots.ids() {
            let tenant = self.owners.of(id);
            if tenant.is_some_and(|tenant| self.access.tenant(&tenant).is_none()) {
                let registry = self.clone();
                all.spawn(async move { registry.park_removed(id).await });
            }
        }
        all.join_all().await;
    }

    async fn park_removed(&self, id: SessionId) {
        let mut held = self.slots.lock(id).await;
        if held.live().is_none() {
            return;
        }
        match self.park(id, &mut held, Reason::Removed).await {
            Ok(snapshot) => {
                tracing::info!(session = %id, step = snapshot.step, "session of a removed tenant parked");
            }
            // Something else ends it.
            Err(Error::Busy) => {}
            Err(error) => tracing::error!(session = %id, %error, "session could not be parked"),
        }
    }
}
