//! Who runs next. [`Queue`] decides and is pure; [`Scheduler`] is the hand-over between the threads
//! that submit jobs and the engine thread that takes them.

mod queue;

pub use queue::{Batch, Budget, Entry, Kind, LaneId, OwnerId, Queue, QueueView, Share, Taken};

use crate::error::Error;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// How often jobs that were put back try again even if nobody says that something changed.
const TRY_AGAIN: Duration = Duration::from_millis(200);

struct Shared<J> {
    queue: Queue<J>,
    closed: bool,
    n_put_back: usize,
}

/// The queue between the session threads and the engine thread.
pub struct Scheduler<J> {
    shared: Mutex<Shared<J>>,
    pushed: Condvar,
    max_queued_jobs: usize,
}

impl<J> Scheduler<J> {
    /// `max_queued_jobs` bounds forwards and backwards; control jobs, of which a session has few,
    /// always enter.
    pub fn new(max_queued_jobs: usize) -> Self {
        let shared = Shared { queue: Queue::default(), closed: false, n_put_back: 0 };
        Scheduler { shared: Mutex::new(shared), pushed: Condvar::new(), max_queued_jobs }
    }

    /// Opens a session's lane.
    pub fn open(&self, id: LaneId, share: Share) {
        self.lock().queue.open(id, share);
    }

    /// Another share of the device from now on, for all lanes of this owner.
    pub fn set_weight(&self, share: Share) {
        self.lock().queue.set_weight(share);
    }

    /// Hands a job over, or says why not.
    pub fn submit(&self, id: LaneId, kind: Kind, n_tokens: usize, job: J) -> Result<(), Error> {
        let mut shared = self.lock();
        if shared.closed {
            return Err(Error::engine_down());
        }
        if kind != Kind::Control && shared.queue.len() >= self.max_queued_jobs {
            return Err(Error::QueueFull { limit: self.max_queued_jobs });
        }
        let entry = Entry { kind, n_tokens, since: Instant::now(), job };
        shared.queue.push(id, entry).map_err(|_| Error::Gone { part: "session" })?;
        drop(shared);
        self.pushed.notify_one();
        Ok(())
    }

    /// Waits for work. None: closed and nothing left.
    pub fn take(&self, budget: Budget) -> Option<Batch<J>> {
        let mut shared = self.lock();
        loop {
            let now = Instant::now();
            let sleep = match shared.queue.begins(budget) {
                Some(begins) if begins <= now || shared.closed => {
                    return shared.queue.next_batch(budget);
                }
                Some(begins) => Some(begins - now),
                None if shared.n_put_back > 0 => Some(TRY_AGAIN),
                None if shared.closed => return None,
                None => None,
            };
            shared = match sleep {
                None => self.pushed.wait(shared).unwrap_or_else(|poisoned| poisoned.into_inner()),
                Some(sleep) => {
                    let woken = self.pushed.wait_timeout(shared, sleep);
                    let (shared, timeout) = woken.unwrap_or_else(|poisoned| poisoned.into_inner());
                    let mut shared = shared;
                    if timeout.timed_out() {
                        shared.let_go();
                    }
                    shared
                }
            };
        }
    }

    /// A job that cannot run yet. It comes again after [`Scheduler::let_go`], or after a while.
    pub fn put_back(&self, taken: Taken<J>) {
        let mut shared = self.lock();
        shared.n_put_back += 1;
        // If its lane is gone, nobody waits for it.
        let gone = shared.queue.put_back(taken);
        drop(shared);
        drop(gone);
    }

    /// Something changed: what was put back may run.
    pub fn let_go(&self) {
        self.lock().let_go();
    }

    /// Closes a lane and gives whatever it still has waiting.
    pub fn forget(&self, id: LaneId) -> Vec<J> {
        self.lock().queue.forget(id)
    }

    /// No job enters any more; those that wait still run.
    pub fn close(&self) {
        self.lock().closed = true;
        self.pushed.notify_all();
    }

    /// No job enters any more, and those that wait are dropped.
    pub fn abort(&self) {
        let mut shared = self.lock();
        shared.closed = true;
        shared.n_put_back = 0;
        // Dropped outside the lock: a job's reply wakes others.
        let dropped = shared.queue.drain();
        drop(shared);
        drop(dropped);
        self.pushed.notify_all();
    }

    /// Who waits, and who had how much.
    pub fn view(&self) -> QueueView {
        self.lock().queue.view()
    }

    /// Whether jobs enter.
    pub fn is_open(&self) -> bool {
        !self.lock().closed
    }

    /// Jobs enter again, of lanes that are opened from now on: those that there were are gone.
    pub fn reopen(&self) {
        let mut shared = self.lock();
        let fresh = Shared { queue: Queue::default(), closed: false, n_put_back: 0 };
        let before = std::mem::replace(&mut *shared, fresh);
        // Dropped outside the lock, as in an abort.
        drop(shared);
        drop(before);
    }

    fn lock(&self) -> MutexGuard<'_, Shared<J>> {
        // The queue's own methods leave it whole even if one panics in between.
        self.shared.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl<J> Shared<J> {
    fn let_go(&mut self) {
        if self.n_put_back > 0 {
            self.n_put_back = 0;
            self.queue.let_go();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDE: Budget = Budget { n_tokens: 1000, wait: Duration::ZERO };

    #[test]
    fn a_closed_scheduler_runs_what_waits_and_takes_nothing_new() {
        let scheduler = Scheduler::new(1);
        let lane = LaneId(1);
        scheduler.open(lane, Share { owner: OwnerId(1), weight: 1 });
        scheduler.submit(lane, Kind::Forward, 1, "f").unwrap();
        let full = scheduler.submit(lane, Kind::Forward, 1, "g").unwrap_err();
        assert!(matches!(full, Error::QueueFull { limit: 1 }));
        scheduler.submit(lane, Kind::Control, 0, "step").unwrap();
        scheduler.close();
        assert!(scheduler.submit(lane, Kind::Control, 0, "late").is_err());
        let next = || scheduler.take(WIDE).map(|mut batch| batch.jobs.remove(0).entry.job);
        assert_eq!(next(), Some("f"));
        assert_eq!(next(), Some("step"));
        assert_eq!(next(), None);
    }

    #[test]
    fn what_was_put_back_comes_again_by_itself() {
        let scheduler = Scheduler::new(1);
        let lane = LaneId(1);
        scheduler.open(lane, Share { owner: OwnerId(1), weight: 1 });
        scheduler.submit(lane, Kind::Forward, 1, "f").unwrap();
        let taken = scheduler.take(WIDE).unwrap().jobs.remove(0);
        scheduler.put_back(taken);
        scheduler.close();
        assert_eq!(scheduler.take(WIDE).unwrap().jobs[0].entry.job, "f");
        assert!(scheduler.take(WIDE).is_none());
    }
}
