//! What each tenant has of the server, and what he may have: counted before it is taken, given back
//! by drop. Nothing here waits; whoever is refused is told when to try again.
//!
//! Without a tenants file everybody is one tenant without quotas, and is counted all the same.

mod bucket;
mod excess;

pub use excess::{Excess, Quota};

use crate::access::{Access, Quotas, Tenant};
use crate::scheduler::OwnerId;
use bucket::Bucket;
use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// A session may end at any time.
const SESSION_RETRY: Duration = Duration::from_secs(5);
/// Somebody may delete one.
const STORED_RETRY: Duration = Duration::from_secs(60);
/// A session that is idle leaves the device.
const ADAPTER_RETRY: Duration = Duration::from_secs(5);
/// A backward is a matter of a moment.
const OPEN_RETRY: Duration = Duration::from_millis(500);

/// The accounts of all tenants. They live as long as the server, also over a failure of the engine.
#[derive(Default)]
pub struct Accounts {
    rules: Arc<Rules>,
    all: Mutex<HashMap<Arc<str>, Arc<Account>>>,
}

/// Who may have what now. Empty: nobody is limited.
#[derive(Default)]
struct Rules(OnceLock<Arc<Access>>);

/// What one tenant has.
pub struct Account {
    name: Arc<str>,
    /// Order of coming, from 1.
    number: u64,
    rules: Arc<Rules>,
    /// As the scheduler knows it.
    weight: AtomicU32,
    // Never held across an await; every use is a few additions.
    books: Mutex<Books>,
    freed: Arc<Notify>,
}

#[derive(Default)]
struct Books {
    sessions: u64,
    opening: u64,
    adapter_bytes: u64,
    open_bytes: u64,
    tokens: Bucket,
}

/// What is counted and given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amount {
    /// Live sessions.
    Sessions,
    /// Sessions that are not in the store yet.
    Opening,
    /// Of adapters on the device.
    AdapterBytes,
    /// Of tapes and caches.
    OpenBytes,
}

/// A part of a tenant's account. Dropping it gives it back.
#[must_use = "dropping it gives it back"]
pub struct Held {
    account: Arc<Account>,
    amount: Amount,
    n: AtomicU64,
}

impl Accounts {
    /// From now on the tenants file counts.
    pub fn follow(&self, access: Arc<Access>) {
        let _ = self.rules.0.set(access);
    }

    /// A tenant's account; without a tenants file the one of the empty name.
    pub fn of(&self, tenant: &str) -> Arc<Account> {
        let mut all = lock(&self.all);
        if let Some(known) = all.get(tenant) {
            return known.clone();
        }
        let name: Arc<str> = tenant.into();
        let account = Arc::new(Account {
            name: name.clone(),
            number: all.len() as u64 + 1,
            rules: self.rules.clone(),
            weight: AtomicU32::new(0),
            books: Mutex::default(),
            freed: Arc::default(),
        });
        all.insert(name, account.clone());
        account
    }
}

impl Accounts {
    /// Of all tenants that have had something since the start.
    pub fn all(&self) -> Vec<Arc<Account>> {
        lock(&self.all).values().cloned().collect()
    }
}

impl Rules {
    fn tenant(&self, name: &str) -> Option<Arc<Tenant>> {
        self.0.get()?.tenant(name)
    }
}

impl Account {
    /// Who it is to the scheduler; none on an open server, where each session is on its own.
    pub fn owner(&self) -> Option<OwnerId> {
        // Lanes, which count from 0, are owners of their own.
        (!self.name.is_empty()).then(|| OwnerId(u64::MAX - self.number))
    }

    /// The share of the device as it is now.
    pub fn weight(&self) -> u32 {
        self.rules.tenant(&self.name).map_or(1, |tenant| tenant.weight)
    }

    /// The share of the device if it is another one than when this was last asked.
    pub fn new_weight(&self) -> Option<u32> {
        let weight = self.weight();
        (self.weight.swap(weight, Ordering::Relaxed) != weight).then_some(weight)
    }

    /// Whose it is; empty without a tenants file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the tenant may have, as it is now.
    pub fn quotas(&self) -> Quotas {
        self.rules.tenant(&self.name).map_or_else(Quotas::default, |tenant| tenant.quotas)
    }

    /// How much there is of it now.
    pub fn amount(&self, amount: Amount) -> u64 {
        *lock(&self.books).of_mut(amount)
    }

    /// Takes so much, or says why not.
    pub fn take(self: &Arc<Self>, amount: Amount, n: u64) -> Result<Held, Excess> {
        self.add(amount, n)?;
        Ok(Held { account: self.clone(), amount, n: n.into() })
    }

    /// Takes so much even if it is too much.
    pub fn count(self: &Arc<Self>, amount: Amount, n: u64) -> Held {
        *lock(&self.books).of_mut(amount) += n;
        Held { account: self.clone(), amount, n: n.into() }
    }

    /// Room for a session that is to be stored beside so many that are.
    pub fn take_stored(self: &Arc<Self>, stored: usize) -> Result<Held, Excess> {
        let held = self.count(Amount::Opening, 1);
        let value = stored as u64 + lock(&self.books).opening;
        match self.quotas().stored_sessions {
            Some(limit) if value > limit => {
                Err(self.excess(Quota::StoredSessions, (limit, value), Some(STORED_RETRY)))
            }
            _ => Ok(held),
        }
    }

    /// How much more would fit. None: anything.
    pub fn left(&self, amount: Amount) -> Option<u64> {
        let limit = self.limit(amount)?;
        Some(limit.saturating_sub(*lock(&self.books).of_mut(amount)))
    }

    /// Why so much more does not fit.
    pub fn refusal(&self, amount: Amount, n: u64) -> Option<Excess> {
        let limit = self.limit(amount)?;
        let value = *lock(&self.books).of_mut(amount) + n;
        (value > limit).then(|| self.too_much(amount, (limit, value), n))
    }

    /// Forwards of so many tokens run now, or it is too early for them.
    pub fn take_tokens(&self, n: usize, now: Instant) -> Result<(), Excess> {
        let Some(limit) = self.quotas().tokens_per_second else { return Ok(()) };
        let taken = lock(&self.books).tokens.take(n as u64, limit, now);
        taken.map_err(|early| {
            let amounts = (limit, early.per_second);
            self.excess(Quota::TokensPerSecond, amounts, Some(early.wait))
        })
    }

    /// They did not run after all.
    pub fn give_tokens_back(&self, n: usize) {
        lock(&self.books).tokens.give_back(n as u64);
    }

    /// Checks what one microbatch may have.
    pub fn check_tokens(&self, n: usize) -> Result<(), Excess> {
        self.check(Quota::TokensPerMicrobatch, self.quotas().tokens_per_microbatch, n as u64)
    }

    /// Checks an adapter's rank.
    pub fn check_rank(&self, r: u32) -> Result<(), Excess> {
        self.check(Quota::Rank, self.quotas().rank, r.into())
    }

    /// Resolves when something has been given back since this was called, even if that was before
    /// the first poll.
    pub fn freed(&self) -> impl Future<Output = ()> + Send + use<> {
        self.freed.clone().notified_owned()
    }

    fn check(&self, quota: Quota, limit: Option<u64>, value: u64) -> Result<(), Excess> {
        match limit {
            Some(limit) if value > limit => Err(self.excess(quota, (limit, value), None)),
            _ => Ok(()),
        }
    }

    fn limit(&self, amount: Amount) -> Option<u64> {
        let quotas = self.quotas();
        match amount {
            Amount::Sessions => quotas.sessions,
            // Beside those that are stored: see `take_stored`.
            Amount::Opening => None,
            Amount::AdapterBytes => quotas.adapter_bytes,
            Amount::OpenBytes => quotas.open_bytes,
        }
    }

    fn add(&self, amount: Amount, n: u64) -> Result<(), Excess> {
        let limit = self.limit(amount);
        let mut books = lock(&self.books);
        let value = *books.of_mut(amount) + n;
        match limit {
            Some(limit) if value > limit => {
                drop(books);
                Err(self.too_much(amount, (limit, value), n))
            }
            _ => {
                *books.of_mut(amount) = value;
                Ok(())
            }
        }
    }

    fn too_much(&self, amount: Amount, (limit, value): (u64, u64), n: u64) -> Excess {
        let (quota, retry) = match amount {
            Amount::Sessions => (Quota::Sessions, SESSION_RETRY),
            Amount::Opening => (Quota::StoredSessions, STORED_RETRY),
            Amount::AdapterBytes => (Quota::AdapterBytes, ADAPTER_RETRY),
            Amount::OpenBytes => (Quota::OpenBytes, OPEN_RETRY),
        };
        // What is too much alone never fits.
        self.excess(quota, (limit, value), (n <= limit).then_some(retry))
    }

    fn excess(
        &self,
        quota: Quota,
        (limit, value): (u64, u64),
        retry_after: Option<Duration>,
    ) -> Excess {
        Excess { tenant: self.name.clone(), quota, limit, value, retry_after }
    }
}

impl Books {
    fn of_mut(&mut self, amount: Amount) -> &mut u64 {
        match amount {
            Amount::Sessions => &mut self.sessions,
            Amount::Opening => &mut self.opening,
            Amount::AdapterBytes => &mut self.adapter_bytes,
            Amount::OpenBytes => &mut self.open_bytes,
        }
    }
}

impl Held {
    /// How much.
    pub fn n(&self) -> u64 {
        self.n.load(Ordering::Relaxed)
    }

    /// Gives back what is more than so much.
    pub fn shrink_to(&self, n: u64) {
        let before = self.n.fetch_min(n, Ordering::Relaxed);
        self.give(before.saturating_sub(n));
    }

    fn give(&self, n: u64) {
        if n > 0 {
            *lock(&self.account.books).of_mut(self.amount) -= n;
            self.account.freed.notify_waiters();
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.give(self.n());
    }
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Held({:?}: {} of tenant {:?})", self.amount, self.n(), self.account.name)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each use is whole even if another thread panicked.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "quota/tests.rs"]
mod tests;
