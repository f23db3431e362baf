//! A session's answers in the order of its frames, whenever each becomes ready.

use super::state::{Settled, Ticket};
use crate::engine::{BackwardResult, DiscardResult, DropCacheResult, ForwardResult, StepResult};
use crate::error::Error;
use crate::residency::Writing;
use offshoot_adapters::AdapterState;
use offshoot_proto::v1::{self, ServerFrame, server_frame::Body};
use std::collections::VecDeque;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};
use tracing::Span;

/// Room for one answer on a stream, reserved before its frame is taken in. So no answer ever waits
/// for a slow reader, and a client that does not read is not read from.
pub type Permit = mpsc::OwnedPermit<Result<ServerFrame, tonic::Status>>;

/// Dropped when the session lets go of a stream.
pub type StreamEnds = oneshot::Sender<()>;

/// What the engine made of a frame.
#[derive(Debug)]
pub enum Answer {
    /// Or of an Extend.
    Forward(Result<ForwardResult, Error>),
    Backward {
        microbatch: u64,
        result: Result<BackwardResult, Error>,
    },
    Step(Result<StepResult, Error>),
    Discard(Result<DiscardResult, Error>),
    DropCache(Result<DropCacheResult, Error>),
    /// It did not come as far as the engine.
    Refused(Error),
}

impl Answer {
    /// For the state, and for the client. `copied`: a snapshot right behind this Step is on its way to the
    /// store. `refuse` makes the answer to a frame that is refused.
    pub(super) fn settle(
        self,
        sequence: u64,
        copied: bool,
        refuse: impl Fn(&Error) -> ServerFrame,
    ) -> (Settled, ServerFrame) {
        let applied = |body, bytes, step| {
            let answer = ServerFrame { sequence, body: Some(body) };
            let settled = Settled::Applied { answer: Box::new(answer.clone()), bytes, step };
            (settled, answer)
        };
        let refused = |error: Error, lost| (Settled::Refused { lost }, refuse(&error));
        match self {
            Answer::Forward(Ok(ForwardResult { hidden, tape_bytes, cache_bytes, times })) => {
                let (hidden, timing) = (Some(hidden.into_proto()), Some(timing(times)));
                let done = v1::ForwardDone { hidden, tape_bytes, timing, cache_bytes };
                applied(Body::Forward(done), tape_bytes + cache_bytes, None)
            }
            Answer::Backward {
                result: Ok(BackwardResult::Done { grad, grad_norm_squared, times }),
                ..
            } => {
                let (grad, timing) = (grad.map(|g| g.into_proto()), Some(timing(times)));
                let done = v1::BackwardDone { grad, grad_norm_squared, timing };
                applied(Body::Backward(done), 0, None)
            }
            Answer::Backward { microbatch, result: Ok(BackwardResult::Lost(error)) } => {
                refused(error, Some(microbatch))
            }
            Answer::Step(Ok(StepResult { step })) => {
                applied(Body::Step(v1::StepDone { step, snapshot: copied }), 0, Some(step))
            }
            Answer::Discard(Ok(DiscardResult)) => {
                applied(Body::Discard(v1::DiscardDone {}), 0, None)
            }
            Answer::DropCache(Ok(DropCacheResult)) => {
                applied(Body::DropCache(v1::DropCacheDone {}), 0, None)
            }
            Answer::Forward(Err(error))
            | Answer::Backward { result: Err(error), .. }
            | Answer::Step(Err(error))
            | Answer::Discard(Err(error))
            | Answer::DropCache(Err(error))
            | Answer::Refused(error) => refused(error, None),
        }
    }
}

fn timing(times: crate::engine::Times) -> v1::Timing {
    let micros = |d: std::time::Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
    v1::Timing {
        queue_micros: micros(times.queue),
        execute_micros: micros(times.execute),
        batch_jobs: u32::try_from(times.n_jobs).unwrap_or(u32::MAX),
        batch_tokens: u32::try_from(times.n_tokens).unwrap_or(u32::MAX),
    }
}

/// Something that is answered in its turn.
pub(super) enum Pending {
    /// An answer that was ready at once: a recorded one, or a refusal.
    Ready { permit: Permit, answer: Box<ServerFrame> },
    /// A frame that the engine has.
    Frame {
        ticket: Ticket,
        sequence: u64,
        permit: Option<Permit>,
        answer: Option<Answer>,
        /// A copy right behind it is on its way to the store.
        copied: bool,
        /// Ends when the answer is sent.
        span: Span,
    },
    /// A copy of the session between two frames.
    Cut { id: u64, asked: CutAsked, state: Option<Result<CutState, Error>> },
}

impl Pending {
    /// Whether the stream that there is now waits for it.
    fn is_asked(&self) -> bool {
        match self {
            Pending::Ready { .. } => true,
            Pending::Frame { permit, .. } => permit.is_some(),
            Pending::Cut { .. } => false,
        }
    }
}

/// What a copy is made from.
pub(super) enum CutState {
    Copied(Arc<AdapterState>),
    InStore,
}

/// Who wants a copy, and of which point.
pub(super) struct CutAsked {
    /// The last frame that is to be in it.
    pub after: u64,
    /// Whether the session ends with it.
    pub ends: bool,
    pub to: CutTo,
}

/// Where a copy goes.
pub(super) enum CutTo {
    Caller(oneshot::Sender<Result<super::SessionCut, Error>>),
    /// To the store, by itself; as part of the Step that it stands behind.
    Store(Writing, Span),
}

/// What comes next out of the outbox.
pub(super) enum Next {
    Ready {
        permit: Permit,
        answer: Box<ServerFrame>,
    },
    Frame {
        ticket: Ticket,
        sequence: u64,
        permit: Option<Permit>,
        answer: Answer,
        copied: bool,
        span: Span,
    },
    Cut {
        asked: CutAsked,
        state: Result<CutState, Error>,
    },
}

/// The order. Entries become ready in any order and leave in theirs.
#[derive(Default)]
pub(super) struct Outbox(VecDeque<Pending>);

impl Outbox {
    pub fn push(&mut self, pending: Pending) {
        self.0.push_back(pending);
    }

    /// An answer that is ready at once. It stands behind all that this stream has asked for, and
    /// before frames of an earlier stream that this one has not sent again yet: those will be asked
    /// for later, so they are answered later.
    pub fn push_ready(&mut self, permit: Permit, answer: ServerFrame) {
        let asked = self.0.iter().rposition(Pending::is_asked).map_or(0, |last| last + 1);
        self.0.insert(asked, Pending::Ready { permit, answer: Box::new(answer) });
    }

    /// The engine is done with a frame.
    pub fn answered(&mut self, done: Ticket, result: Answer) {
        for pending in &mut self.0 {
            if let Pending::Frame { ticket, answer, .. } = pending
                && *ticket == done
            {
                *answer = Some(result);
                return;
            }
        }
    }

    /// The engine is done with a copy.
    pub fn copied(&mut self, cut: u64, result: Result<CutState, Error>) {
        for pending in &mut self.0 {
            if let Pending::Cut { id, state, .. } = pending
                && *id == cut
            {
                *state = Some(result);
                return;
            }
        }
    }

    /// The frame came again: its one answer goes this way.
    pub fn redirect(&mut self, to: Ticket, new: Permit) {
        for pending in &mut self.0 {
            if let Pending::Frame { ticket, permit, .. } = pending
                && *ticket == to
            {
                *permit = Some(new);
                return;
            }
        }
    }

    /// The stream is gone; frames are still to be settled.
    pub fn detach(&mut self) {
        self.0.retain_mut(|pending| match pending {
            Pending::Ready { .. } => false,
            Pending::Frame { permit, .. } => {
                *permit = None;
                true
            }
            Pending::Cut { .. } => true,
        });
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The oldest entry, once it is ready.
    pub fn next(&mut self) -> Option<Next> {
        let ready = match self.0.front()? {
            Pending::Ready { .. } => true,
            Pending::Frame { answer, .. } => answer.is_some(),
            Pending::Cut { state, .. } => state.is_some(),
        };
        if !ready {
            return None;
        }
        match self.0.pop_front()? {
            Pending::Ready { permit, answer } => Some(Next::Ready { permit, answer }),
            Pending::Frame { ticket, sequence, permit, answer, copied, span } => {
                let answer = answer?;
                Some(Next::Frame { ticket, sequence, permit, answer, copied, span })
            }
            Pending::Cut { asked, state, .. } => Some(Next::Cut { asked, state: state? }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::frame::{Effect, Head};
    use super::super::state::{Admission, FrameLimits, Resume, SessionState};
    use super::*;
    use crate::refusals::RequestId;

    #[test]
    fn a_recorded_answer_does_not_wait_for_frames_that_come_again_later() {
        let limits = FrameLimits { max_frames_in_flight: 9, max_open_microbatches: 9 };
        let mut state = SessionState::new(limits, Resume::default());
        let mut outbox = Outbox::default();
        let tickets = [1, 2, 3].map(|sequence| {
            let head = Head { sequence, acknowledged: 0, digest: [0; 32], effect: Effect::Nothing };
            let Ok(Admission::Run(ticket)) = state.admit(&head) else { panic!("it is in order") };
            let (permit, answer, copied, span) = (None, None, false, Span::none());
            outbox.push(Pending::Frame { ticket, sequence, permit, answer, copied, span });
            ticket
        });
        let (stream, mut answers) = mpsc::channel(9);
        let permit = || stream.clone().try_reserve_owned().unwrap();
        let refusal = |sequence| Error::TakenOver.to_frame(sequence, RequestId::default());

        // Frame 1 is settled meanwhile. The new stream sends 1 and 2 again, and something wrong.
        outbox.answered(tickets[0], Answer::Step(Err(Error::TakenOver)));
        assert!(matches!(outbox.next(), Some(Next::Frame { sequence: 1, permit: None, .. })));
        outbox.push_ready(permit(), refusal(1));
        outbox.redirect(tickets[1], permit());
        outbox.push_ready(permit(), refusal(77));
        for ticket in &tickets[1..] {
            outbox.answered(*ticket, Answer::Step(Err(Error::TakenOver)));
        }
        while let Some(next) = outbox.next() {
            match next {
                Next::Ready { permit, answer } => drop(permit.send(Ok(*answer))),
                Next::Frame { permit: Some(permit), sequence, .. } => {
                    drop(permit.send(Ok(refusal(sequence))));
                }
                Next::Frame { permit: None, sequence, .. } => assert_eq!(sequence, 3),
                Next::Cut { .. } => panic!("nobody asked for one"),
            }
        }
        let mut came = Vec::new();
        while let Ok(Ok(answer)) = answers.try_recv() {
            came.push(answer.sequence);
        }
        assert_eq!(came, [1, 2, 77]);
    }
}
