//! Spans: what a frame goes through here, as part of its client's trace. They are made with `tracing`;
//! whoever runs the server decides whether anybody collects them. Names and ids only: never a tensor,
//! never a token.
//!
//! ```text
//! session.forward            of the client's span for the frame, until its answer is sent
//!   queue.wait               from the session to the device
//!   engine.forward  <----->  engine.batch         links, both ways; the batch is a trace of its own
//!                              engine.upload, engine.pass, engine.download
//! session.step
//!   queue.wait, engine.step
//!   snapshot.write           if a snapshot was due
//! ```

mod batch;
mod caller;

pub use batch::{BatchSpan, JobSpans, phase};
pub use caller::{Origin, called};

use crate::error::Error;
use crate::session::SessionId;
use offshoot_proto::v1::{self, client_frame::Body};
use tracing::Span;
use tracing::field::Empty;

/// Of all spans, so that those who filter know them. They are at level DEBUG.
pub const TARGET: &str = "offshoot::span";

/// Whose frame it is.
#[derive(Debug, Clone, Copy)]
pub struct Whose<'a> {
    pub session: SessionId,
    pub tenant: &'a str,
}

/// A frame that came, until its answer is sent.
pub fn frame(frame: &v1::ClientFrame, whose: Whose<'_>) -> Span {
    let span = tracing::debug_span!(
        target: TARGET, parent: None, "session.frame",
        otel.name = name(frame.body.as_ref()),
        otel.kind = "server",
        otel.status_code = Empty,
        offshoot.tenant = whose.tenant,
        offshoot.session = %whose.session,
        offshoot.sequence = frame.sequence,
        offshoot.microbatch = Empty,
        offshoot.tokens = Empty,
        offshoot.step = Empty,
        offshoot.repeated = Empty,
        offshoot.error = Empty,
        offshoot.request = Empty,
    );
    if span.is_disabled() {
        return span;
    }
    Origin::of_frame(frame).continue_in(&span);
    match &frame.body {
        Some(Body::Forward(forward)) => {
            record_microbatch(&span, forward.microbatch, forward.hidden.as_ref());
        }
        Some(Body::Backward(backward)) => {
            record_microbatch(&span, backward.microbatch, backward.grad.as_ref());
        }
        Some(Body::Extend(extend)) => record_microbatch(&span, 0, extend.hidden.as_ref()),
        Some(Body::Discard(discard)) => record_microbatch(&span, discard.microbatch, None),
        Some(Body::Hello(_) | Body::Step(_) | Body::DropCache(_)) | None => {}
    }
    span
}

fn record_microbatch(span: &Span, microbatch: u64, tensor: Option<&v1::Tensor>) {
    if microbatch > 0 {
        span.record("offshoot.microbatch", microbatch);
    }
    if let Some(n_tokens) = tensor.and_then(|tensor| tensor.shape.first()) {
        span.record("offshoot.tokens", *n_tokens);
    }
}

fn name(body: Option<&Body>) -> &'static str {
    match body {
        Some(Body::Hello(_)) => "session.hello",
        Some(Body::Forward(forward)) if forward.mode() == v1::Mode::Eval => "session.evaluate",
        Some(Body::Forward(_)) => "session.forward",
        Some(Body::Backward(_)) => "session.backward",
        Some(Body::Step(_)) => "session.step",
        Some(Body::Discard(_)) => "session.discard",
        Some(Body::Extend(_)) => "session.extend",
        Some(Body::DropCache(_)) => "session.drop_cache",
        None => "session.empty",
    }
}

/// A frame that came again: its answer was recorded, or is still on its way.
#[derive(Debug, Clone, Copy)]
pub enum Repeated {
    Answered,
    Joined,
}

/// Notes that the frame is no new one.
pub fn repeated(span: &Span, how: Repeated) {
    let how = match how {
        Repeated::Answered => "answered",
        Repeated::Joined => "joined",
    };
    span.record("offshoot.repeated", how);
}

/// Notes which step a Step was.
pub fn stepped(span: &Span, step: u64) {
    span.record("offshoot.step", step);
}

/// Notes that the frame was refused with this answer.
pub fn refused(span: &Span, error: &Error, answer: &v1::ServerFrame) {
    failed(span, error);
    if let Some(v1::server_frame::Body::Error(told)) = &answer.body {
        span.record("offshoot.request", told.request_id.as_str());
    }
}

/// Notes that nothing came of what the span is of.
pub fn failed(span: &Span, error: &Error) {
    span.record("offshoot.error", error.label());
    span.record("otel.status_code", "ERROR");
}

/// Writes a snapshot: part of whatever asks for it.
pub fn snapshot_write<T>(
    session: SessionId,
    n_bytes: usize,
    write: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    let span = tracing::debug_span!(
        target: TARGET, "snapshot.write",
        offshoot.session = %session,
        offshoot.bytes = n_bytes,
        offshoot.error = Empty,
        otel.status_code = Empty,
    );
    let written = span.in_scope(write);
    if let Err(error) = &written {
        failed(&span, error);
    }
    written
}
