use super::Profile;
use super::policy::{Resident, Tier};
use crate::session::SessionId;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Who is in memory. A frame of a session touches its own [`Activity`] only, never this.
pub(super) struct List {
    begun: Instant,
    entries: Mutex<HashMap<SessionId, Entry>>,
    next_stay: AtomicU64,
}

struct Entry {
    stay: u64,
    tier: Tier,
    bytes: u64,
    since: Duration,
    leaving: bool,
    rests_until: Duration,
    profile: Arc<Profile>,
}

/// What a session does, as others may see it without asking its actor.
#[derive(Debug, Default)]
pub struct Activity {
    busy: AtomicBool,
    /// Of the last frame, since the list was made. 0: there was none.
    used_micros: AtomicU64,
    /// What its key/value caches take of the device, which comes free with its adapter.
    cache_bytes: AtomicU64,
}

/// A session's entry. Dropping it takes it out.
pub struct Listed {
    list: Arc<List>,
    id: SessionId,
    stay: u64,
}

impl Activity {
    /// Whether the session has frames under way or open microbatches.
    pub fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Relaxed)
    }

    /// Says so, and whether it was otherwise before.
    pub fn set_busy(&self, busy: bool) -> bool {
        self.busy.swap(busy, Ordering::Relaxed) != busy
    }

    /// Says what the session's caches take.
    pub fn set_cache_bytes(&self, bytes: u64) {
        self.cache_bytes.store(bytes, Ordering::Relaxed);
    }

    /// When the last frame came, on the clock of the list.
    pub fn used(&self) -> Option<Duration> {
        let micros = self.used_micros.load(Ordering::Relaxed);
        (micros > 0).then(|| Duration::from_micros(micros))
    }
}

impl Default for List {
    fn default() -> Self {
        let (entries, next_stay) = (Mutex::default(), AtomicU64::new(0));
        List { begun: Instant::now(), entries, next_stay }
    }
}

impl List {
    /// The time that entries are stamped with.
    pub fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// A time of the list as the clock shows it.
    pub fn instant(&self, time: Duration) -> Option<Instant> {
        self.begun.checked_add(time)
    }

    /// Notes a frame.
    pub fn used(&self, activity: &Activity) {
        let micros = u64::try_from(self.now().as_micros()).unwrap_or(u64::MAX);
        activity.used_micros.store(micros.max(1), Ordering::Relaxed);
    }

    /// Enters a session; an entry that it has already is replaced.
    pub fn enter(self: &Arc<Self>, profile: &Arc<Profile>, tier: Tier, bytes: u64) -> Listed {
        let (id, profile) = (profile.id, profile.clone());
        let stay = self.next_stay.fetch_add(1, Ordering::Relaxed);
        let (since, rests_until) = (self.now(), Duration::ZERO);
        let entry = Entry { stay, tier, bytes, since, leaving: false, rests_until, profile };
        self.entries().insert(id, entry);
        Listed { list: self.clone(), id, stay }
    }

    /// How many are in this memory.
    pub fn count(&self, tier: Tier) -> usize {
        self.entries().values().filter(|entry| entry.tier == tier).count()
    }

    /// Whose each is, and in which memory.
    pub fn tenants(&self) -> Vec<(Arc<str>, Tier)> {
        let of = |entry: &Entry| (entry.profile.settings.tenant.clone(), entry.tier);
        self.entries().values().map(of).collect()
    }

    /// All as they look now.
    pub fn all(&self) -> Vec<Resident> {
        self.entries().iter().map(|(&id, entry)| entry.resident(id)).collect()
    }

    /// Those of one tenant.
    pub fn of_tenant(&self, tenant: &str) -> Vec<Resident> {
        let entries = self.entries();
        let own = entries.iter().filter(|(_, entry)| *entry.profile.settings.tenant == *tenant);
        own.map(|(&id, entry)| entry.resident(id)).collect()
    }

    /// A session is asked to leave.
    pub fn set_leaving(&self, id: SessionId) {
        if let Some(entry) = self.entries().get_mut(&id) {
            entry.leaving = true;
        }
    }

    /// A session did not leave, and is left alone for a while.
    pub fn rest(&self, id: SessionId, pause: Duration) {
        let until = self.now() + pause;
        if let Some(entry) = self.entries().get_mut(&id) {
            entry.leaving = false;
            entry.rests_until = until;
        }
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<SessionId, Entry>> {
        // Each use is whole even if another thread panicked.
        self.entries.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Entry {
    fn resident(&self, id: SessionId) -> Resident {
        let &Entry { tier, bytes, since, leaving, rests_until, ref profile, .. } = self;
        let activity = &profile.activity;
        let bytes = match tier {
            Tier::Device => bytes + activity.cache_bytes.load(Ordering::Relaxed),
            Tier::Host | Tier::Disk => bytes,
        };
        // What was before this stay does not count in it.
        let used = activity.used().filter(|&used| used >= since);
        let (busy, pinned) = (activity.is_busy(), profile.pinned.is_pinned());
        Resident { id, tier, bytes, busy, pinned, leaving, since, used, rests_until }
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        let mut entries = self.list.entries();
        if entries.get(&self.id).is_some_and(|entry| entry.stay == self.stay) {
            entries.remove(&self.id);
        }
    }
}
