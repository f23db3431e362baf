//! The bytes of one device: what is reserved, of which kind, and what is left of the budget. Bytes
//! are reserved before they are used and given back by drop, so what the ledger says is never less
//! than what is there.
//!
//! It decides, purely; whoever is refused shrinks, waits for [`Ledger::freed`], or asks by
//! [`Ledger::press`] that idle sessions leave.

use crate::quota::Held;
use serde::Serialize;
use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::Notify;

/// What bytes are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BytesKind {
    /// The frozen trunk.
    Weights,
    /// Parameters, gradients and moments of the sessions on the device.
    Adapters,
    /// What open microbatches keep for their backwards.
    Tapes,
    /// What a batch needs while it runs.
    Workspace,
    /// Keys and values of sequences that go on.
    Caches,
}

/// Bytes by what they are for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ByKind {
    pub weights: u64,
    pub adapters: u64,
    pub tapes: u64,
    pub workspace: u64,
    pub caches: u64,
}

/// A ledger at a glance.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// None: unlimited.
    pub budget: Option<u64>,
    pub now: ByKind,
    /// The most of each kind so far. The kinds had theirs at different times.
    pub peak: ByKind,
    /// The most of all kinds together so far.
    pub peak_total: u64,
}

/// What did not fit. It waits, or becomes RESOURCE_EXHAUSTED.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortage {
    pub kind: BytesKind,
    pub need: u64,
    /// What this kind could have had.
    pub free: u64,
    pub budget: u64,
}

/// The bytes of one device. Cloning shares them.
#[derive(Clone)]
pub struct Ledger(Arc<Shared>);

struct Shared {
    // Never held across an await; every use is a few additions.
    books: Mutex<Books>,
    freed: Arc<Notify>,
    pressed: Notify,
}

/// Bytes that are taken. Dropping it gives them back and wakes who waits.
#[must_use = "dropping it gives the bytes back"]
pub struct Reservation {
    ledger: Ledger,
    kind: BytesKind,
    bytes: AtomicU64,
    /// The same bytes in their tenant's account, if they are one tenant's.
    held: Option<Held>,
}

/// The pure part.
#[derive(Debug)]
struct Books {
    usage: Usage,
    /// Adapters and caches leave so much free for tapes and workspace.
    work_room: u64,
    /// The most that somebody needs and did not get, until idle sessions are asked to leave.
    wanted: u64,
    /// The most of all kinds together since memory was last given back.
    high: u64,
    /// The same since [`Ledger::take_slack`] last looked, and between that look and the one before.
    recent: u64,
    before: u64,
}

impl ByKind {
    /// All kinds together.
    pub fn total(&self) -> u64 {
        self.weights + self.adapters + self.tapes + self.workspace + self.caches
    }

    /// The bytes of one kind.
    pub fn of(&self, kind: BytesKind) -> u64 {
        match kind {
            BytesKind::Weights => self.weights,
            BytesKind::Adapters => self.adapters,
            BytesKind::Tapes => self.tapes,
            BytesKind::Workspace => self.workspace,
            BytesKind::Caches => self.caches,
        }
    }

    fn of_mut(&mut self, kind: BytesKind) -> &mut u64 {
        match kind {
            BytesKind::Weights => &mut self.weights,
            BytesKind::Adapters => &mut self.adapters,
            BytesKind::Tapes => &mut self.tapes,
            BytesKind::Workspace => &mut self.workspace,
            BytesKind::Caches => &mut self.caches,
        }
    }
}

impl BytesKind {
    /// As an operator would say it.
    pub fn name(self) -> &'static str {
        match self {
            BytesKind::Weights => "weights",
            BytesKind::Adapters => "adapters",
            BytesKind::Tapes => "tapes",
            BytesKind::Workspace => "workspace",
            BytesKind::Caches => "caches",
        }
    }
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shortage { kind, need, free, budget } = self;
        let name = kind.name();
        write!(f, "{need} bytes of {name} are needed, {free} are free of a budget of {budget}")
    }
}

impl Ledger {
    /// Nothing is taken yet. Without a budget everything fits, and is still counted.
    pub fn new(budget: Option<u64>) -> Self {
        let usage = Usage { budget, ..Usage::default() };
        let books =
            Mutex::new(Books { usage, work_room: 0, wanted: 0, high: 0, recent: 0, before: 0 });
        Ledger(Arc::new(Shared { books, freed: Arc::default(), pressed: Notify::new() }))
    }

    /// Takes bytes at once, or none of them.
    pub fn reserve(&self, kind: BytesKind, bytes: u64) -> Result<Reservation, Shortage> {
        self.books().take(kind, bytes)?;
        Ok(Reservation { ledger: self.clone(), kind, bytes: bytes.into(), held: None })
    }

    /// There is more than was thought. A budget that is larger stays.
    pub fn raise_budget(&self, bytes: u64) {
        let mut books = self.books();
        if books.usage.budget.is_some_and(|budget| budget < bytes) {
            books.usage.budget = Some(bytes);
            drop(books);
            self.0.freed.notify_waiters();
        }
    }

    /// Counts bytes that are there already, even beyond the budget.
    pub fn count(&self, kind: BytesKind, bytes: u64) -> Reservation {
        self.books().add(kind, bytes);
        Reservation { ledger: self.clone(), kind, bytes: bytes.into(), held: None }
    }

    /// From now on adapters and caches leave so much free for tapes and workspace, but at most half of what
    /// the weights leave: with a budget full of them nobody could take a step.
    pub fn set_work_room(&self, bytes: u64) {
        self.books().work_room = bytes;
    }

    /// What tapes and workspace could still take. None: unlimited.
    pub fn free(&self) -> Option<u64> {
        self.books().free(BytesKind::Workspace)
    }

    /// What would have to be given back first, so that this fits. 0: it fits.
    pub fn missing(&self, kind: BytesKind, bytes: u64) -> u64 {
        self.books().free(kind).map_or(0, |free| bytes.saturating_sub(free))
    }

    /// What fits if nothing but the weights is taken. None: anything.
    pub fn most(&self, kind: BytesKind) -> Option<u64> {
        let books = self.books();
        let weights = books.usage.now.weights;
        let now = ByKind { weights, ..ByKind::default() };
        let usage = Usage { now, ..books.usage };
        Books { usage, ..*books }.free(kind)
    }

    /// What is taken now, and was at most.
    pub fn usage(&self) -> Usage {
        self.books().usage
    }

    /// Resolves when something has been given back since this was called, even if that was before
    /// the first poll: call it, then try to reserve, then wait.
    pub fn freed(&self) -> impl Future<Output = ()> + Send + use<> {
        // `notify_waiters` reaches every future made before it.
        self.0.freed.clone().notified_owned()
    }

    /// How many bytes were in use and are not wanted any more: not since the look before the last, so
    /// that what a training session frees between two microbatches is none of them. Less than `least`
    /// are nothing.
    pub fn take_slack(&self, least: u64) -> u64 {
        let mut books = self.books();
        let wanted = books.recent.max(books.before);
        (books.before, books.recent) = (books.recent, books.usage.now.total());
        let slack = books.high.saturating_sub(wanted);
        if slack < least.max(1) {
            return 0;
        }
        books.high = wanted;
        slack
    }

    /// Asks that idle sessions leave until this would fit. Returns at once.
    pub fn press(&self, shortage: Shortage) {
        let mut books = self.books();
        // So that it fits beside what its kind has to leave free.
        let all = books.free(BytesKind::Workspace).zip(books.free(shortage.kind));
        let left = all.map_or(0, |(all, of_kind)| all - of_kind);
        books.wanted = books.wanted.max(shortage.need + left);
        drop(books);
        self.0.pressed.notify_one();
    }

    /// Waits for [`Ledger::press`]: how many bytes are needed. For one caller.
    pub async fn pressed(&self) -> u64 {
        loop {
            let wanted = std::mem::take(&mut self.books().wanted);
            if wanted > 0 {
                return wanted;
            }
            self.0.pressed.notified().await;
        }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        // Each use is whole even if another thread panicked.
        self.0.books.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Reservation {
    /// Gives this back as well when it is dropped.
    pub fn with(mut self, held: Held) -> Self {
        self.held = Some(held);
        self
    }

    /// How many.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Takes more, or gives some back. An error changes nothing.
    pub fn resize(&mut self, bytes: u64) -> Result<(), Shortage> {
        let before = self.bytes();
        if bytes > before {
            self.ledger.books().take(self.kind, bytes - before)?;
            self.bytes.store(bytes, Ordering::Relaxed);
        }
        self.shrink_to(bytes);
        Ok(())
    }

    /// Gives back what is more than so many, also for those who share it.
    pub fn shrink_to(&self, bytes: u64) {
        let before = self.bytes.fetch_min(bytes, Ordering::Relaxed);
        self.give(before.saturating_sub(bytes));
    }

    fn give(&self, bytes: u64) {
        if bytes > 0 {
            self.ledger.books().give(self.kind, bytes);
            self.ledger.0.freed.notify_waiters();
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.give(self.bytes());
    }
}

impl fmt::Debug for Reservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reservation({} bytes of {})", self.bytes(), self.kind.name())
    }
}

impl Books {
    fn free(&self, kind: BytesKind) -> Option<u64> {
        let Usage { budget, now, .. } = &self.usage;
        let free = budget.as_ref()?.saturating_sub(now.total());
        if !matches!(kind, BytesKind::Adapters | BytesKind::Caches) {
            return Some(free);
        }
        // Work that runs already stands in its room.
        let room = self.work_room.min(budget.as_ref()?.saturating_sub(now.weights) / 2);
        Some(free.saturating_sub(room.saturating_sub(now.tapes + now.workspace)))
    }

    fn take(&mut self, kind: BytesKind, need: u64) -> Result<(), Shortage> {
        if let (Some(free), Some(budget)) = (self.free(kind), self.usage.budget)
            && need > free
        {
            return Err(Shortage { kind, need, free, budget });
        }
        self.add(kind, need);
        Ok(())
    }

    fn add(&mut self, kind: BytesKind, bytes: u64) {
        let Usage { now, peak, peak_total, .. } = &mut self.usage;
        *now.of_mut(kind) += bytes;
        *peak.of_mut(kind) = peak.of(kind).max(now.of(kind));
        *peak_total = now.total().max(*peak_total);
        self.recent = now.total().max(self.recent);
        self.high = self.recent.max(self.high);
    }

    fn give(&mut self, kind: BytesKind, bytes: u64) {
        // Only reservations give back, and each only what it took.
        *self.usage.now.of_mut(kind) -= bytes;
    }
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
