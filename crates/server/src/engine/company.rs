use super::command::{Job, Times};
use super::slot::Slot;
use crate::quota::Account;
use crate::scheduler::{LaneId, Taken};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The jobs and tokens of one batch, counted for each tenant: a session hears how many of its own
/// tenant's it ran with, and nothing of others.
pub(super) struct Company {
    begun: Instant,
    execute: Duration,
    tenants: Vec<(Arc<Account>, usize, usize)>,
}

impl Company {
    /// Of a batch that began then and has just run.
    pub fn new<'a>(
        begun: Instant,
        slots: &HashMap<LaneId, Slot>,
        jobs: impl Iterator<Item = &'a Taken<Job>>,
    ) -> Company {
        let mut tenants: Vec<(Arc<Account>, usize, usize)> = Vec::new();
        for Taken { lane, entry, .. } in jobs {
            let Some(Slot { account, .. }) = slots.get(lane) else { continue };
            match tenants.iter_mut().find(|(of, ..)| Arc::ptr_eq(of, account)) {
                Some((_, n_jobs, n_tokens)) => {
                    *n_jobs += 1;
                    *n_tokens += entry.n_tokens;
                }
                None => tenants.push((account.clone(), 1, entry.n_tokens)),
            }
        }
        Company { begun, execute: begun.elapsed(), tenants }
    }

    /// Where the time of one of its jobs went, which waits since then.
    pub fn times(&self, slots: &HashMap<LaneId, Slot>, lane: LaneId, since: Instant) -> Times {
        let queue = self.begun.saturating_duration_since(since);
        let account = slots.get(&lane).map(|slot| &slot.account);
        let own = |of: &Arc<Account>| account.is_some_and(|account| Arc::ptr_eq(of, account));
        let own = self.tenants.iter().find(|(of, ..)| own(of));
        let (n_jobs, n_tokens) = own.map_or((1, 0), |&(_, n_jobs, n_tokens)| (n_jobs, n_tokens));
        Times { queue, execute: self.execute, n_jobs, n_tokens }
    }
}
