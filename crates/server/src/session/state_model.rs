//! [`SessionState`] under any actions of a client and any faults, beside a plain model of what it
//! should do. The property test and the fuzz target both run it, from bytes.
//!
//! The model keeps the frames that were applied and works out from that list, from its beginning
//! each time, what is open and what a frame should meet. The engine is a chain of sums: a frame that
//! is left out, applied twice or applied in another order leaves other numbers.

use super::frame::{Effect, Head};
use super::state::{Admission, FrameLimits, Resume, SessionState, Settled, Ticket};
use offshoot_proto::v1::{ServerFrame, StepDone, server_frame::Body};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

const LIMITS: FrameLimits = FrameLimits { max_frames_in_flight: 4, max_open_microbatches: 3 };
/// Bytes of every tape and cache.
const BYTES: u64 = 10;
/// Of one run: more would only be slower.
const MAX_SNAPSHOTS: usize = 6;

/// What an engine holds of one session.
#[derive(Debug, Clone, Default, PartialEq)]
struct Engine {
    applied: u64,
    steps: u64,
    tapes: BTreeMap<u64, u64>,
    gradients: u64,
    parameters: u64,
}

/// Something that happened to the session for good.
#[derive(Debug, Clone)]
enum Event {
    Applied(Head),
    /// A Backward was refused and had used up its tape.
    Lost(Head),
}

#[derive(Clone)]
struct Snapshot {
    resume: Resume,
    engine: Engine,
    n_events: usize,
    recorded: BTreeSet<u64>,
    was_quiet: bool,
}

struct World {
    state: SessionState,
    engine: Engine,
    /// Admitted and not settled, oldest first; true once a frame before it was refused.
    pending: VecDeque<(Ticket, Head, bool)>,
    events: Vec<Event>,
    /// Events after which the tapes were lost, with everything else that lives in a process.
    began: usize,
    /// Numbers whose answers can still be asked for.
    recorded: BTreeSet<u64>,
    acknowledged: u64,
    caches: BTreeSet<u64>,
    draining: bool,
    snapshots: Vec<Snapshot>,
}

/// Runs what the bytes say, two for each action.
///
/// # Panics
/// If the state does something else than the model.
pub fn run(bytes: &[u8]) {
    let mut world = World::new();
    world.snapshot();
    for action in bytes.as_chunks::<2>().0 {
        world.act(action[0] % 16, action[1]);
        world.check();
    }
    while !world.pending.is_empty() {
        world.settle(None);
        world.check();
    }
    for snapshot in world.snapshots.clone() {
        world.replay(&snapshot);
    }
}

impl World {
    fn new() -> Self {
        World {
            state: SessionState::new(LIMITS, Resume::default()),
            engine: Engine::default(),
            pending: VecDeque::new(),
            events: Vec::new(),
            began: 0,
            recorded: BTreeSet::new(),
            acknowledged: 0,
            caches: BTreeSet::new(),
            draining: false,
            snapshots: Vec::new(),
        }
    }

    fn act(&mut self, what: u8, which: u8) {
        let next = self.state.expected_applied() + 1;
        let a = u64::from(which);
        match what {
            0..=5 => self.send(head(next, self.acknowledged, effect(what, a), a)),
            // An old number, or one that is on its way, as it was and changed.
            6 | 7 => {
                let Some(mut known) = self.known(1 + a % next.max(2)) else { return };
                known.acknowledged = self.acknowledged;
                known.digest[9] ^= what - 6;
                self.send(known);
            }
            8 => self.send(head(next + 1 + a, self.acknowledged, Effect::Nothing, a)),
            9 if a % 8 == 7 => {
                self.send(head(next, self.engine.applied + 1 + a, Effect::Nothing, a));
            }
            9 => self.acknowledged = self.acknowledged.max(a.min(self.engine.applied)),
            10 | 11 => self.settle(None),
            12 => (0..self.pending.len()).for_each(|_| self.settle(None)),
            13 => self.settle(Some(a % 2 == 1)),
            _ => match a % 4 {
                0 => self.snapshot(),
                1 => self.crash(a as usize / 4),
                2 if a > 200 => {
                    self.draining = true;
                    self.state.drain();
                }
                _ => self.leave(a / 4),
            },
        }
    }

    /// The frame that has this number now.
    fn known(&self, sequence: u64) -> Option<Head> {
        let live = self.pending.iter().filter(|(.., doomed)| !doomed).map(|(_, head, _)| head);
        live.chain(self.applied()).find(|head| head.sequence == sequence).cloned()
    }

    fn applied(&self) -> impl DoubleEndedIterator<Item = &Head> {
        self.events.iter().filter_map(|event| match event {
            Event::Applied(head) => Some(head),
            Event::Lost(_) => None,
        })
    }

    /// Microbatches whose tape is there once all that is on its way has been applied.
    fn open(&self, with_pending: bool) -> BTreeSet<u64> {
        let mut open = BTreeSet::new();
        let of_events = self.events[self.began..].iter().map(|event| match event {
            Event::Applied(head) => head.effect,
            Event::Lost(head) => head.effect,
        });
        let live = self.pending.iter().filter(|(.., doomed)| with_pending && !doomed);
        for effect in of_events.chain(live.map(|(_, head, _)| head.effect)) {
            match effect {
                Effect::Open(microbatch) => assert!(open.insert(microbatch)),
                Effect::Close(microbatch) => assert!(open.remove(&microbatch)),
                Effect::Discard(microbatch) => drop(open.remove(&microbatch)),
                Effect::Step => assert!(open.is_empty(), "a step with an open microbatch"),
                Effect::Nothing | Effect::Extend(_) | Effect::DropCache(_) => {}
            }
        }
        open
    }

    /// What a frame should meet: an answer or a ticket, or the label of a refusal.
    fn expected(&self, head: &Head) -> Result<Option<Admission>, &'static str> {
        let sequence = head.sequence;
        if head.acknowledged > self.engine.applied {
            return Err("acknowledged");
        }
        if sequence <= self.engine.applied {
            if !self.recorded.contains(&sequence) || sequence <= head.acknowledged {
                return Err("forgotten");
            }
            let known = self.known(sequence).expect("it was applied");
            let answered = Admission::Answered(Box::new(answer(&known)));
            return if known.digest == head.digest { Ok(Some(answered)) } else { Err("payload") };
        }
        let live: Vec<_> = self.pending.iter().filter(|(.., doomed)| !doomed).collect();
        if let Some((ticket, known, _)) = live.iter().find(|(_, head, _)| head.sequence == sequence)
        {
            let joined = Admission::Joined(*ticket);
            return if known.digest == head.digest { Ok(Some(joined)) } else { Err("payload") };
        }
        if sequence != self.engine.applied + live.len() as u64 + 1 {
            return Err("gap");
        }
        if live.len() >= LIMITS.max_frames_in_flight {
            return Err("in_flight");
        }
        let open = self.open(true);
        match head.effect {
            Effect::Open(_) | Effect::Extend(_) if self.draining => Err("draining"),
            Effect::Open(microbatch) if open.contains(&microbatch) => Err("open_tape"),
            Effect::Open(_) if open.len() >= LIMITS.max_open_microbatches => {
                Err("open_microbatches")
            }
            Effect::Close(microbatch) if !open.contains(&microbatch) => Err("no_tape"),
            Effect::Step if !open.is_empty() => Err("step_with_open"),
            _ => Ok(None),
        }
    }

    fn send(&mut self, head: Head) {
        let expected = self.expected(&head);
        let (before, met) = (self.seen(), self.state.admit(&head));
        if expected != Err("acknowledged") {
            self.recorded.retain(|&sequence| sequence > head.acknowledged);
        }
        match (expected, met) {
            (Ok(None), Ok(Admission::Run(ticket))) => {
                assert!(self.pending.iter().all(|(other, ..)| *other != ticket));
                self.pending.push_back((ticket, head, false));
            }
            (Ok(Some(expected)), Ok(met)) => {
                assert_eq!(expected, met);
                assert_eq!(self.seen(), before, "a repeated frame changed something");
            }
            (Err(expected), Err(error)) => {
                assert_eq!(error.label(), expected, "{head:?}: {error}");
                assert_eq!(self.seen(), before, "a refused frame changed something");
            }
            (expected, met) => panic!("{head:?} met {met:?}, expected {expected:?}"),
        }
    }

    /// What a frame that is refused must leave as it is.
    fn seen(&self) -> impl PartialEq + std::fmt::Debug + use<> {
        let state = &self.state;
        let counts = (state.applied(), state.step(), state.expected_applied());
        (counts, state.open().clone(), state.cache_bytes(), state.is_quiet(), state.is_settled())
    }

    /// The engine is done with the oldest frame. `fault`: it refuses it; true: after the tape was used.
    fn settle(&mut self, fault: Option<bool>) {
        let Some((ticket, head, doomed)) = self.pending.pop_front() else { return };
        let in_order = head.sequence == self.engine.applied + 1;
        assert_eq!(in_order, !doomed, "the engine alone could tell what is behind a refusal");
        if in_order && fault.is_none() {
            self.engine.apply(&head);
            let settled = settled(&head, &self.engine);
            self.state.settle(ticket, settled);
            self.recorded.insert(head.sequence);
            while self.recorded.len() > LIMITS.max_frames_in_flight {
                self.recorded.pop_first();
            }
            match head.effect {
                Effect::Extend(cache) => drop(self.caches.insert(cache)),
                Effect::DropCache(cache) => drop(self.caches.remove(&cache)),
                Effect::Step => self.caches.clear(),
                _ => {}
            }
            self.events.push(Event::Applied(head));
            return;
        }
        let mut lost = None;
        if in_order {
            self.pending.iter_mut().for_each(|(.., doomed)| *doomed = true);
            if let (Effect::Close(microbatch), Some(true)) = (head.effect, fault) {
                self.engine.tapes.remove(&microbatch).expect("it is open");
                lost = Some(microbatch);
                self.events.push(Event::Lost(head));
            }
        }
        self.state.settle(ticket, Settled::Refused { lost });
    }

    fn snapshot(&mut self) {
        if !self.pending.is_empty() || self.snapshots.len() >= MAX_SNAPSHOTS {
            return;
        }
        self.snapshots.push(Snapshot {
            resume: self.state.resume(),
            engine: Engine { tapes: BTreeMap::new(), ..self.engine.clone() },
            n_events: self.events.len(),
            recorded: self.recorded.clone(),
            was_quiet: self.state.is_quiet(),
        });
    }

    /// The process dies and comes back with a snapshot; what was after it is over.
    fn crash(&mut self, which: usize) {
        let which = which % self.snapshots.len();
        self.replay(&self.snapshots[which].clone());
        self.snapshots.truncate(which + 1);
        let snapshot = self.snapshots[which].clone();
        self.state = SessionState::new(LIMITS, snapshot.resume);
        self.engine = snapshot.engine;
        self.pending.clear();
        self.events.truncate(snapshot.n_events);
        self.began = snapshot.n_events;
        self.recorded = snapshot.recorded;
        self.acknowledged = 0;
        self.caches.clear();
        self.draining = false;
    }

    /// To host memory or disk and back: caches are gone, answers are not, nor is what was
    /// acknowledged.
    fn leave(&mut self, seen: u64) {
        if !self.state.is_quiet() {
            return;
        }
        let answers = self.state.resume().answers;
        self.state.drop_answers();
        self.state.drop_caches();
        self.caches.clear();
        // A client that comes back meanwhile says what it has seen.
        let seen = self.acknowledged.max(seen.min(self.engine.applied));
        self.state.acknowledge(seen).expect("it was applied");
        self.acknowledged = seen;
        self.state.put_answers(answers);
        self.recorded.retain(|&sequence| sequence > seen);
    }

    /// The frames after a snapshot, sent again to a session that comes back from it, end where they
    /// ended.
    fn replay(&self, snapshot: &Snapshot) {
        if !snapshot.was_quiet || self.began > snapshot.n_events {
            return;
        }
        let mut state = SessionState::new(LIMITS, snapshot.resume.clone());
        let mut engine = snapshot.engine.clone();
        for event in &self.events[snapshot.n_events..] {
            let (Event::Applied(head) | Event::Lost(head)) = event;
            let head = Head { acknowledged: 0, ..head.clone() };
            let Ok(Admission::Run(ticket)) = state.admit(&head) else {
                panic!("{head:?} is refused when it is replayed");
            };
            match event {
                Event::Applied(_) => {
                    engine.apply(&head);
                    state.settle(ticket, settled(&head, &engine));
                }
                Event::Lost(_) => {
                    let (Effect::Close(microbatch), lost) = (head.effect, &mut engine.tapes) else {
                        unreachable!("only a Backward uses a tape up");
                    };
                    lost.remove(&microbatch);
                    state.settle(ticket, Settled::Refused { lost: Some(microbatch) });
                }
            }
        }
        assert_eq!(engine, self.engine);
        assert_eq!((state.applied(), state.step()), (self.state.applied(), self.state.step()));
        assert_eq!(state.open(), self.state.open());
    }

    fn check(&self) {
        let (state, engine) = (&self.state, &self.engine);
        let live = self.pending.iter().filter(|(.., doomed)| !doomed).count();
        assert!(live <= LIMITS.max_frames_in_flight);
        assert_eq!((state.applied(), state.step()), (engine.applied, engine.steps));
        assert_eq!(state.expected_applied(), engine.applied + live as u64);
        assert!(self.applied().map(|head| head.sequence).eq(1..=engine.applied), "each once");
        let steps = self.applied().filter(|head| head.effect == Effect::Step).count();
        assert_eq!(state.step(), steps as u64);
        let open = self.open(false);
        assert!(state.open().keys().eq(open.iter()) && engine.tapes.keys().eq(open.iter()));
        assert!(self.open(true).len() <= LIMITS.max_open_microbatches);
        assert_eq!(state.is_settled(), self.pending.is_empty());
        assert_eq!(state.is_quiet(), self.pending.is_empty() && open.is_empty());
        assert_eq!(state.is_draining(), self.draining);
        assert_eq!(state.cache_bytes(), BYTES * self.caches.len() as u64);
        let answers = state.resume().answers;
        assert!(answers.iter().map(|answer| &answer.sequence).eq(&self.recorded));
        for recorded in answers {
            let head = self.known(recorded.sequence).expect("only what was applied is recorded");
            assert_eq!((recorded.digest, recorded.answer), (head.digest, answer(&head)));
        }
    }
}

impl Engine {
    fn apply(&mut self, head: &Head) {
        let payload = u64::from(head.digest[9]) + 1;
        match head.effect {
            Effect::Open(microbatch) => {
                assert!(self.tapes.insert(microbatch, payload).is_none());
            }
            Effect::Close(microbatch) => {
                let tape = self.tapes.remove(&microbatch).expect("a backward has its tape");
                self.gradients = chain(self.gradients, tape * payload);
            }
            Effect::Discard(microbatch) => drop(self.tapes.remove(&microbatch)),
            Effect::Step => {
                self.steps += 1;
                self.parameters = chain(self.parameters, self.gradients + payload);
                self.gradients = 0;
            }
            Effect::Nothing | Effect::Extend(_) | Effect::DropCache(_) => {}
        }
        self.applied = head.sequence;
    }
}

/// Depends on the order.
fn chain(sum: u64, term: u64) -> u64 {
    sum.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(term)
}

fn effect(what: u8, a: u64) -> Effect {
    let (microbatch, cache) = (a % 5, a % 3);
    match what {
        0 | 1 => Effect::Open(microbatch),
        2 => Effect::Close(microbatch),
        3 => Effect::Step,
        4 if a.is_multiple_of(2) => Effect::Discard(microbatch),
        4 => Effect::Nothing,
        _ if a.is_multiple_of(4) => Effect::DropCache(cache),
        _ => Effect::Extend(cache),
    }
}

/// A frame with a payload.
fn head(sequence: u64, acknowledged: u64, effect: Effect, payload: u64) -> Head {
    let mut digest = [0; 32];
    digest[..8].copy_from_slice(&sequence.to_le_bytes());
    digest[9] = payload as u8;
    Head { sequence, acknowledged, digest, effect }
}

/// The answer that tells its frame from all others.
fn answer(head: &Head) -> ServerFrame {
    let step = u64::from(head.digest[9]);
    let body = Some(Body::Step(StepDone { step, snapshot: false }));
    ServerFrame { sequence: head.sequence, body }
}

fn settled(head: &Head, engine: &Engine) -> Settled {
    let step = (head.effect == Effect::Step).then_some(engine.steps);
    Settled::Applied { answer: Box::new(answer(head)), bytes: BYTES, step }
}
