//! The order of one session's frames, as a plain struct: it reads no clock, does no I/O and knows
//! no tensors.
//!
//! Frames are admitted when they come and settled when the engine is done with them, in the same
//! order. What is admitted but not settled counts as if it will succeed, so that a client may send
//! ahead. If such a frame is refused, those behind it are doomed: the engine, which counts the
//! applied frames of each session itself, refuses them too, and the client sends again from the
//! refused number.

use super::frame::{Digest, Effect, Head};
use crate::error::Error;
use offshoot_proto::v1::ServerFrame;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// How long clients should stay away from a draining server: the one behind it may be there soon.
pub(crate) const DRAIN_RETRY: Duration = Duration::from_millis(500);

/// How far a client may run ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameLimits {
    /// Frames sent and not answered; as many answers are recorded.
    pub max_frames_in_flight: usize,
    pub max_open_microbatches: usize,
}

/// Names one admission of one frame. Numbers of frames can come again after a refusal, tickets
/// cannot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(u64);

/// What to do with a frame that is in order.
#[derive(Debug, PartialEq)]
pub enum Admission {
    /// New: give it to the engine and settle the ticket with what comes back.
    Run(Ticket),
    /// Seen and answered before.
    Answered(Box<ServerFrame>),
    /// Seen before, and the engine is still at it.
    Joined(Ticket),
}

/// An answer that may be asked for again.
#[derive(Debug, Clone, PartialEq)]
pub struct Recorded {
    pub sequence: u64,
    pub digest: Digest,
    pub answer: ServerFrame,
}

/// How the engine left a frame.
#[derive(Debug)]
pub enum Settled {
    Applied {
        answer: Box<ServerFrame>,
        /// Of the tape that a training Forward left, or of the cache that an Extend went on with.
        bytes: u64,
        /// Optimizer steps, after a Step.
        step: Option<u64>,
    },
    Refused {
        /// A tape that was used up on the way to the refusal.
        lost: Option<u64>,
    },
}

/// What a session is made from again: what [`SessionState`] counts and a snapshot holds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Resume {
    pub applied: u64,
    pub step: u64,
    pub answers: Vec<Recorded>,
}

struct InFlight {
    ticket: Ticket,
    head: Head,
    /// A frame before it was refused.
    doomed: bool,
}

/// See the module's text.
pub struct SessionState {
    limits: FrameLimits,
    /// The last frame that changed the session.
    applied: u64,
    step: u64,
    /// The client has seen all answers up to this one.
    acknowledged: u64,
    /// Tape bytes by microbatch.
    open: BTreeMap<u64, u64>,
    /// Bytes by cache. The engine alone knows which of them are still there: it may drop one for want
    /// of room.
    caches: BTreeMap<u64, u64>,
    answers: VecDeque<Recorded>,
    in_flight: VecDeque<InFlight>,
    next_ticket: u64,
    draining: bool,
}

impl SessionState {
    /// A new session, or one that comes back; its tapes are gone.
    pub fn new(limits: FrameLimits, resume: Resume) -> Self {
        SessionState {
            limits,
            applied: resume.applied,
            step: resume.step,
            acknowledged: 0,
            open: BTreeMap::new(),
            caches: BTreeMap::new(),
            answers: resume.answers.into(),
            in_flight: VecDeque::new(),
            next_ticket: 0,
            draining: false,
        }
    }

    /// The last frame that changed the session.
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// Optimizer steps taken.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Microbatches whose tape is held, with its bytes.
    pub fn open(&self) -> &BTreeMap<u64, u64> {
        &self.open
    }

    /// What a snapshot keeps of this.
    pub fn resume(&self) -> Resume {
        Resume {
            applied: self.applied,
            step: self.step,
            answers: self.answers.iter().cloned().collect(),
        }
    }

    /// The frame that the session will stand at when all that is in flight has been applied.
    pub fn expected_applied(&self) -> u64 {
        self.live().next_back().map_or(self.applied, |frame| frame.head.sequence)
    }

    /// The client has seen all answers up to `sequence`; they are forgotten.
    pub fn acknowledge(&mut self, sequence: u64) -> Result<(), Error> {
        if sequence > self.applied {
            return Err(Error::Acknowledged { found: sequence, applied: self.applied });
        }
        self.acknowledged = self.acknowledged.max(sequence);
        self.answers.retain(|answer| answer.sequence > sequence);
        Ok(())
    }

    /// The recorded answers lie on disk with the adapter now: with their tensors they may be larger
    /// than it. No frame is admitted until they are back.
    pub fn drop_answers(&mut self) {
        self.answers.clear();
    }

    /// The session left the device, where its caches were.
    pub fn drop_caches(&mut self) {
        self.caches.clear();
    }

    /// Its caches.
    pub fn n_caches(&self) -> usize {
        self.caches.len()
    }

    /// What its caches take of the device, or a little more.
    pub fn cache_bytes(&self) -> u64 {
        self.caches.values().sum()
    }

    /// The recorded answers are back from the disk.
    pub fn put_answers(&mut self, answers: Vec<Recorded>) {
        self.answers = answers.into();
        self.answers.retain(|answer| answer.sequence > self.acknowledged);
    }

    /// Decides about a frame. An error changes nothing but what was acknowledged.
    pub fn admit(&mut self, head: &Head) -> Result<Admission, Error> {
        self.acknowledge(head.acknowledged)?;
        if let Some(known) = self.known(head)? {
            return Ok(known);
        }
        let expected = self.expected_applied() + 1;
        if head.sequence != expected {
            return Err(Error::Gap { found: head.sequence, expected });
        }
        let limit = self.limits.max_frames_in_flight;
        if self.live().count() >= limit {
            return Err(Error::InFlight { limit });
        }
        self.check_effect(head.effect)?;
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.in_flight.push_back(InFlight { ticket, head: head.clone(), doomed: false });
        Ok(Admission::Run(ticket))
    }

    /// What the engine made of the oldest ticket. Tickets settle in the order of admission.
    pub fn settle(&mut self, ticket: Ticket, settled: Settled) {
        let frame = self.in_flight.pop_front().expect("only admitted frames settle");
        assert_eq!(frame.ticket, ticket, "frames settle in the order of admission");
        match settled {
            Settled::Applied { answer, bytes, step } => {
                assert!(!frame.doomed, "the engine refuses what stands behind a refused frame");
                self.apply(frame.head, *answer, bytes, step);
            }
            Settled::Refused { lost } => {
                if let Some(microbatch) = lost {
                    self.open.remove(&microbatch);
                }
                if !frame.doomed {
                    self.in_flight.iter_mut().for_each(|later| later.doomed = true);
                }
            }
        }
    }

    /// From now on no training Forward and no Extend is admitted.
    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// Whether [`SessionState::drain`] was called.
    pub fn is_draining(&self) -> bool {
        self.draining
    }

    /// Whether nothing is left that a snapshot would tear apart: no frame in flight and no open
    /// microbatch. Accumulated gradients are in the snapshot, so their Step may come later.
    pub fn is_quiet(&self) -> bool {
        self.is_settled() && self.open.is_empty()
    }

    /// Whether a microbatch is open when all that is in flight has been applied.
    pub fn expects_open(&self) -> bool {
        !self.expected_open().is_empty()
    }

    /// Whether no frame is in flight.
    pub fn is_settled(&self) -> bool {
        self.in_flight.is_empty()
    }

    fn live(&self) -> impl DoubleEndedIterator<Item = &InFlight> {
        self.in_flight.iter().filter(|frame| !frame.doomed)
    }

    /// The frame's earlier coming, if there was one.
    fn known(&self, head: &Head) -> Result<Option<Admission>, Error> {
        let sequence = head.sequence;
        let same = |digest: &Digest, admission: Admission| {
            if *digest == head.digest {
                Ok(Some(admission))
            } else {
                Err(Error::Payload { sequence })
            }
        };
        if sequence <= self.applied {
            return match self.answers.iter().find(|answer| answer.sequence == sequence) {
                Some(known) => {
                    same(&known.digest, Admission::Answered(Box::new(known.answer.clone())))
                }
                None => Err(Error::Forgotten { sequence, applied: self.applied }),
            };
        }
        match self.live().find(|frame| frame.head.sequence == sequence) {
            Some(frame) => same(&frame.head.digest, Admission::Joined(frame.ticket)),
            None => Ok(None),
        }
    }

    /// Microbatches that are open when all that is in flight has been applied.
    fn expected_open(&self) -> Vec<u64> {
        let mut open: Vec<u64> = self.open.keys().copied().collect();
        for frame in self.live() {
            match frame.head.effect {
                Effect::Open(microbatch) => open.push(microbatch),
                Effect::Close(microbatch) | Effect::Discard(microbatch) => {
                    open.retain(|&m| m != microbatch);
                }
                Effect::Step | Effect::Nothing => {}
                Effect::Extend(_) | Effect::DropCache(_) => {}
            }
        }
        open
    }

    fn check_effect(&self, effect: Effect) -> Result<(), Error> {
        let open = self.expected_open();
        match effect {
            Effect::Nothing | Effect::Discard(_) | Effect::DropCache(_) => Ok(()),
            // A cache would not survive: its client begins it again on the next server.
            Effect::Open(_) | Effect::Extend(_) if self.draining => {
                Err(Error::Draining { retry_after: DRAIN_RETRY })
            }
            Effect::Extend(_) => Ok(()),
            Effect::Open(microbatch) if open.contains(&microbatch) => {
                Err(Error::OpenTape { microbatch })
            }
            Effect::Open(_) if open.len() >= self.limits.max_open_microbatches => {
                Err(Error::OpenMicrobatches { limit: self.limits.max_open_microbatches })
            }
            Effect::Close(microbatch) if !open.contains(&microbatch) => {
                Err(Error::NoTape { microbatch })
            }
            Effect::Open(_) | Effect::Close(_) => Ok(()),
            Effect::Step => match open.first() {
                Some(&microbatch) => Err(Error::StepWithOpen { microbatch }),
                None => Ok(()),
            },
        }
    }

    fn apply(&mut self, head: Head, answer: ServerFrame, bytes: u64, step: Option<u64>) {
        self.applied = head.sequence;
        match head.effect {
            Effect::Open(microbatch) => {
                self.open.insert(microbatch, bytes);
            }
            Effect::Close(microbatch) | Effect::Discard(microbatch) => {
                self.open.remove(&microbatch);
            }
            Effect::Extend(cache) => {
                self.caches.insert(cache, bytes);
            }
            Effect::DropCache(cache) => {
                self.caches.remove(&cache);
            }
            // They are of older weights now.
            Effect::Step => self.caches.clear(),
            Effect::Nothing => {}
        }
        self.step = step.unwrap_or(self.step);
        self.answers.push_back(Recorded { sequence: head.sequence, digest: head.digest, answer });
        // A client that keeps to its limit has seen all but the last so many answers.
        while self.answers.len() > self.limits.max_frames_in_flight {
            self.answers.pop_front();
        }
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
