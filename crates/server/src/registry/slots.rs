use crate::residency::Profile;
use crate::session::{SessionActor, SessionId};
use actix::Addr;
use dashmap::DashMap;
use std::sync::Arc;
use tokio::sync::{Mutex, OwnedMutexGuard};

/// A session that has an actor.
#[derive(Clone)]
pub struct Live {
    pub actor: Addr<SessionActor>,
    pub profile: Arc<Profile>,
}

type Slot = Arc<Mutex<Option<Live>>>;

/// The sessions that are live or in use, each behind its own lock: what makes, moves or ends a
/// session's actor holds it. Frames do not come this way.
#[derive(Default)]
pub struct Slots(DashMap<SessionId, Slot>);

/// A session's slot, locked. What is left empty is taken out when the last holder drops it, so that
/// forged ids take no memory.
pub struct Held<'a> {
    slots: &'a Slots,
    id: SessionId,
    guard: Option<OwnedMutexGuard<Option<Live>>>,
}

impl Slots {
    /// Waits for a session's slot.
    pub async fn lock(&self, id: SessionId) -> Held<'_> {
        let slot = self.0.entry(id).or_default().clone();
        Held { slots: self, id, guard: Some(slot.lock_owned().await) }
    }

    /// A session's slot, unless somebody has it or it is empty.
    pub fn try_lock(&self, id: SessionId) -> Option<Held<'_>> {
        let slot = self.0.get(&id)?.clone();
        Some(Held { slots: self, id, guard: Some(slot.try_lock_owned().ok()?) })
    }

    /// The actor of a live session.
    pub async fn actor(&self, id: SessionId) -> Option<Addr<SessionActor>> {
        if !self.0.contains_key(&id) {
            return None;
        }
        self.lock(id).await.live().map(|live| live.actor.clone())
    }

    /// All that are in there now.
    pub fn ids(&self) -> Vec<SessionId> {
        self.0.iter().map(|entry| *entry.key()).collect()
    }

    /// How many.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

impl Held<'_> {
    /// What is in the slot, unless its actor has died.
    pub fn live(&self) -> Option<&Live> {
        self.guard.as_ref()?.as_ref().filter(|live| live.actor.connected())
    }

    /// Puts a session in, and gives back what was there.
    pub fn put(&mut self, live: Option<Live>) -> Option<Live> {
        let place = self.guard.as_deref_mut().expect("it is there until the drop");
        std::mem::replace(place, live)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if self.live().is_none() {
            self.put(None);
        }
        let empty = self.live().is_none();
        // Without ours, one is left in the map, and one with everyone who waits for the lock.
        drop(self.guard.take());
        if empty {
            self.slots.0.remove_if(&self.id, |_, slot| Arc::strong_count(slot) == 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn empty_slots_take_no_memory_and_waiting_ones_stay() {
        let slots = Arc::new(Slots::default());
        let id = SessionId::new();
        let held = slots.lock(id).await;
        assert!(slots.try_lock(id).is_none() && slots.len() == 1);
        let waiting = {
            let slots = slots.clone();
            tokio::spawn(async move { slots.lock(id).await.live().is_none() })
        };
        tokio::task::yield_now().await;
        drop(held);
        assert!(waiting.await.unwrap());
        assert_eq!(slots.len(), 0);
        assert!(slots.try_lock(id).is_none());
    }
}
