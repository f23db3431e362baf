//! A tenant's own room on the device: if his quota is full, his idle sessions leave for those of his
//! that want to train. Nobody else waits for it.

use super::policy::{Tier, make_room};
use super::room::{BUSY_PAUSE, leave};
use super::{Ordering, Residency};
use crate::error::Error;
use crate::quota::{Amount, Held};
use std::time::{Duration, Instant};

/// How often it is looked whose turn is over.
const LOOK: Duration = Duration::from_millis(100);

impl Residency {
    /// So many bytes of adapters in a tenant's account. Refused at once if they never fit, and at the
    /// deadline if no session of his leaves.
    pub(super) async fn reserve_of_tenant(&self, tenant: &str, bytes: u64) -> Result<Held, Error> {
        let account = self.engine.accounts().of(tenant);
        let deadline = Instant::now() + self.wait;
        loop {
            // Made before the look, so that nothing that happens after it is missed.
            let freed = account.freed();
            let excess = match account.take(Amount::AdapterBytes, bytes) {
                Ok(held) => return Ok(held),
                Err(excess) => excess,
            };
            let is_over = Instant::now() >= deadline || self.draining.load(Ordering::Relaxed);
            if excess.retry_after.is_none() || is_over {
                return Err(excess.into());
            }
            self.make_own_room(tenant, excess.value - excess.limit);
            // The account says when something came free; nobody says that a turn is over.
            let _ = tokio::time::timeout(LOOK, freed).await;
        }
    }

    fn make_own_room(&self, tenant: &str, missing: u64) {
        let (own, now) = (self.list.of_tenant(tenant), self.list.now());
        for id in make_room(&own, Tier::Device, missing, now, self.ages).leave {
            self.list.set_leaving(id);
            let (slots, list) = (self.slots.clone(), self.list.clone());
            self.runtime.spawn(async move {
                if let Err(error) = leave(slots, id).await {
                    tracing::debug!(session = %id, %error, "session did not leave for its tenant's quota");
                    list.rest(id, BUSY_PAUSE);
                }
            });
        }
    }
}
