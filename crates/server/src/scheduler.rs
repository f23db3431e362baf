//! Who runs next. [`Queue`] decides and is pure; [`Scheduler`] is the hand-over between the threads
//! that submit jobs and the engine thread that takes them.

use crate::error::Error;
use std::collections::{HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Whose jobs keep their order: one session's place on the device. A session that leaves and comes
/// back gets a new one, so that nothing of its earlier life can meet it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LaneId(pub u64);

/// What jobs can share a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Forwards, in training and in evaluation mode.
    Forward,
    Backward,
    /// What touches one session and no base weights: steps, admission, copies. Quick; it goes
    /// first, so that the forwards behind it can join the next batch.
    Control,
}

impl Kind {
    /// What a job costs its session, in units of half a token's forward. A backward has the
    /// forward's products again, by the input, and LoRA's and attention's twice.
    fn cost(self, n_tokens: usize) -> u64 {
        let per_token = match self {
            Kind::Forward => 2,
            Kind::Backward => 3,
            Kind::Control => 0,
        };
        n_tokens as u64 * per_token
    }
}

/// What a batch may hold.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    /// Packed tokens. A job that is larger runs alone.
    pub n_tokens: usize,
}

/// A job that leaves the queue.
#[derive(Debug, PartialEq)]
pub struct Taken<J> {
    pub lane: LaneId,
    pub job: J,
    pub waited: Duration,
}

/// Jobs of one kind that may run together, in this order.
#[derive(Debug, PartialEq)]
pub struct Batch<J> {
    pub kind: Kind,
    pub jobs: Vec<Taken<J>>,
}

struct Waiting<J> {
    kind: Kind,
    n_tokens: usize,
    since: Instant,
    /// Order of arrival over all sessions: settles ties.
    arrival: u64,
    job: J,
}

struct Lane<J> {
    jobs: VecDeque<Waiting<J>>,
    /// What this session has had. The lowest goes first.
    served: u64,
}

/// Jobs by session. Those of one session leave in the order in which they came. Between sessions
/// the one that was served least goes first; one that returns after a pause is lifted to where the
/// others are, so that it cannot save up (start-time fair queueing, Goyal et al. 1996).
pub struct Queue<J> {
    lanes: HashMap<LaneId, Lane<J>>,
    /// Virtual time: the counter of the session that the last batch began with, before it was
    /// charged. Not the lowest of those that wait: a client that waits for each answer returns a
    /// moment later, and would lose its due each time.
    floor: u64,
    n_arrivals: u64,
    n_waiting: usize,
}

impl<J> Default for Queue<J> {
    fn default() -> Self {
        Queue { lanes: HashMap::new(), floor: 0, n_arrivals: 0, n_waiting: 0 }
    }
}

impl<J> Queue<J> {
    /// Jobs that wait.
    pub fn len(&self) -> usize {
        self.n_waiting
    }

    /// Adds a job behind the others of its session.
    pub fn push(&mut self, id: LaneId, kind: Kind, n_tokens: usize, now: Instant, job: J) {
        let fresh = || Lane { jobs: VecDeque::new(), served: 0 };
        let lane = self.lanes.entry(id).or_insert_with(fresh);
        if lane.jobs.is_empty() {
            lane.served = lane.served.max(self.floor);
        }
        lane.jobs.push_back(Waiting { kind, n_tokens, since: now, arrival: self.n_arrivals, job });
        self.n_arrivals += 1;
        self.n_waiting += 1;
    }

    /// The next jobs to run, all of one kind, at least one if any waits.
    pub fn next_batch(&mut self, now: Instant, budget: Budget) -> Option<Batch<J>> {
        let kind = self.next_kind()?;
        let mut batch = Batch { kind, jobs: Vec::new() };
        let mut n_tokens = 0;
        // The first may be larger than the budget, or it would never run.
        let mut room = usize::MAX;
        while let Some(id) = self.next_lane(kind, room) {
            let lane = self.lanes.get_mut(&id).expect("a lane was chosen");
            let waiting = lane.jobs.pop_front().expect("a lane with a job was chosen");
            if batch.jobs.is_empty() && kind != Kind::Control {
                self.floor = self.floor.max(lane.served);
            }
            lane.served += kind.cost(waiting.n_tokens);
            self.n_waiting -= 1;
            n_tokens += waiting.n_tokens;
            room = budget.n_tokens.saturating_sub(n_tokens);
            let waited = now.saturating_duration_since(waiting.since);
            batch.jobs.push(Taken { lane: id, job: waiting.job, waited });
        }
        Some(batch)
    }

    /// Drops a session's counter and whatever it still has waiting.
    pub fn forget(&mut self, id: LaneId) -> Vec<J> {
        let lane = self.lanes.remove(&id);
        let jobs: Vec<J> = lane.into_iter().flat_map(|l| l.jobs).map(|w| w.job).collect();
        self.n_waiting -= jobs.len();
        jobs
    }

    /// Everything that waits, in no order.
    fn drain(&mut self) -> Vec<J> {
        self.n_waiting = 0;
        self.lanes.drain().flat_map(|(_, lane)| lane.jobs).map(|waiting| waiting.job).collect()
    }

    fn next_kind(&self) -> Option<Kind> {
        let control = self.fronts().any(|(_, _, front)| front.kind == Kind::Control);
        if control {
            return Some(Kind::Control);
        }
        let first = self.fronts().min_by_key(|(_, lane, front)| (lane.served, front.arrival));
        first.map(|(_, _, front)| front.kind)
    }

    /// The session served least whose next job is of this kind and fits.
    fn next_lane(&self, kind: Kind, n_tokens: usize) -> Option<LaneId> {
        self.fronts()
            .filter(|(_, _, front)| front.kind == kind && front.n_tokens <= n_tokens)
            .min_by_key(|(_, lane, front)| (lane.served, front.arrival))
            .map(|(id, _, _)| id)
    }

    fn fronts(&self) -> impl Iterator<Item = (LaneId, &Lane<J>, &Waiting<J>)> {
        self.lanes.iter().filter_map(|(&id, lane)| lane.jobs.front().map(|front| (id, lane, front)))
    }
}

struct Shared<J> {
    queue: Queue<J>,
    closed: bool,
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
        let shared = Mutex::new(Shared { queue: Queue::default(), closed: false });
        Scheduler { shared, pushed: Condvar::new(), max_queued_jobs }
    }

    /// Hands a job over, or says why not.
    pub fn submit(&self, id: LaneId, kind: Kind, n_tokens: usize, job: J) -> Result<(), Error> {
        let mut shared = self.lock();
        if shared.closed {
            return Err(Error::Gone { part: "engine" });
        }
        if kind != Kind::Control && shared.queue.len() >= self.max_queued_jobs {
            return Err(Error::QueueFull { limit: self.max_queued_jobs });
        }
        shared.queue.push(id, kind, n_tokens, Instant::now(), job);
        drop(shared);
        self.pushed.notify_one();
        Ok(())
    }

    /// Waits for work. None: closed and nothing left.
    pub fn take(&self, budget: Budget) -> Option<Batch<J>> {
        let mut shared = self.lock();
        loop {
            if let Some(batch) = shared.queue.next_batch(Instant::now(), budget) {
                return Some(batch);
            }
            if shared.closed {
                return None;
            }
            shared = self.pushed.wait(shared).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    /// Drops a session's counter and whatever it still has waiting.
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
        // Dropped outside the lock: a job's reply wakes others.
        let dropped = shared.queue.drain();
        drop(shared);
        drop(dropped);
        self.pushed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Shared<J>> {
        // The queue's own methods leave it whole even if one panics in between.
        self.shared.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDE: Budget = Budget { n_tokens: 1000 };

    struct Fixture {
        queue: Queue<&'static str>,
        now: Instant,
    }

    fn fixture() -> Fixture {
        Fixture { queue: Queue::default(), now: Instant::now() }
    }

    impl Fixture {
        fn push(&mut self, lane: u64, kind: Kind, n_tokens: usize, job: &'static str) {
            self.queue.push(LaneId(lane), kind, n_tokens, self.now, job);
        }

        fn next(&mut self, budget: Budget) -> Vec<&'static str> {
            let batch = self.queue.next_batch(self.now, budget);
            batch.into_iter().flat_map(|b| b.jobs).map(|taken| taken.job).collect()
        }
    }

    #[test]
    fn jobs_of_one_session_keep_their_order() {
        let mut f = fixture();
        f.push(0, Kind::Forward, 10, "f1");
        f.push(0, Kind::Backward, 10, "b1");
        f.push(0, Kind::Control, 0, "step");
        f.push(0, Kind::Forward, 10, "f2");
        f.push(0, Kind::Forward, 10, "f3");
        assert_eq!(f.next(WIDE), ["f1"]);
        assert_eq!(f.next(WIDE), ["b1"]);
        assert_eq!(f.next(WIDE), ["step"]);
        assert_eq!(f.next(WIDE), ["f2", "f3"]);
        assert!(f.next(WIDE).is_empty() && f.queue.len() == 0);
    }

    #[test]
    fn a_batch_has_one_kind_and_keeps_to_its_budget() {
        let mut f = fixture();
        f.push(0, Kind::Forward, 600, "a");
        f.push(1, Kind::Backward, 10, "b");
        f.push(2, Kind::Forward, 600, "c");
        f.push(3, Kind::Forward, 300, "d");
        assert_eq!(f.next(WIDE), ["a", "d"]);
        assert_eq!(f.next(WIDE), ["b"]);
        assert_eq!(f.next(WIDE), ["c"]);
        f.push(0, Kind::Forward, 5000, "larger than any batch");
        f.push(1, Kind::Forward, 1, "small");
        let mut all = f.next(WIDE);
        assert_eq!(all.len(), 1);
        all.extend(f.next(WIDE));
        all.sort();
        assert_eq!(all, ["larger than any batch", "small"]);
    }

    #[test]
    fn control_goes_first_so_that_forwards_meet() {
        let mut f = fixture();
        f.push(1, Kind::Forward, 10, "b.f");
        f.push(0, Kind::Control, 0, "a.step");
        f.push(0, Kind::Forward, 10, "a.f");
        assert_eq!(f.next(WIDE), ["a.step"]);
        assert_eq!(f.next(WIDE), ["b.f", "a.f"]);
    }

    #[test]
    fn cost_is_shared_equally_between_heavy_and_light() {
        // Also with a client that sends one job after the other.
        for backlog in [1, 3] {
            let mut f = fixture();
            let alone = Budget { n_tokens: 1 };
            let mut served = [0, 0];
            for _ in 0..400 {
                for (lane, n_tokens, job) in [(0, 512, "heavy"), (1, 32, "light")] {
                    let waiting = f.queue.lanes.get(&LaneId(lane));
                    if waiting.is_none_or(|lane| lane.jobs.len() < backlog) {
                        f.push(lane, Kind::Forward, n_tokens, job);
                    }
                }
                match f.next(alone)[..] {
                    ["heavy"] => served[0] += 512,
                    ["light"] => served[1] += 32,
                    ref other => panic!("{other:?}"),
                }
            }
            let share = served[0] as f64 / (served[0] + served[1]) as f64;
            assert!((share - 0.5).abs() < 0.05, "backlog {backlog}: {served:?}");
        }
    }

    #[test]
    fn who_returns_cannot_have_saved_up() {
        let mut f = fixture();
        let alone = Budget { n_tokens: 1 };
        f.push(1, Kind::Forward, 10, "idle later");
        f.next(alone);
        for _ in 0..100 {
            f.push(0, Kind::Forward, 10, "busy");
            f.push(0, Kind::Forward, 10, "busy");
            f.next(alone);
        }
        for _ in 0..100 {
            f.push(1, Kind::Forward, 10, "returned");
        }
        let next: Vec<_> = (0..6).flat_map(|_| f.next(alone)).collect();
        let busy = next.iter().filter(|job| **job == "busy").count();
        assert!((2..=4).contains(&busy), "{next:?}");
    }

    #[test]
    fn a_closed_scheduler_runs_what_waits_and_takes_nothing_new() {
        let scheduler = Scheduler::new(1);
        let lane = LaneId(1);
        scheduler.submit(lane, Kind::Forward, 1, "f").unwrap();
        let full = scheduler.submit(lane, Kind::Forward, 1, "g").unwrap_err();
        assert!(matches!(full, Error::QueueFull { limit: 1 }));
        scheduler.submit(lane, Kind::Control, 0, "step").unwrap();
        scheduler.close();
        assert!(scheduler.submit(lane, Kind::Control, 0, "late").is_err());
        assert_eq!(scheduler.take(WIDE).unwrap().jobs[0].job, "f");
        assert_eq!(scheduler.take(WIDE).unwrap().jobs[0].job, "step");
        assert!(scheduler.take(WIDE).is_none());
    }
}
