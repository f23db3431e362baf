use super::*;

const WIDE: Budget = Budget { n_tokens: 1000, wait: Duration::ZERO };
const ALONE: Budget = Budget { n_tokens: 1, wait: Duration::ZERO };

struct Fixture {
    queue: Queue<&'static str>,
    now: Instant,
}

fn fixture() -> Fixture {
    Fixture { queue: Queue::default(), now: Instant::now() }
}

impl Fixture {
    /// Into the lane of an owner of its own.
    fn push(&mut self, lane: u64, kind: Kind, n_tokens: usize, job: &'static str) {
        if !self.queue.lanes.contains_key(&LaneId(lane)) {
            self.open(lane, lane, 1);
        }
        let entry = Entry { kind, n_tokens, since: self.now, job };
        self.queue.push(LaneId(lane), entry).unwrap();
    }

    fn open(&mut self, lane: u64, owner: u64, weight: u32) {
        self.queue.open(LaneId(lane), Share { owner: OwnerId(owner), weight });
    }

    fn batch(&mut self, budget: Budget) -> Vec<Taken<&'static str>> {
        self.queue.next_batch(budget).into_iter().flat_map(|batch| batch.jobs).collect()
    }

    fn next(&mut self, budget: Budget) -> Vec<&'static str> {
        self.batch(budget).into_iter().map(|taken| taken.entry.job).collect()
    }

    fn n_waiting(&self, lane: u64) -> usize {
        self.queue.lanes.get(&LaneId(lane)).map_or(0, |lane| lane.jobs.len())
    }

    /// The tokens that each lane got in so many batches of one job, with so many jobs always
    /// waiting in each.
    fn served<const N: usize>(&mut self, tokens: [usize; N], backlog: usize) -> [usize; N] {
        let names = ["0", "1", "2", "3"];
        let mut served = [0; N];
        for _ in 0..600 {
            for (lane, &n_tokens) in tokens.iter().enumerate() {
                while self.n_waiting(lane as u64) < backlog {
                    self.push(lane as u64, Kind::Forward, n_tokens, names[lane]);
                }
            }
            let next = self.next(ALONE);
            let lane = names.iter().position(|name| [*name] == next[..]).unwrap();
            served[lane] += tokens[lane];
        }
        served
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
    // Never two of one session in a batch.
    assert_eq!(f.next(WIDE), ["f2"]);
    assert_eq!(f.next(WIDE), ["f3"]);
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
        let [heavy, light] = fixture().served([512, 32], backlog);
        let share = heavy as f64 / (heavy + light) as f64;
        assert!((share - 0.5).abs() < 0.05, "backlog {backlog}: {heavy} {light}");
    }
}

#[test]
fn weights_divide_the_device_between_owners_not_sessions() {
    let mut f = fixture();
    // One owner of weight 3 with one session; one of weight 1 with two.
    f.open(0, 7, 3);
    f.open(1, 8, 1);
    f.open(2, 8, 1);
    let [alone, first, second] = f.served([10, 10, 10], 2);
    let share = alone as f64 / (alone + first + second) as f64;
    assert!((share - 0.75).abs() < 0.02, "{alone} {first} {second}");
    assert!(first.abs_diff(second) <= 20, "{first} {second}");
}

/// The tokens that each owner got in so many batches of one job, with a job always waiting in each
/// lane. Lanes are given by their owners.
fn shares(f: &mut Fixture, lanes: &[u64], n_batches: usize) -> HashMap<u64, usize> {
    let mut served = HashMap::new();
    for _ in 0..n_batches {
        for lane in 0..lanes.len() as u64 {
            if f.n_waiting(lane) == 0 {
                f.push(lane, Kind::Forward, 10, "job");
            }
        }
        let taken = f.batch(ALONE).remove(0);
        *served.entry(lanes[taken.lane.0 as usize]).or_default() += taken.entry.n_tokens;
    }
    served
}

#[test]
fn eight_sessions_get_no_more_than_one() {
    let mut f = fixture();
    let lanes = [7, 7, 7, 7, 7, 7, 7, 7, 8];
    for (lane, &owner) in lanes.iter().enumerate() {
        f.open(lane as u64, owner, 1);
    }
    let served = shares(&mut f, &lanes, 800);
    assert!(served[&7].abs_diff(served[&8]) <= 20, "{served:?}");
}

#[test]
fn a_weight_that_changes_while_jobs_wait_counts_from_then_on() {
    let mut f = fixture();
    let lanes = [7, 7, 8];
    f.open(0, 7, 1);
    f.open(1, 7, 1);
    f.open(2, 8, 1);
    let even = shares(&mut f, &lanes, 400);
    assert!(even[&7].abs_diff(even[&8]) <= 20, "{even:?}");
    f.queue.set_weight(Share { owner: OwnerId(8), weight: 3 });
    let uneven = shares(&mut f, &lanes, 400);
    assert!(uneven[&8].abs_diff(3 * uneven[&7]) <= 80, "{uneven:?}");
    // An owner without a lane is nobody.
    f.queue.set_weight(Share { owner: OwnerId(99), weight: 3 });
    assert_eq!(f.queue.owners.len(), 2);
}

#[test]
fn who_returns_cannot_have_saved_up() {
    let mut f = fixture();
    f.push(1, Kind::Forward, 10, "idle later");
    f.next(ALONE);
    for _ in 0..100 {
        f.push(0, Kind::Forward, 10, "busy");
        f.push(0, Kind::Forward, 10, "busy");
        f.next(ALONE);
    }
    for _ in 0..100 {
        f.push(1, Kind::Forward, 10, "returned");
    }
    let next: Vec<_> = (0..6).flat_map(|_| f.next(ALONE)).collect();
    let busy = next.iter().filter(|job| **job == "busy").count();
    assert!((2..=4).contains(&busy), "{next:?}");
}

#[test]
fn a_job_that_was_put_back_keeps_its_place_and_costs_nothing() {
    let mut f = fixture();
    f.push(0, Kind::Forward, 500, "large");
    f.push(0, Kind::Backward, 500, "behind it");
    f.push(1, Kind::Forward, 10, "small");
    let mut taken = f.batch(ALONE);
    assert_eq!(taken[0].entry.job, "large");
    f.queue.put_back(taken.remove(0)).unwrap();
    assert_eq!(f.queue.len(), 3);
    // Nothing of its lane runs before it.
    assert_eq!(f.next(WIDE), ["small"]);
    assert!(f.next(WIDE).is_empty());
    f.push(1, Kind::Forward, 10, "another");
    f.queue.let_go();
    assert_eq!(f.next(ALONE), ["large"]);
    assert_eq!(f.next(ALONE), ["another"]);
    assert_eq!(f.next(ALONE), ["behind it"]);
}

#[test]
fn a_batch_waits_for_company_but_not_when_it_is_full_or_control_waits() {
    let mut f = fixture();
    let patient = Budget { n_tokens: 100, wait: Duration::from_millis(5) };
    assert_eq!(f.queue.begins(patient), None);
    f.push(0, Kind::Forward, 60, "a");
    assert_eq!(f.queue.begins(patient), Some(f.now + patient.wait));
    assert_eq!(f.queue.begins(WIDE), Some(f.now));
    f.push(1, Kind::Forward, 60, "b");
    assert_eq!(f.queue.begins(patient), Some(f.now));
    f.next(patient);
    f.push(2, Kind::Control, 0, "step");
    assert_eq!(f.queue.begins(patient), Some(f.now));
}

#[test]
fn a_closed_lane_takes_nothing_and_its_owner_is_forgotten() {
    let mut f = fixture();
    f.push(3, Kind::Forward, 1, "a");
    f.push(3, Kind::Forward, 1, "b");
    assert_eq!(f.queue.forget(LaneId(3)), ["a", "b"]);
    assert!(f.queue.len() == 0 && f.queue.owners.is_empty() && f.queue.ready.is_empty());
    let entry = Entry { kind: Kind::Forward, n_tokens: 1, since: f.now, job: "c" };
    assert_eq!(f.queue.push(LaneId(3), entry), Err("c"));
}
