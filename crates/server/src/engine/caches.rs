//! The key/value caches of all sessions, and their bytes.

use crate::error::Error;
use crate::ledger::{BytesKind, Ledger, Reservation, Shortage};
use crate::quota::{Account, Amount, Held};
use crate::scheduler::LaneId;
use crate::session::ExtendWork;
use offshoot_model::{KvCache, Part};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Names a cache: its session's lane and its own number.
pub(super) type CacheKey = (LaneId, u64);

/// A cache grows by so many tokens.
const GROWTH_TOKENS: u64 = 256;
/// What one session may have.
#[derive(Debug, Clone, Copy)]
pub(super) struct CacheLimits {
    pub max_open: usize,
    /// Of one cache.
    pub max_tokens: usize,
    /// A cache that was not used for so long may be dropped if others need its room: its client sends
    /// the sequence again.
    pub idle: Duration,
}

/// Who wants room.
#[derive(Debug, Clone, Copy)]
pub(super) enum Asks {
    Forward(LaneId),
    Extend(CacheKey),
}

struct OpenCache {
    cache: KvCache,
    /// Last asked for, or since when its last tokens are there.
    used: Instant,
    /// The same bytes in its tenant's account.
    of_tenant: Held,
    /// The last field: given back when the cache is gone.
    reserved: Reservation,
}

/// See the module's text.
pub(super) struct Caches {
    open: HashMap<CacheKey, OpenCache>,
    ledger: Ledger,
    limits: CacheLimits,
}

impl Caches {
    pub fn new(ledger: Ledger, limits: CacheLimits) -> Self {
        Caches { open: HashMap::new(), ledger, limits }
    }

    pub fn len(&self) -> usize {
        self.open.len()
    }

    pub fn get(&self, key: CacheKey) -> Option<&KvCache> {
        self.open.get(&key).map(|open| &open.cache)
    }

    /// Bytes of a session's caches.
    pub fn bytes_of(&self, lane: LaneId) -> u64 {
        let own = self.open.iter().filter(|(key, _)| key.0 == lane);
        own.map(|(_, open)| open.reserved.bytes()).sum()
    }

    /// Whether the cache is where the frame takes it to be.
    pub fn check(&self, lane: LaneId, work: &ExtendWork) -> Result<(), Error> {
        let &ExtendWork { cache, start, .. } = work;
        let (open, limit) = (self.get((lane, cache)), self.limits.max_open);
        match open.map(|open| open.len() as u64) {
            Some(_) if start == 0 => Ok(()),
            None if start == 0 => {
                let n_open = self.open.keys().filter(|key| key.0 == lane).count();
                if n_open < limit { Ok(()) } else { Err(Error::OpenCaches { limit }) }
            }
            // A new one that has had no tokens yet is none.
            None | Some(0) => Err(Error::NoCache { cache }),
            Some(held) if held < start => Err(Error::CacheStart { cache, start, held }),
            Some(_) => Ok(()),
        }
    }

    /// How many bytes more the frame needs.
    pub fn growth(&self, part: &Part, lane: LaneId, work: &ExtendWork) -> u64 {
        let bytes = part.cache_bytes(self.capacity(work));
        let held = self.open.get(&(lane, work.cache)).map_or(0, |open| open.reserved.bytes());
        bytes.saturating_sub(held)
    }

    /// Tokens that the frame's cache has room for with it.
    fn capacity(&self, work: &ExtendWork) -> u64 {
        let needed = work.start + work.hidden.shape()[0] as u64;
        let most = (self.limits.max_tokens as u64).max(needed);
        needed.next_multiple_of(GROWTH_TOKENS).min(most)
    }

    /// Makes the room that the frame needs, in a new cache if it begins one, or says what is missing.
    /// The frame passed [`Caches::check`].
    pub fn make_room(
        &mut self,
        part: &Part,
        lane: LaneId,
        work: &ExtendWork,
        account: &Arc<Account>,
    ) -> Result<(), Shortage> {
        let needed = work.start + work.hidden.shape()[0] as u64;
        let capacity = self.capacity(work);
        let bytes = part.cache_bytes(capacity);
        let key = (lane, work.cache);
        let Some(open) = self.open.get_mut(&key) else {
            debug_assert_eq!(work.start, 0, "a cache that goes on was found by the check");
            let reserved = self.ledger.reserve(BytesKind::Caches, bytes)?;
            let cache = part.new_cache(capacity as i64);
            let of_tenant = account.count(Amount::OpenBytes, bytes);
            self.open.insert(key, OpenCache { cache, used: Instant::now(), of_tenant, reserved });
            return Ok(());
        };
        open.cache.truncate(work.start as i64);
        if needed > open.cache.capacity() as u64 {
            // While it grows, one block's keys or values are there twice.
            let twice = open.cache.bytes() / (2 * part.layers().len().max(1) as u64);
            open.reserved.resize(bytes + twice)?;
            open.cache.grow(capacity as i64);
            open.reserved.shrink_to(bytes);
            open.of_tenant = account.count(Amount::OpenBytes, bytes);
        }
        Ok(())
    }

    /// The cache holds what a pass wrote. Its bytes.
    pub fn advance(&mut self, key: CacheKey, n_tokens: usize) -> u64 {
        let Some(open) = self.open.get_mut(&key) else { return 0 };
        open.cache.advance(n_tokens as i64);
        open.used = Instant::now();
        open.cache.bytes()
    }

    /// A frame was refused: a cache that it was to begin is not needed.
    pub fn drop_empty(&mut self, key: CacheKey) {
        if self.get(key).is_some_and(KvCache::is_empty) {
            self.open.remove(&key);
        }
    }

    pub fn drop_one(&mut self, key: CacheKey) {
        self.open.remove(&key);
    }

    /// Drops a session's caches.
    pub fn forget(&mut self, lane: LaneId) {
        self.open.retain(|key, _| key.0 != lane);
    }

    /// Drops the least recently used cache that others may have the room of: one that has been idle
    /// for a while, or of the session that asks, if that wants the room for something else. False:
    /// there is no such one.
    pub fn drop_idle(&mut self, now: Instant, asks: Asks) -> bool {
        let may_go = |key: &CacheKey, open: &OpenCache| match asks {
            Asks::Forward(lane) if key.0 == lane => true,
            Asks::Extend(its_own) if *key == its_own => false,
            _ => now.saturating_duration_since(open.used) >= self.limits.idle,
        };
        let may_go = self.open.iter().filter(|(key, open)| may_go(key, open));
        let Some(key) = may_go.min_by_key(|(_, open)| open.used).map(|(key, _)| *key) else {
            return false;
        };
        let bytes = self.open.remove(&key).map_or(0, |open| open.reserved.bytes());
        tracing::debug!(bytes, "a cache was dropped for want of room");
        true
    }
}
