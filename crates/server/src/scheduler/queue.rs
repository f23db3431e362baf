use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::{Duration, Instant};

/// Whose jobs keep their order: one session's place on the device. A session that leaves and comes
/// back gets a new one, so that nothing of its earlier life can meet it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LaneId(pub u64);

/// Who shares the device with others: a tenant, however many sessions it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct OwnerId(pub u64);

/// Whose a session is, and how much of the device is its owner's: twice the weight is twice the
/// tokens when all want more than there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    pub owner: OwnerId,
    /// At least 1.
    pub weight: u32,
}

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
    pub fn cost(self, n_tokens: usize) -> u64 {
        let per_token = match self {
            Kind::Forward => 2,
            Kind::Backward => 3,
            Kind::Control => 0,
        };
        n_tokens as u64 * per_token
    }
}

/// What a batch may hold, and for what it waits.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    /// Packed tokens. A job that is larger runs alone.
    pub n_tokens: usize,
    /// How long a job may be kept waiting for company; zero: not at all.
    pub wait: Duration,
}

/// A job that waits.
#[derive(Debug, PartialEq)]
pub struct Entry<J> {
    pub kind: Kind,
    /// Packed tokens; 0 for control.
    pub n_tokens: usize,
    pub since: Instant,
    pub job: J,
}

/// A job that leaves the queue.
#[derive(Debug, PartialEq)]
pub struct Taken<J> {
    pub lane: LaneId,
    pub entry: Entry<J>,
    arrival: u64,
}

/// Jobs of one kind that may run together, in this order.
#[derive(Debug, PartialEq)]
pub struct Batch<J> {
    pub kind: Kind,
    pub jobs: Vec<Taken<J>>,
}

struct Waiting<J> {
    entry: Entry<J>,
    /// Order of arrival over all sessions: settles ties.
    arrival: u64,
}

struct Lane<J> {
    owner: OwnerId,
    jobs: VecDeque<Waiting<J>>,
    /// What this session has had, among those of its owner.
    served: u64,
    /// Its first job was put back and waits for [`Queue::let_go`].
    held: bool,
}

struct Owner {
    weight: u32,
    n_lanes: usize,
    /// Lanes that have jobs.
    n_busy: usize,
    /// What the owner has had, over its weight.
    served: u64,
    /// Where its own sessions are: the one that was served last, before it was charged.
    floor: u64,
}

/// A queue at a glance.
#[derive(Debug, Clone, PartialEq)]
pub struct QueueView {
    /// Of each owner that has lanes, in no order.
    pub owners: Vec<OwnerView>,
    /// When the job came that waits for longest.
    pub oldest: Option<Instant>,
    /// Virtual time, in tokens of a forward over the weight.
    pub tokens: f64,
}

/// One owner at a glance.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OwnerView {
    pub owner: OwnerId,
    pub n_waiting: usize,
    /// The virtual counter, in tokens of a forward over the weight.
    pub tokens: f64,
}

/// Of a counter.
fn tokens(served: u64) -> f64 {
    served as f64 / (Kind::Forward.cost(1) * PARTS) as f64
}

/// Costs are counted in this many parts, so that a weight divides them.
const PARTS: u64 = 1 << 16;

/// Jobs by session. Those of one session leave in the order in which they came. Between owners the
/// one that was served least, over its weight, goes first, and within an owner the session that was;
/// who returns after a pause is lifted to where the others are, so that nobody can save up
/// (start-time fair queueing, Goyal et al. 1996).
pub struct Queue<J> {
    lanes: HashMap<LaneId, Lane<J>>,
    owners: HashMap<OwnerId, Owner>,
    /// Lanes whose first job could run.
    ready: BTreeSet<LaneId>,
    /// Virtual time: the counter of the owner that the last batch began with, before it was
    /// charged. Not the lowest of those that wait: a client that waits for each answer returns a
    /// moment later, and would lose its due each time.
    floor: u64,
    n_arrivals: u64,
    n_waiting: usize,
}

impl<J> Default for Queue<J> {
    fn default() -> Self {
        Queue {
            lanes: HashMap::new(),
            owners: HashMap::new(),
            ready: BTreeSet::new(),
            floor: 0,
            n_arrivals: 0,
            n_waiting: 0,
        }
    }
}

impl<J> Queue<J> {
    /// Jobs that wait.
    pub fn len(&self) -> usize {
        self.n_waiting
    }

    /// Who waits, and who had how much.
    pub fn view(&self) -> QueueView {
        let of = |(&owner, of): (&OwnerId, &Owner)| {
            (owner, OwnerView { owner, n_waiting: 0, tokens: tokens(of.served) })
        };
        let mut owners: HashMap<OwnerId, OwnerView> = self.owners.iter().map(of).collect();
        let mut oldest: Option<Instant> = None;
        for lane in self.lanes.values() {
            if let Some(owner) = owners.get_mut(&lane.owner) {
                owner.n_waiting += lane.jobs.len();
            }
            let first = lane.jobs.front().map(|front| front.entry.since);
            oldest = [oldest, first].into_iter().flatten().min();
        }
        QueueView { owners: owners.into_values().collect(), oldest, tokens: tokens(self.floor) }
    }

    /// Opens a session's lane.
    pub fn open(&mut self, id: LaneId, share: Share) {
        let Share { owner, weight } = share;
        let fresh = Owner { weight: 1, n_lanes: 0, n_busy: 0, served: 0, floor: 0 };
        let of = self.owners.entry(owner).or_insert(fresh);
        of.weight = weight.max(1);
        of.n_lanes += 1;
        let lane = Lane { owner, jobs: VecDeque::new(), served: 0, held: false };
        let before = self.lanes.insert(id, lane);
        debug_assert!(before.is_none(), "a lane is opened once");
    }

    /// Another weight from now on. What the owner had before counts as it did.
    pub fn set_weight(&mut self, share: Share) {
        if let Some(owner) = self.owners.get_mut(&share.owner) {
            owner.weight = share.weight.max(1);
        }
    }

    /// Adds a job behind the others of its session. Gives it back if the lane is not open.
    pub fn push(&mut self, id: LaneId, entry: Entry<J>) -> Result<(), J> {
        let Some(lane) = self.lanes.get_mut(&id) else { return Err(entry.job) };
        let owner = self.owners.get_mut(&lane.owner).expect("a lane has its owner");
        if lane.jobs.is_empty() {
            if owner.n_busy == 0 {
                owner.served = owner.served.max(self.floor);
            }
            lane.served = lane.served.max(owner.floor);
            owner.n_busy += 1;
            self.ready.insert(id);
        }
        lane.jobs.push_back(Waiting { entry, arrival: self.n_arrivals });
        self.n_arrivals += 1;
        self.n_waiting += 1;
        Ok(())
    }

    /// When the next batch should begin: in the past, unless jobs are kept for company. None: nothing
    /// can run.
    pub fn begins(&self, budget: Budget) -> Option<Instant> {
        let oldest = self.fronts().map(|(_, _, front)| front.entry.since).min()?;
        let is_control = |entry: &Entry<J>| entry.kind == Kind::Control;
        let n_tokens: usize = self.fronts().map(|(_, _, front)| front.entry.n_tokens).sum();
        let full = n_tokens >= budget.n_tokens;
        let at_once = full || self.fronts().any(|(_, _, front)| is_control(&front.entry));
        Some(if at_once { oldest } else { oldest + budget.wait })
    }

    /// The next jobs to run, all of one kind and of different sessions, at least one if any can run.
    /// What a session sends ahead never shares a batch with itself: else the numbers of a session
    /// that is alone would depend, in their last bits, on when its frames arrive.
    pub fn next_batch(&mut self, budget: Budget) -> Option<Batch<J>> {
        let kind = self.next_kind()?;
        let mut batch = Batch { kind, jobs: Vec::new() };
        let mut n_tokens = 0;
        // The first may be larger than the budget, or it would never run.
        let mut room = usize::MAX;
        while let Some(id) = self.next_lane(kind, room, &batch.jobs) {
            let taken = self.take(id, batch.jobs.is_empty());
            n_tokens += taken.entry.n_tokens;
            room = budget.n_tokens.saturating_sub(n_tokens);
            batch.jobs.push(taken);
        }
        Some(batch)
    }

    /// A job could not run yet: it is first in its lane again, and waits with the whole lane until
    /// [`Queue::let_go`]. Its cost is given back. Gives the job back if the lane is gone.
    pub fn put_back(&mut self, taken: Taken<J>) -> Result<(), J> {
        let Taken { lane: id, entry, arrival } = taken;
        let Some(lane) = self.lanes.get_mut(&id) else { return Err(entry.job) };
        let owner = self.owners.get_mut(&lane.owner).expect("a lane has its owner");
        let cost = entry.kind.cost(entry.n_tokens);
        owner.served = owner.served.saturating_sub(cost * PARTS / u64::from(owner.weight));
        lane.served = lane.served.saturating_sub(cost);
        if lane.jobs.is_empty() {
            owner.n_busy += 1;
        }
        lane.jobs.push_front(Waiting { entry, arrival });
        lane.held = true;
        self.ready.remove(&id);
        self.n_waiting += 1;
        Ok(())
    }

    /// What was put back may try again.
    pub fn let_go(&mut self) {
        for (id, lane) in self.lanes.iter_mut().filter(|(_, lane)| lane.held) {
            lane.held = false;
            self.ready.insert(*id);
        }
    }

    /// Closes a lane and gives whatever it still has waiting.
    pub fn forget(&mut self, id: LaneId) -> Vec<J> {
        let Some(lane) = self.lanes.remove(&id) else { return Vec::new() };
        self.ready.remove(&id);
        if let Some(owner) = self.owners.get_mut(&lane.owner) {
            owner.n_lanes -= 1;
            owner.n_busy -= usize::from(!lane.jobs.is_empty());
            if owner.n_lanes == 0 {
                self.owners.remove(&lane.owner);
            }
        }
        self.n_waiting -= lane.jobs.len();
        lane.jobs.into_iter().map(|waiting| waiting.entry.job).collect()
    }

    /// Everything that waits, in no order.
    pub fn drain(&mut self) -> Vec<J> {
        let ids: Vec<LaneId> = self.lanes.keys().copied().collect();
        ids.into_iter().flat_map(|id| self.forget(id)).collect()
    }

    fn take(&mut self, id: LaneId, begins: bool) -> Taken<J> {
        let lane = self.lanes.get_mut(&id).expect("a ready lane is open");
        let owner = self.owners.get_mut(&lane.owner).expect("a lane has its owner");
        let Waiting { entry, arrival } = lane.jobs.pop_front().expect("a ready lane has a job");
        if entry.kind != Kind::Control {
            if begins {
                self.floor = self.floor.max(owner.served);
            }
            owner.floor = owner.floor.max(lane.served);
            let cost = entry.kind.cost(entry.n_tokens);
            owner.served += cost * PARTS / u64::from(owner.weight);
            lane.served += cost;
        }
        if lane.jobs.is_empty() {
            owner.n_busy -= 1;
            self.ready.remove(&id);
        }
        self.n_waiting -= 1;
        Taken { lane: id, entry, arrival }
    }

    fn next_kind(&self) -> Option<Kind> {
        if self.fronts().any(|(_, _, front)| front.entry.kind == Kind::Control) {
            return Some(Kind::Control);
        }
        let first = self.fronts().min_by_key(|(_, lane, front)| self.order(lane, front));
        first.map(|(_, _, front)| front.entry.kind)
    }

    /// The session served least whose next job is of this kind and fits, but none of these.
    fn next_lane(&self, kind: Kind, n_tokens: usize, but: &[Taken<J>]) -> Option<LaneId> {
        self.fronts()
            .filter(|(id, _, _)| but.iter().all(|taken| taken.lane != *id))
            .filter(|(_, _, front)| front.entry.kind == kind && front.entry.n_tokens <= n_tokens)
            .min_by_key(|(_, lane, front)| self.order(lane, front))
            .map(|(id, _, _)| id)
    }

    fn order(&self, lane: &Lane<J>, front: &Waiting<J>) -> (u64, u64, u64) {
        (self.owners[&lane.owner].served, lane.served, front.arrival)
    }

    /// The jobs that could run next.
    fn fronts(&self) -> impl Iterator<Item = (LaneId, &Lane<J>, &Waiting<J>)> {
        self.ready.iter().filter_map(|id| {
            let lane = self.lanes.get(id)?;
            Some((*id, lane, lane.jobs.front()?))
        })
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
