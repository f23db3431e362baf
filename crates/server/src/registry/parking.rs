//! How sessions leave the device: copied, made durable, and only then ended.

use super::{Live, Registry, blocking, gone, live, retire, snapshot};
use crate::error::Error;
use crate::session::{Cut, DrainWhenQuiet, Keep, Reason, SessionId};
use crate::store::{Origin, SnapshotRecord};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Parks sessions as their leases end.
pub(super) async fn park_expired(registry: Weak<Registry>, mut expired: mpsc::Receiver<SessionId>) {
    while let Some(id) = expired.recv().await {
        let Some(registry) = registry.upgrade() else { return };
        let slot = registry.slot(id);
        let mut slot = slot.lock().await;
        if live(&slot).is_none() {
            continue;
        }
        match registry.park(id, &mut slot, Reason::Lease).await {
            Ok(snapshot) => tracing::info!(session = %id, step = snapshot.step, "session parked"),
            // The client came back.
            Err(Error::Busy) => {}
            Err(error) => tracing::warn!(session = %id, %error, "session could not be parked"),
        }
    }
}

impl Registry {
    /// Snapshots a live session and takes it off the device. If it cannot be made durable, it
    /// stays.
    pub(super) async fn park(
        &self,
        id: SessionId,
        slot: &mut Option<Live>,
        reason: Reason,
    ) -> Result<SnapshotRecord, Error> {
        let live = live(slot).ok_or(Error::Gone { part: "session" })?;
        let actor = live.actor.clone();
        match self.write_cut(id, live, reason).await {
            Ok(snapshot) => {
                retire(slot.take()).await;
                Ok(snapshot)
            }
            // It was not ended, or not by this.
            Err(Error::Busy) => Err(Error::Busy),
            Err(error) => {
                actor.send(Keep).await.map_err(gone)?;
                Err(error)
            }
        }
    }

    pub(super) async fn write_cut(
        &self,
        id: SessionId,
        live: &Live,
        reason: Reason,
    ) -> Result<SnapshotRecord, Error> {
        let origin = match reason {
            Reason::Snapshot { .. } => Origin::Client,
            Reason::Lease | Reason::Close | Reason::Drain => Origin::Server,
        };
        let cut = live.actor.send(Cut { reason }).await.map_err(gone)??;
        let copied = snapshot::Copied { adapters: cut.adapters, resume: cut.resume };
        let store = self.store.clone();
        blocking(move || store.add_snapshot(id, copied.encode(origin))).await
    }

    /// Takes no new sessions from now on, and live ones only until they are parked.
    pub fn begin_drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Lets open microbatches finish until `quiet_by`, then makes every session durable and takes
    /// it off the device. Returns how many could not be.
    pub async fn drain(self: &Arc<Self>, quiet_by: Instant) -> usize {
        self.begin_drain();
        let mut n_failed = 0;
        // Twice, for sessions that were just being opened.
        for _ in 0..2 {
            let ids: Vec<SessionId> = self.sessions.iter().map(|entry| *entry.key()).collect();
            let mut all = JoinSet::new();
            for id in ids {
                let registry = self.clone();
                all.spawn(async move { registry.drain_one(id, quiet_by).await });
            }
            let drained = all.join_all().await;
            n_failed = drained.into_iter().filter(|durable| !durable).count();
        }
        n_failed
    }

    async fn drain_one(&self, id: SessionId, quiet_by: Instant) -> bool {
        let slot = self.slot(id);
        let actor = live(&*slot.lock().await).map(|live| live.actor.clone());
        let Some(actor) = actor else { return true };
        // Without the lock, so that a client that lost its stream can come back and finish.
        if tokio::time::timeout_at(quiet_by, actor.send(DrainWhenQuiet)).await.is_err() {
            tracing::warn!(session = %id, "drained with an open microbatch; its tape is dropped");
        }
        let mut slot = slot.lock().await;
        if live(&slot).is_none() {
            return true;
        }
        match self.park(id, &mut slot, Reason::Drain).await {
            Ok(snapshot) => {
                tracing::info!(session = %id, step = snapshot.step, "session parked");
                true
            }
            Err(error) => {
                tracing::error!(session = %id, %error, "session could not be made durable");
                false
            }
        }
    }
}
