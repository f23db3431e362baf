//! The frames of one session that have no answer yet: their numbers, their order, what goes on the
//! wire next, what is sent again after a break. A plain state machine without clock and I/O; the
//! task around it is in `driver.rs`.
//!
//! Sequence numbers are not stored: the frames are a queue, and the first one has the number after
//! the last answer. A frame that the server refused changed nothing and its number is free, so the
//! queue only moves up.

use crate::claim::Interest;
use crate::entry::{Entry, Request};
use offshoot_proto::v1;
use std::collections::{BTreeMap, VecDeque};
use v1::client_frame::Body;

/// Why a refused frame is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The caller gets the refusal; the frames behind it are given up.
    Final,
    /// The server said when to try again.
    Retry,
    /// The tenant's quota of tokens is used up for now. Nothing but time helps, and nobody is too full.
    Rate,
    /// The server is draining and will be back.
    Drain,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    /// Frames go out as they come.
    Open,
    /// A frame was refused. Those behind it on the wire come back too, because of the gap.
    Returning { cause: Cause, returned: usize },
    /// Everything came back. Only what closes open microbatches goes out, ahead of the forwards that
    /// wait: it frees what the server is short of, or is what its drain waits for.
    Held { cause: Cause, ahead: bool },
}

/// What became of an answer.
pub(crate) enum Outcome<R> {
    /// It belongs to this frame, which is done.
    Answered(Entry<R>),
    /// The frame was refused for good.
    Refused(Entry<R>),
    /// The frame came back because one before it was refused for good.
    Aborted(Entry<R>),
    /// The frame stays and will be sent again.
    Kept,
    /// The answer fits no frame; the number that was due, if any.
    Unexpected { due: Option<u64> },
}

/// Why a session cannot go on after a reconnection.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Gone {
    /// The server forgot applied frames or needed tapes.
    RolledBack { lost_microbatches: Vec<u64> },
    /// The server has frames that were never sent here.
    Ahead,
}

pub(crate) struct Window<R> {
    /// Every answer up to this one has arrived.
    answered: u64,
    entries: VecDeque<Entry<R>>,
    /// The first so many entries are on the wire.
    on_wire: usize,
    flow: Flow,
    max_frames: usize,
    max_open: usize,
    /// Microbatches whose forward was answered and whose backward was not.
    open: BTreeMap<u64, Interest>,
}

impl<R> Window<R> {
    pub(crate) fn new(answered: u64, limits: &v1::Limits) -> Self {
        let mut window = Window {
            answered,
            entries: VecDeque::new(),
            on_wire: 0,
            flow: Flow::Open,
            max_frames: 1,
            max_open: 1,
            open: BTreeMap::new(),
        };
        window.set_limits(limits);
        window
    }

    pub(crate) fn set_limits(&mut self, limits: &v1::Limits) {
        self.max_frames = (limits.max_frames_in_flight as usize).max(1);
        self.max_open = (limits.max_open_microbatches as usize).max(1);
    }

    /// Room for frames that are on the wire at one time.
    pub(crate) fn capacity(&self) -> usize {
        self.max_frames + self.max_open
    }

    pub(crate) fn answered(&self) -> u64 {
        self.answered
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether another request may come in.
    pub(crate) fn has_room(&self) -> bool {
        match self.flow {
            Flow::Open => self.entries.len() < self.max_frames,
            Flow::Returning { .. } => false,
            // Backwards must be able to overtake a full window of waiting forwards.
            Flow::Held { .. } => self.entries.len() < self.capacity(),
        }
    }

    /// Takes a request in.
    pub(crate) fn push(&mut self, request: Request, reply: R) {
        let place = self.answered + 1 + self.entries.len() as u64;
        self.entries.push_back(Entry::new(request, place, reply));
    }

    /// Microbatches that nobody wants any more and that no frame closes yet: each needs a Discard.
    pub(crate) fn abandoned(&self) -> Vec<u64> {
        if self.is_returning() {
            return Vec::new();
        }
        let mut unclosed: BTreeMap<u64, &Interest> =
            self.open.iter().map(|(id, interest)| (*id, interest)).collect();
        for entry in &self.entries {
            unclosed.extend(entry.opens().map(|id| (id, &entry.interest)));
        }
        for id in self.entries.iter().filter_map(Entry::closes) {
            unclosed.remove(&id);
        }
        let unwanted = unclosed.into_iter().filter(|(_, interest)| interest.strong_count() == 0);
        unwanted.map(|(id, _)| id).collect()
    }

    /// The next frame for the wire, if one may go.
    pub(crate) fn take_unsent(&mut self) -> Option<v1::ClientFrame> {
        match self.flow {
            Flow::Open if self.on_wire < self.max_frames => {}
            Flow::Held { ahead: true, .. } => {
                let next = self.overtaking()?;
                let entry = self.entries.remove(next)?;
                self.entries.insert(self.on_wire, entry);
            }
            Flow::Open | Flow::Returning { .. } | Flow::Held { ahead: false, .. } => return None,
        }
        let entry = self.entries.get(self.on_wire)?;
        self.on_wire += 1;
        Some(v1::ClientFrame {
            sequence: self.answered + self.on_wire as u64,
            acknowledged: self.answered,
            body: Some(entry.body.clone()),
            ..Default::default()
        })
    }

    /// Whose frame [`take_unsent`](Window::take_unsent) gave last.
    pub(crate) fn last_sent(&self) -> Option<&R> {
        let entry = self.entries.get(self.on_wire.checked_sub(1)?)?;
        Some(&entry.reply)
    }

    /// Place of the first unsent frame that closes an open microbatch, with only forwards before it
    /// and what discards those. Caches have nothing to do with microbatches.
    fn overtaking(&self) -> Option<usize> {
        let waiting = self.entries.iter().enumerate().skip(self.on_wire);
        let mut passed = waiting.skip_while(|(_, entry)| match &entry.body {
            Body::Forward(_) | Body::Extend(_) | Body::DropCache(_) => true,
            Body::Discard(discard) => !self.open.contains_key(&discard.microbatch),
            _ => false,
        });
        let (place, entry) = passed.next()?;
        entry.closes().filter(|id| self.open.contains_key(id)).map(|_| place)
    }

    /// The number of the answer that is due next.
    fn due(&self) -> Option<u64> {
        let index = match self.flow {
            // The refused entries are gone already, but their numbers are not yet used again.
            Flow::Returning { cause: Cause::Final, returned } => {
                (self.on_wire > 0).then_some(returned)?
            }
            Flow::Returning { returned, .. } => (returned < self.on_wire).then_some(returned)?,
            Flow::Open | Flow::Held { .. } => (self.on_wire > 0).then_some(0)?,
        };
        Some(self.answered + 1 + index as u64)
    }

    /// The server applied frame `sequence`.
    pub(crate) fn applied(&mut self, sequence: u64) -> Outcome<R> {
        let due = self.due();
        if due != Some(sequence) || matches!(self.flow, Flow::Returning { .. }) {
            return Outcome::Unexpected { due };
        }
        let Some(entry) = self.take_front() else { return Outcome::Unexpected { due } };
        self.answered = sequence;
        if let Some(id) = entry.opens() {
            self.open.insert(id, entry.interest.clone());
        }
        if let Some(id) = entry.closes() {
            self.open.remove(&id);
            // What it held may be what the server was short of.
            if let Flow::Held { cause: Cause::Retry, .. } = self.flow {
                self.flow = Flow::Open;
            }
        }
        Outcome::Answered(entry)
    }

    /// The server refused frame `sequence`. `cause` counts for the first refused frame only; those
    /// behind it share its fate.
    pub(crate) fn refused(&mut self, sequence: u64, cause: Cause) -> Outcome<R> {
        let due = self.due();
        if due != Some(sequence) {
            return Outcome::Unexpected { due };
        }
        let (cause, returned, first) = match self.flow {
            Flow::Returning { cause, returned } => (cause, returned, false),
            Flow::Open | Flow::Held { .. } => (cause, 0, true),
        };
        self.flow = Flow::Returning { cause, returned: returned + 1 };
        if cause != Cause::Final {
            if first
                && cause == Cause::Retry
                && let Some(entry) = self.entries.front_mut()
            {
                entry.retries += 1;
            }
            return Outcome::Kept;
        }
        match self.take_front() {
            Some(entry) if first => {
                // A tape that cannot even be dropped is not tried again and again.
                if let Body::Discard(discard) = &entry.body {
                    self.open.remove(&discard.microbatch);
                }
                Outcome::Refused(entry)
            }
            Some(entry) => Outcome::Aborted(entry),
            None => Outcome::Unexpected { due },
        }
    }

    fn take_front(&mut self) -> Option<Entry<R>> {
        let entry = self.entries.pop_front()?;
        self.on_wire -= 1;
        Some(entry)
    }

    /// A frame was refused, and those behind it on the wire are still coming back.
    pub(crate) fn is_returning(&self) -> bool {
        matches!(self.flow, Flow::Returning { .. })
    }

    /// To be called after every refusal: once all frames behind it have come back, those that are
    /// kept are held, or hands out those that waited behind a frame refused for good.
    pub(crate) fn settle(&mut self) -> Vec<Entry<R>> {
        let Flow::Returning { cause, returned } = self.flow else { return Vec::new() };
        let outstanding = if cause == Cause::Final { 0 } else { returned };
        if self.on_wire > outstanding {
            return Vec::new();
        }
        if cause == Cause::Final {
            self.flow = Flow::Open;
            return self.entries.drain(..).collect();
        }
        self.on_wire = 0;
        // A backward that was refused itself is not tried ahead a second time.
        let ahead = self.entries.front().is_none_or(|e| e.closes().is_none());
        self.flow = Flow::Held { cause, ahead };
        Vec::new()
    }

    /// The wait that the server asked for is over.
    pub(crate) fn release(&mut self) {
        if let Flow::Held { .. } = self.flow {
            self.flow = Flow::Open;
        }
    }

    /// The server is draining, and nothing that it waits for can still come from here.
    pub(crate) fn may_leave(&self) -> bool {
        match self.flow {
            Flow::Held { cause: Cause::Drain, ahead } => {
                let awaited = ahead && self.open.values().any(|i| i.strong_count() > 0);
                self.on_wire == 0 && !awaited
            }
            Flow::Open | Flow::Returning { .. } | Flow::Held { .. } => false,
        }
    }

    /// The stream is gone. Everything without an answer is to be sent again, except what a refused
    /// frame has taken with it.
    pub(crate) fn disconnected(&mut self) -> Vec<Entry<R>> {
        let flow = std::mem::replace(&mut self.flow, Flow::Open);
        self.on_wire = 0;
        match flow {
            Flow::Returning { cause: Cause::Final, .. } => self.entries.drain(..).collect(),
            Flow::Open | Flow::Returning { .. } | Flow::Held { .. } => Vec::new(),
        }
    }

    /// The server is back. It has applied frames up to `last_applied` and holds the tapes `held`.
    pub(crate) fn attached(&self, last_applied: u64, held: &[u64]) -> Result<(), Gone> {
        let Some(applied) = last_applied.checked_sub(self.answered) else {
            return Err(Gone::RolledBack { lost_microbatches: Vec::new() });
        };
        let applied = applied as usize;
        if applied > self.entries.len() {
            return Err(Gone::Ahead);
        }
        let mut needed = self.open.clone();
        for entry in self.entries.iter().take(applied) {
            if let Some(id) = entry.opens() {
                needed.insert(id, entry.interest.clone());
            }
            // Its answer is recorded; it will not be computed again.
            if let Some(id) = entry.closes() {
                needed.remove(&id);
            }
        }
        let lost_microbatches: Vec<u64> = needed
            .into_iter()
            .filter(|(id, interest)| interest.strong_count() > 0 && !held.contains(id))
            .map(|(id, _)| id)
            .collect();
        if lost_microbatches.is_empty() {
            Ok(())
        } else {
            Err(Gone::RolledBack { lost_microbatches })
        }
    }

    /// Ends everything.
    pub(crate) fn drain(&mut self) -> Vec<Entry<R>> {
        self.on_wire = 0;
        self.entries.drain(..).collect()
    }
}

#[cfg(test)]
#[path = "window_tests.rs"]
mod tests;
