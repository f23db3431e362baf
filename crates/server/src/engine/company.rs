use super::command::{Job, Times};
use super::slot::Slot;
use crate::metrics::Ran;
use crate::quota::Account;
use crate::scheduler::{Entry, LaneId, Taken};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The jobs and tokens of one batch, counted for each tenant: a session hears how many of its own
/// tenant's it ran with, and nothing of others.
pub(super) struct Company {
    begun: Instant,
    execute: Duration,
    /// Packed tokens of all.
    n_tokens: usize,
    n_jobs: usize,
    tenants: Vec<(Arc<Account>, usize, usize)>,
}

impl Company {
    /// Of a batch that began then and has just run.
    pub fn new<'a>(
        begun: Instant,
        slots: &HashMap<LaneId, Slot>,
        jobs: impl Iterator<Item = &'a Taken<Job>>,
    ) -> Company {
        let execute = begun.elapsed();
        let (mut all_jobs, mut all_tokens) = (0, 0);
        let mut tenants: Vec<(Arc<Account>, usize, usize)> = Vec::new();
        for Taken { lane, entry, .. } in jobs {
            all_jobs += 1;
            all_tokens += entry.n_tokens;
            let Some(Slot { account, .. }) = slots.get(lane) else { continue };
            match tenants.iter_mut().find(|(of, ..)| Arc::ptr_eq(of, account)) {
                Some((_, n_jobs, n_tokens)) => {
                    *n_jobs += 1;
                    *n_tokens += entry.n_tokens;
                }
                None => tenants.push((account.clone(), 1, entry.n_tokens)),
            }
        }
        Company { begun, execute, n_tokens: all_tokens, n_jobs: all_jobs, tenants }
    }

    /// How many jobs and tokens it was.
    pub fn size(&self) -> (usize, usize) {
        (self.n_jobs, self.n_tokens)
    }

    /// Counts one of its jobs in its session's meter; without its tokens, if it came to nothing.
    pub fn count(
        &self,
        slots: &mut HashMap<LaneId, Slot>,
        lane: LaneId,
        entry: &Entry<Job>,
        done: bool,
    ) {
        let Some(slot) = slots.get_mut(&lane) else { return };
        let ran = Ran {
            kind: entry.job.command.job_kind(),
            n_tokens: if done { entry.n_tokens } else { 0 },
            queue: self.begun.saturating_duration_since(entry.since),
            execute: self.execute,
            share: self.execute.mul_f64(entry.n_tokens as f64 / self.n_tokens.max(1) as f64),
        };
        slot.ran(entry.since, self.begun, ran);
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
