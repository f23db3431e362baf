//! How sessions leave the device: copied, made durable, and only then ended.

use super::slots::{Held, Live};
use super::{Copied, Registry, blocking, gone, retire};
use crate::error::Error;
use crate::faults::Fault;
use crate::session::{Cut, DrainWhenQuiet, Keep, Reason, SessionCut, SessionId};
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
        // In a task of its own: if it fails, the next session's does not.
        let actor = registry.slots.actor(id);
        let parked = tokio::spawn(async move { registry.park_expired_one(id).await }).await;
        if let Err(error) = parked {
            tracing::error!(session = %id, %error, "parking a session failed");
            // It has another lease, and is asked again when that is over.
            if let Some(actor) = actor {
                let _ = actor.send(Keep).await;
            }
        }
    }
}

impl Registry {
    async fn park_expired_one(&self, id: SessionId) {
        self.engine.stats().faults.pass(Fault::Parking);
        let mut held = self.slots.lock(id).await;
        if held.live().is_none() {
            return;
        }
        match self.park(id, &mut held, Reason::Lease).await {
            Ok(snapshot) => tracing::info!(session = %id, step = snapshot.step, "session parked"),
            // The client came back.
            Err(Error::Busy) => {}
            Err(error) => tracing::warn!(session = %id, %error, "session could not be parked"),
        }
    }

    /// Snapshots a live session and takes it off the device. If it cannot be made durable, it
    /// stays.
    pub(super) async fn park(
        &self,
        id: SessionId,
        held: &mut Held<'_>,
        reason: Reason,
    ) -> Result<SnapshotRecord, Error> {
        let live = held.live().ok_or(Error::Gone { part: "session" })?;
        let actor = live.actor.clone();
        match self.write_cut(id, &live, reason).await {
            Ok(snapshot) => {
                retire(held.put(None)).await;
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
            Reason::Lease | Reason::Close | Reason::Drain | Reason::Removed => Origin::Server,
        };
        match live.actor.send(Cut { reason }).await.map_err(gone)?? {
            SessionCut::Copied { adapters, resume } => {
                let (store, copied) = (self.store.clone(), Copied { adapters, resume });
                // Behind what the server is writing by itself, which is of an earlier point.
                let _in_turn = live.profile.writes.in_turn().await;
                blocking(move || store.add_snapshot(id, copied.encode(origin))).await
            }
            SessionCut::InStore => match origin {
                Origin::Client => self.claim_head(id).await,
                Origin::Server => self.head(id).await,
            },
        }
    }

    /// Takes no new sessions from now on, and live ones only until they are parked.
    pub fn begin_drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
        self.residency.begin_drain();
    }

    /// Lets open microbatches finish until `quiet_by`, then makes every session durable and takes
    /// it off the device. Returns how many could not be.
    pub async fn drain(self: &Arc<Self>, quiet_by: Instant) -> usize {
        self.begin_drain();
        let mut n_failed = 0;
        // Twice, for sessions that were just being opened.
        for _ in 0..2 {
            let mut all = JoinSet::new();
            for id in self.slots.ids() {
                let registry = self.clone();
                all.spawn(async move { registry.drain_one(id, quiet_by).await });
            }
            let drained = all.join_all().await;
            n_failed = drained.into_iter().filter(|durable| !durable).count();
        }
        n_failed
    }

    async fn drain_one(&self, id: SessionId, quiet_by: Instant) -> bool {
        let Some(actor) = self.slots.actor(id) else { return true };
        // Without the lock, so that a client that lost its stream can come back and finish.
        if tokio::time::timeout_at(quiet_by, actor.send(DrainWhenQuiet)).await.is_err() {
            tracing::warn!(session = %id, "drained with an open microbatch; its tape is dropped");
        }
        let mut held = self.slots.lock(id).await;
        if held.live().is_none() {
            return true;
        }
        match self.park(id, &mut held, Reason::Drain).await {
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
