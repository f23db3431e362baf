use crate::residency::Profile;
use crate::session::{SessionActor, SessionId};
use actix::Addr;
use dashmap::DashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::OwnedMutexGuard;

/// A session that has an actor.
#[derive(Clone)]
pub struct Live {
    pub actor: Addr<SessionActor>,
    pub profile: Arc<Profile>,
}

#[derive(Default)]
struct Slot {
    /// Of whoever makes, moves or ends the actor. May be held for long.
    lock: Arc<tokio::sync::Mutex<()>>,
    /// Changed by the holder of the lock only, read by anyone.
    live: Mutex<Option<Live>>,
}

/// The sessions that are live or in use, each behind its own lock: what makes, moves or ends a
/// session's actor holds it. Frames do not come this way.
#[derive(Default)]
pub struct Slots(DashMap<SessionId, Arc<Slot>>);

/// A session's slot, locked. What is left empty is taken out when the last holder drops it, so that
/// forged ids take no memory.
pub struct Held<'a> {
    slots: &'a Slots,
    id: SessionId,
    slot: Option<Arc<Slot>>,
    guard: Option<OwnedMutexGuard<()>>,
}

impl Slots {
    /// Waits for a session's slot.
    pub async fn lock(&self, id: SessionId) -> Held<'_> {
        let slot = self.0.entry(id).or_default().clone();
        // Before the wait, so that an empty slot goes also if the wait is given up.
        let mut held = Held { slots: self, id, slot: Some(slot.clone()), guard: None };
        held.guard = Some(slot.lock.clone().lock_owned().await);
        held
    }

    /// A session's slot, unless somebody has it or it is empty.
    pub fn try_lock(&self, id: SessionId) -> Option<Held<'_>> {
        let slot = self.0.get(&id)?.clone();
        let guard = Some(slot.lock.clone().try_lock_owned().ok()?);
        Some(Held { slots: self, id, slot: Some(slot), guard })
    }

    /// A live session, whoever has its slot.
    pub fn live(&self, id: SessionId) -> Option<Live> {
        let slot = self.0.get(&id)?.clone();
        slot.live()
    }

    /// Its actor.
    pub fn actor(&self, id: SessionId) -> Option<Addr<SessionActor>> {
        self.live(id).map(|live| live.actor)
    }

    /// All that are live now.
    pub fn all_live(&self) -> Vec<Arc<Profile>> {
        self.0.iter().filter_map(|entry| Some(entry.value().live()?.profile)).collect()
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

impl Slot {
    /// What is in the slot, unless its actor has died.
    fn live(&self) -> Option<Live> {
        self.content().clone().filter(|live| live.actor.connected())
    }

    fn content(&self) -> MutexGuard<'_, Option<Live>> {
        // Each use is whole even if another thread panicked.
        self.live.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Held<'_> {
    /// What is in the slot, unless its actor has died.
    pub fn live(&self) -> Option<Live> {
        self.slot.as_ref()?.live()
    }

    /// Puts a session in, and gives back what was there.
    pub fn put(&mut self, live: Option<Live>) -> Option<Live> {
        let slot = self.slot.as_ref().expect("it is there until the drop");
        std::mem::replace(&mut slot.content(), live)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let empty = self.live().is_none();
        if empty && self.guard.is_some() {
            self.put(None);
        }
        drop(self.guard.take());
        // Then one is left in the map, and one with everyone who waits for the lock.
        drop(self.slot.take());
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
        assert!(slots.actor(id).is_none());
        let waiting = {
            let slots = slots.clone();
            tokio::spawn(async move { slots.lock(id).await.live().is_none() })
        };
        tokio::task::yield_now().await;
        {
            let mut given_up = Box::pin(slots.lock(id));
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            assert!(given_up.as_mut().poll(&mut context).is_pending());
        }
        drop(held);
        assert!(waiting.await.unwrap());
        assert_eq!(slots.len(), 0);
        assert!(slots.try_lock(id).is_none());
    }
}
