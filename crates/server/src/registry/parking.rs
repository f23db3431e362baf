//! How sessions leave the device: copied, made durable, and only then ended.

use super::slots::{Held, Live};
use super::{Copied, Registry, blocking, gone, retire};
use crate::error::Error;
use crate::faults::Fault;
use crate::session::{Cut, Keep, Reason, SessionCut, SessionId};
use crate::store::{Origin, SnapshotRecord, Why};
use std::sync::Weak;
use tokio::sync::mpsc;

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
                self.meter_left(id, reason.left()).await;
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
        let why = match reason {
            Reason::Snapshot { .. } => Why::Client,
            Reason::Lease => Why::Lease,
            Reason::Close => Why::Closed,
            Reason::Drain => Why::Drain,
            Reason::Removed => Why::Removed,
        };
        match live.actor.send(Cut { reason }).await.map_err(gone)?? {
            SessionCut::Copied { adapters, resume } => {
                let (store, copied) = (self.store.clone(), Copied { adapters, resume });
                // Behind what the server is writing by itself, which is of an earlier point.
                let _in_turn = live.profile.writes.in_turn().await;
                blocking(move || store.add_snapshot(id, copied.encode(why))).await
            }
            SessionCut::InStore => match why.origin() {
                Origin::Client => self.claim_head(id).await,
                Origin::Server => self.head(id).await,
            },
        }
    }
}
