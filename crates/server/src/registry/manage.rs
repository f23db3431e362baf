//! What may be done to a session that is not trained by it: it leaves the device, stays there, loses a
//! snapshot, or is deleted.

use super::{ManagedSession, Registry, blocking, end};
use crate::access::Caller;
use crate::error::Error;
use crate::meter::Left;
use crate::residency::{Tier, WeightShare};
use crate::session::{ComeBack, GoOn, HoldBack, Leave, SessionId};
use crate::store::Record;
use std::time::{Duration, Instant};

/// How long a session may take to come to the end of what it has begun.
const EVICT_WAIT: Duration = Duration::from_secs(30);
/// Between two tries, if something else moved the session meanwhile.
const EVICT_PAUSE: Duration = Duration::from_millis(50);

impl Registry {
    /// Takes a session off the device as soon as no frame of it is in flight and no microbatch is open;
    /// what it would begin meanwhile waits, and brings it back then.
    pub async fn evict(&self, session: ManagedSession) -> Result<(), Error> {
        let id = session.id();
        self.record(id).await?;
        let evicted = self.evict_within(id, Instant::now() + EVICT_WAIT).await;
        if let Some(live) = self.slots.live(id) {
            // One that has ended meanwhile holds nothing back.
            let _ = live.actor.send(GoOn).await;
        }
        evicted
    }

    async fn evict_within(&self, id: SessionId, deadline: Instant) -> Result<(), Error> {
        let seconds = EVICT_WAIT.as_secs();
        loop {
            let Some(live) = self.slots.live(id) else { return Ok(()) };
            if live.profile.pinned.is_pinned() {
                return Err(Error::Pinned { session: id });
            }
            let still = live.actor.send(HoldBack { at_most: EVICT_WAIT + EVICT_PAUSE });
            // Without the session's lock, so that its client can come back and finish.
            if tokio::time::timeout_at(deadline.into(), still).await.is_err() {
                return Err(Error::StaysBusy { session: id, seconds });
            }
            let held = self.slots.lock(id).await;
            let Some(live) = held.live() else { return Ok(()) };
            if live.profile.glance.view().tier != Tier::Device {
                return Ok(());
            }
            match live.actor.send(Leave).await {
                Ok(Ok(())) => return Ok(()),
                // It moves, or is copied.
                Ok(Err(Error::Busy)) => {}
                Ok(Err(error)) => return Err(error),
                // It ended, and has nothing on the device.
                Err(_) => return Ok(()),
            }
            drop(held);
            if Instant::now() >= deadline {
                return Err(Error::StaysBusy { session: id, seconds });
            }
            tokio::time::sleep(EVICT_PAUSE).await;
        }
    }

    /// Keeps a live session on the device until it is unpinned or parked; one that is away comes back as
    /// soon as there is room.
    pub async fn pin(&self, session: ManagedSession, caller: &Caller) -> Result<(), Error> {
        let id = session.id();
        let held = self.slots.lock(id).await;
        self.record(id).await?;
        let live = held.live().ok_or(Error::PinParked { session: id })?;
        self.residency.pin(&live.profile, self.weight_share(caller))?;
        // One that ends meanwhile has no pin any more.
        let _ = live.actor.send(ComeBack).await;
        Ok(())
    }

    /// What a tenant may have of the room that everybody shares; none for who may give it away.
    fn weight_share(&self, caller: &Caller) -> Option<WeightShare> {
        if caller.is_operator() {
            return None;
        }
        let all = self.access.tenants().iter().map(|tenant| u64::from(tenant.weight)).sum();
        Some(WeightShare { own: caller.tenant.weight.into(), all })
    }

    /// Lets a session come and go by itself again.
    pub async fn unpin(&self, session: ManagedSession) -> Result<(), Error> {
        let id = session.id();
        let held = self.slots.lock(id).await;
        self.record(id).await?;
        if let Some(live) = held.live() {
            live.profile.pinned.end();
        }
        Ok(())
    }

    /// Ends a session and deletes it with all its snapshots.
    pub async fn forget(&self, session: ManagedSession) -> Result<(), Error> {
        let id = session.id();
        let mut held = self.slots.lock(id).await;
        self.head(id).await?;
        end(held.put(None)).await;
        let store = self.store.clone();
        self.meter_left(id, Left::Forgotten).await;
        blocking(move || store.forget(id)).await?;
        self.owners.remove(id);
        tracing::info!(session = %id, "session forgotten");
        Ok(())
    }

    /// A session's record, with its snapshots.
    pub async fn stored(&self, session: ManagedSession) -> Result<Record, Error> {
        self.record(session.id()).await
    }

    /// Deletes one snapshot of a session, but for the one that it goes on from.
    pub async fn delete_snapshot(
        &self,
        session: ManagedSession,
        snapshot: String,
    ) -> Result<(), Error> {
        let id = session.id();
        let held = self.slots.lock(id).await;
        // Nothing that is written or read meanwhile is of this one.
        let _in_turn = match held.live() {
            Some(live) => Some(live.profile.writes.in_turn().await),
            None => None,
        };
        let store = self.store.clone();
        blocking(move || store.delete_snapshot(id, &snapshot)).await
    }
}
