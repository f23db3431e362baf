//! A frame without an answer, and what it does to microbatches.

use crate::claim::{Claim, Interest};
use offshoot_proto::v1;
use v1::client_frame::Body;

/// What a caller wants to send. The window makes the frame of it.
pub(crate) enum Request {
    Forward { forward: v1::Forward, interest: Interest },
    Backward { backward: v1::Backward, claim: Claim },
    Step(v1::Step),
    Discard(v1::Discard),
    Extend(v1::Extend),
    DropCache(v1::DropCache),
}

/// One frame without an answer, with its way home.
pub(crate) struct Entry<R> {
    call: &'static str,
    pub(crate) body: Body,
    /// Of a forward: who wants its tape.
    pub(crate) interest: Interest,
    /// Of a backward: the tape is needed as long as this is not answered.
    _claim: Option<Claim>,
    /// How often the server asked to send it again later.
    pub(crate) retries: u32,
    pub(crate) reply: R,
}

impl Request {
    /// Name of the frame, for errors.
    pub(crate) fn call(&self) -> &'static str {
        match self {
            Request::Forward { forward, .. } if is_train(forward) => "Forward",
            Request::Forward { .. } => "Forward (evaluate)",
            Request::Backward { .. } => "Backward",
            Request::Step(_) => "Step",
            Request::Discard(_) => "Discard",
            Request::Extend(_) => "Extend",
            Request::DropCache(_) => "DropCache",
        }
    }

    /// Bytes of its tensor.
    pub(crate) fn size(&self) -> usize {
        let tensor = match self {
            Request::Forward { forward, .. } => forward.hidden.as_ref(),
            Request::Backward { backward, .. } => backward.grad.as_ref(),
            Request::Extend(extend) => extend.hidden.as_ref(),
            Request::Step(_) | Request::Discard(_) | Request::DropCache(_) => None,
        };
        tensor.map_or(0, |t| t.data.len())
    }
}

impl<R> Entry<R> {
    /// The frame of a request. A forward in training mode gets its place in the session's order as
    /// its microbatch number, which is unique and stays its own if a backward overtakes it.
    pub(crate) fn new(request: Request, place: u64, reply: R) -> Self {
        let call = request.call();
        let (body, interest, claim) = match request {
            Request::Forward { mut forward, interest } => {
                forward.microbatch = if is_train(&forward) { place } else { 0 };
                (Body::Forward(forward), interest, None)
            }
            Request::Backward { backward, claim } => {
                (Body::Backward(backward), Interest::new(), Some(claim))
            }
            Request::Step(step) => (Body::Step(step), Interest::new(), None),
            Request::Discard(discard) => (Body::Discard(discard), Interest::new(), None),
            Request::Extend(extend) => (Body::Extend(extend), Interest::new(), None),
            Request::DropCache(drop) => (Body::DropCache(drop), Interest::new(), None),
        };
        Entry { call, body, interest, _claim: claim, retries: 0, reply }
    }

    /// Name of the frame, for errors.
    pub(crate) fn call(&self) -> &'static str {
        self.call
    }

    /// The microbatch of a forward in training mode or of a backward, or 0.
    pub(crate) fn microbatch(&self) -> u64 {
        self.opens().or(self.closes()).unwrap_or_default()
    }

    /// The microbatch that this frame opens.
    pub(crate) fn opens(&self) -> Option<u64> {
        match &self.body {
            Body::Forward(f) if is_train(f) => Some(f.microbatch),
            _ => None,
        }
    }

    /// The microbatch that this frame uses up or drops.
    pub(crate) fn closes(&self) -> Option<u64> {
        match &self.body {
            Body::Backward(b) => Some(b.microbatch),
            Body::Discard(d) => Some(d.microbatch),
            _ => None,
        }
    }
}

fn is_train(forward: &v1::Forward) -> bool {
    forward.mode() == v1::Mode::Train
}
