//! A client's window and a server's session at the two ends of a link that breaks, beside processes
//! that end: whatever happens, each step of the client's program is applied once, in its order.
//!
//! The window is the client's own; its feature `fuzzing` shows it. The engine is a chain of sums: a
//! backward or a step that is left out, doubled or out of order leaves other numbers.

use super::frame::{Effect, Head};
use super::state::{Admission, FrameLimits, Resume, SessionState, Settled, Ticket};
use super::state_properties::cases;
use crate::error::Error;
use crate::refusals::RequestId;
use offshoot_client::fuzzing::{Done, NOBODY, Side};
use offshoot_proto::v1::{self, ClientFrame, ServerFrame, client_frame, server_frame::Body};
use proptest::collection::vec;
use proptest::prelude::*;
use prost::Message;
use std::collections::{BTreeMap, VecDeque};

const LIMITS: FrameLimits = FrameLimits { max_frames_in_flight: 4, max_open_microbatches: 2 };
const STEPS: u64 = 4;
/// Two forwards, their backwards, a step.
const PER_STEP: u64 = 5;

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(cases(400))
    })]

    #[test]
    fn each_step_is_applied_once_whatever_link_and_processes_do(
        events in vec(any::<u8>(), 0..300)
    ) {
        let mut world = World::new();
        for event in events {
            world.happen(event);
        }
        world.finish();
    }
}

/// What an engine holds of the session.
#[derive(Clone, Default, PartialEq, Debug)]
struct Engine {
    applied: u64,
    steps: u64,
    tapes: BTreeMap<u64, u64>,
    gradients: u64,
    parameters: u64,
}

/// A frame's place among the answers of the stream that there is.
enum Slot {
    Ready(Box<ServerFrame>),
    Awaits(Ticket),
}

struct Snapshot {
    resume: Resume,
    engine: Engine,
}

struct World {
    client: Side,
    connected: bool,
    /// What of the program was pushed, in this life of the client's session.
    next: u64,
    /// Microbatches of answered forwards, by their place in the program.
    forwarded: BTreeMap<u64, u64>,
    upwards: VecDeque<ClientFrame>,
    downwards: VecDeque<ServerFrame>,
    state: SessionState,
    engine: Engine,
    in_engine: VecDeque<(Ticket, ClientFrame)>,
    outbox: VecDeque<Slot>,
    snapshots: Vec<Snapshot>,
}

impl World {
    fn new() -> Self {
        let first = Snapshot { resume: Resume::default(), engine: Engine::default() };
        World {
            client: Side::new(0, &limits()),
            connected: true,
            next: 0,
            forwarded: BTreeMap::new(),
            upwards: VecDeque::new(),
            downwards: VecDeque::new(),
            state: SessionState::new(LIMITS, Resume::default()),
            engine: Engine::default(),
            in_engine: VecDeque::new(),
            outbox: VecDeque::new(),
            snapshots: vec![first],
        }
    }

    fn happen(&mut self, event: u8) {
        match event % 32 {
            0..=5 => self.push(),
            6..=9 => self.send(),
            10..=14 => self.take_frame(),
            15..=19 => self.run_engine(None),
            20..=24 => self.take_answer(),
            25 => self.run_engine(Some(Fault::Later)),
            26 => self.client.release(),
            27 => self.disconnect(),
            28 => self.connect(),
            29 => self.snapshot(),
            30 if event < 96 => self.crash(),
            30 if event < 128 => self.run_engine(Some(Fault::ForGood)),
            30 if event < 160 => self.run_engine(Some(Fault::LostTape)),
            30 if event < 192 => self.state.drain(),
            _ => self.connect(),
        }
        assert!(
            self.state.applied() == self.engine.applied && self.state.step() == self.engine.steps
        );
    }

    /// From here on all goes well, and the program comes to its end.
    fn finish(&mut self) {
        for _ in 0..1000 {
            if self.next == STEPS * PER_STEP && self.client.is_empty() {
                assert_eq!(self.engine, uninterrupted(self.engine.applied));
                return;
            }
            if self.state.is_draining() && self.state.is_quiet() {
                self.snapshot();
                self.crash();
            }
            self.client.release();
            self.connect();
            self.push();
            self.send();
            self.take_frame();
            self.run_engine(None);
            self.take_answer();
        }
        panic!("stuck at {} of the program, {} steps", self.next, self.engine.steps);
    }

    /// The next of the program, if it can be: a backward has to wait for its forward's answer.
    fn push(&mut self) {
        let place = self.next;
        if place == STEPS * PER_STEP || !self.client.has_room() {
            return;
        }
        match place % PER_STEP {
            0 | 1 => {
                let mode = v1::Mode::Train as i32;
                let forward = v1::Forward { mode, dropout_key: place + 1, ..Default::default() };
                self.client.forward(forward, place);
            }
            2 | 3 => {
                let Some(&microbatch) = self.forwarded.get(&(place - 2)) else { return };
                self.client.backward(place - 2, microbatch, place);
            }
            _ => {
                let step =
                    v1::Step { learning_rate: place as f64, clip_factor: 1.0, shared_loss: None };
                self.client.step(step, place);
            }
        }
        self.next += 1;
    }

    fn send(&mut self) {
        while self.connected {
            let Some(frame) = self.client.send() else { break };
            self.upwards.push_back(frame);
        }
        // As its task does: another server, or this one started again, may take the frames.
        if self.connected && self.client.may_leave() {
            self.disconnect();
        }
    }

    fn take_frame(&mut self) {
        let Some(frame) = self.upwards.pop_front() else { return };
        let sequence = frame.sequence;
        self.outbox.push_back(match self.state.admit(&head(&frame)) {
            Ok(Admission::Run(ticket)) => {
                self.in_engine.push_back((ticket, frame));
                Slot::Awaits(ticket)
            }
            Ok(Admission::Joined(ticket)) => Slot::Awaits(ticket),
            Ok(Admission::Answered(answer)) => Slot::Ready(answer),
            Err(error) => Slot::Ready(Box::new(error.to_frame(sequence, RequestId::default()))),
        });
        self.flush();
    }

    fn run_engine(&mut self, fault: Option<Fault>) {
        let Some((ticket, frame)) = self.in_engine.pop_front() else { return };
        let (sequence, mut lost) = (frame.sequence, None);
        let refusal = if sequence != self.engine.applied + 1 {
            Some(Error::Gap { found: sequence, expected: self.engine.applied + 1 })
        } else {
            let microbatch = match head(&frame).effect {
                Effect::Close(microbatch) => Some(microbatch),
                _ => None,
            };
            match (fault, microbatch) {
                (None, _) => None,
                (Some(Fault::Later), _) => Some(Error::OpenMicrobatches { limit: 2 }),
                (Some(Fault::LostTape), Some(microbatch)) => {
                    self.engine.tapes.remove(&microbatch);
                    lost = Some(microbatch);
                    Some(Error::Overflow { what: "gradient" })
                }
                (Some(_), _) => Some(Error::Overflow { what: "output" }),
            }
        };
        let answer = match refusal {
            Some(error) => {
                self.state.settle(ticket, Settled::Refused { lost });
                error.to_frame(sequence, RequestId::default())
            }
            None => {
                let answer = self.engine.apply(&frame);
                let step = matches!(answer.body, Some(Body::Step(_))).then_some(self.engine.steps);
                let boxed = Box::new(answer.clone());
                self.state.settle(ticket, Settled::Applied { answer: boxed, bytes: 1, step });
                answer
            }
        };
        for slot in &mut self.outbox {
            if matches!(slot, Slot::Awaits(other) if *other == ticket) {
                *slot = Slot::Ready(Box::new(answer.clone()));
            }
        }
        self.flush();
    }

    /// Answers leave in the order of their frames.
    fn flush(&mut self) {
        while let Some(Slot::Ready(_)) = self.outbox.front() {
            if let Some(Slot::Ready(answer)) = self.outbox.pop_front() {
                self.downwards.push_back(*answer);
            }
        }
    }

    fn take_answer(&mut self) {
        let Some(answer) = self.downwards.pop_front() else { return };
        let said = format!("{answer:?}");
        let done = self.client.receive(answer);
        let done = done.unwrap_or_else(|| panic!("{said} was not due"));
        self.ended(done);
    }

    fn ended(&mut self, done: Vec<Done>) {
        let mut gave_up = false;
        for done in done {
            match done {
                Done::Applied { tag: NOBODY, .. } => {}
                Done::Applied { tag, microbatch } if tag % PER_STEP < 2 => {
                    self.forwarded.insert(tag, microbatch);
                }
                Done::Applied { .. } => {}
                // A program that is refused something goes back to a snapshot.
                Done::Refused { .. } | Done::Aborted { .. } => gave_up = true,
            }
        }
        if gave_up {
            self.restore();
        }
    }

    fn disconnect(&mut self) {
        if !self.connected {
            return;
        }
        self.connected = false;
        self.upwards.clear();
        self.downwards.clear();
        self.outbox.clear();
        let done = self.client.disconnected();
        self.ended(done);
    }

    fn connect(&mut self) {
        if self.connected {
            return;
        }
        let _ = self.state.acknowledge(self.client.answered());
        let attached = v1::Attached {
            last_applied: self.state.applied(),
            step: self.state.step(),
            open_microbatches: self.state.open().keys().copied().collect(),
            limits: Some(limits()),
            ..Default::default()
        };
        self.connected = true;
        match self.client.attached(&attached) {
            Ok(()) => {}
            Err(false) => self.restore(),
            Err(true) => {
                panic!("the server stands at {}, which nobody sent", attached.last_applied)
            }
        }
    }

    fn snapshot(&mut self) {
        if self.state.is_quiet() {
            let (resume, engine) = (self.state.resume(), self.engine.clone());
            self.snapshots.push(Snapshot { resume, engine });
        }
    }

    /// The server's process ends and begins again with the newest snapshot.
    fn crash(&mut self) {
        self.disconnect();
        self.begin_from(self.snapshots.len() - 1);
    }

    /// The client goes back to the last snapshot between two steps, where it has its own part of the
    /// state, and so does the server.
    fn restore(&mut self) {
        let between = |snapshot: &Snapshot| {
            snapshot.engine.gradients == 0 && snapshot.engine.tapes.is_empty()
        };
        let newest = self.snapshots.iter().rposition(between).expect("the first one is");
        self.snapshots.truncate(newest + 1);
        self.begin_from(newest);
        self.upwards.clear();
        self.downwards.clear();
        self.outbox.clear();
        self.client = Side::new(self.engine.applied, &limits());
        self.next = self.engine.steps * PER_STEP;
        self.forwarded.clear();
        self.connected = true;
    }

    fn begin_from(&mut self, snapshot: usize) {
        let Snapshot { resume, engine } = &self.snapshots[snapshot];
        self.state = SessionState::new(LIMITS, resume.clone());
        self.engine = engine.clone();
        self.in_engine.clear();
    }
}

#[derive(Clone, Copy)]
enum Fault {
    /// It is full and says when to try again.
    Later,
    ForGood,
    LostTape,
}

impl Engine {
    fn apply(&mut self, frame: &ClientFrame) -> ServerFrame {
        use client_frame::Body as Asked;
        self.applied = frame.sequence;
        let body = match frame.body.as_ref().expect("frames have bodies") {
            Asked::Forward(forward) => {
                let was = self.tapes.insert(forward.microbatch, forward.dropout_key);
                assert_eq!(was, None);
                Body::Forward(v1::ForwardDone::default())
            }
            Asked::Backward(backward) => {
                let tape = self.tapes.remove(&backward.microbatch).expect("its tape is there");
                self.gradients = chain(self.gradients, tape);
                Body::Backward(v1::BackwardDone::default())
            }
            Asked::Step(step) => {
                self.steps += 1;
                let term = chain(self.gradients, step.learning_rate as u64);
                self.parameters = chain(self.parameters, term);
                self.gradients = 0;
                Body::Step(v1::StepDone { step: self.steps, snapshot: false })
            }
            Asked::Discard(discard) => {
                self.tapes.remove(&discard.microbatch);
                Body::Discard(v1::DiscardDone {})
            }
            other => unreachable!("{other:?} is not in the program"),
        };
        ServerFrame { sequence: frame.sequence, body: Some(body) }
    }
}

/// Where the program ends if nothing happens to it.
fn uninterrupted(applied: u64) -> Engine {
    let mut parameters = 0;
    for step in 0..STEPS {
        let first = step * PER_STEP;
        let gradients = chain(chain(0, first + 1), first + 2);
        parameters = chain(parameters, chain(gradients, first + 4));
    }
    Engine { applied, steps: STEPS, parameters, ..Engine::default() }
}

/// Depends on the order.
fn chain(sum: u64, term: u64) -> u64 {
    sum.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(term)
}

fn limits() -> v1::Limits {
    v1::Limits {
        max_frames_in_flight: LIMITS.max_frames_in_flight as u32,
        max_open_microbatches: LIMITS.max_open_microbatches as u32,
        ..Default::default()
    }
}

fn head(frame: &ClientFrame) -> Head {
    use client_frame::Body as Asked;
    let effect = match frame.body.as_ref().expect("frames have bodies") {
        Asked::Forward(forward) => Effect::Open(forward.microbatch),
        Asked::Backward(backward) => Effect::Close(backward.microbatch),
        Asked::Step(_) => Effect::Step,
        Asked::Discard(discard) => Effect::Discard(discard.microbatch),
        other => unreachable!("{other:?} is not in the program"),
    };
    // Of the body alone: a frame that comes again acknowledges more.
    let (sequence, body) = (frame.sequence, frame.body.clone());
    let body = ClientFrame { sequence, body, ..Default::default() };
    let digest = *blake3::hash(&body.encode_to_vec()).as_bytes();
    Head { sequence: frame.sequence, acknowledged: frame.acknowledged, digest, effect }
}
